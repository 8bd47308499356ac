// An image of the visitor's or of the examples, which is kept with the service once it is asked about.
import { keepImage, Refused } from "./api.js";
import { LONGEST } from "./heat.js";

const MARGIN_S = 30; // an id that expires sooner is not used

export class Picture {
  field = "image"; // of a question
  noun = "Image";
  shownOn = "image"; // where its maps are
  isPaged = false; // whether a question needs a page

  constructor(file, bitmap, example = null) {
    this.file = file;
    this.bitmap = bitmap;
    this.example = example; // of EXAMPLES, or null for the visitor's own image
    this.kept = null;
  }

  /** Read a file. Throws if the browser cannot draw it. */
  static async of(file, example = null) {
    return new Picture(file, await bitmapOf(file), example);
  }

  /** What is shown until a question is answered. */
  get atFirst() {
    return { bitmap: this.bitmap, label: "" };
  }

  /** What a question looked at -> [{bitmap, label, relevance}]. A run has the fields that were asked, and its end. */
  async looks({ end }) {
    return [{ bitmap: this.bitmap, label: "", relevance: end.relevance[0] }];
  }

  /** Free what the picture holds. It cannot be shown again. */
  close() {
    this.bitmap?.close();
  }

  get name() {
    return this.file.name || "image.png";
  }

  get description() {
    return this.example?.alt ?? this.name;
  }

  /** Call `use` with the image's id. The image is sent if the service does not have it. */
  async withId(use, signal) {
    if (!this.kept || this.kept.expires_at - MARGIN_S < Date.now() / 1000) this.kept = await keepImage(this.file, signal);
    try {
      return await use(this.kept.id);
    } catch (error) {
      if (!(error instanceof Refused) || error.code !== "image_not_found") throw error;
      this.kept = await keepImage(this.file, signal); // the service was restarted, or its store is full
      return use(this.kept.id);
    }
  }
}

/** An image file, not larger than a canvas of the page. */
export async function bitmapOf(file) {
  const whole = await createImageBitmap(file);
  const [resizeWidth, resizeHeight] = within(whole.width, whole.height);
  if (resizeWidth === whole.width) return whole;
  const bitmap = await createImageBitmap(whole, { resizeWidth, resizeHeight, resizeQuality: "high" });
  whole.close();
  return bitmap;
}

/** What a video shows now, or one frame, not larger than a canvas. createImageBitmap of a video may never end in Chromium. */
export function drawn(source, width, height) {
  const canvas = new OffscreenCanvas(...within(width, height));
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  return canvas.transferToImageBitmap();
}

/** The sides in pixels of what a canvas of the page shows. */
export function within(width, height) {
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  return [width, height].map((side) => Math.max(1, Math.round(side * scale)));
}
