// Take an image or a video that is dropped, pasted, chosen or photographed, and keep it with the service.
import { keepImage, Refused } from "./api.js";
import { byId } from "./dom.js";
import { LONGEST } from "./heat.js";

const MARGIN_S = 30; // an id that expires sooner is not used
const PRESENTED_MS = 200; // the longest that a frame may take after its seek
const WITHIN_S = 0.002; // the service rounds the time of a frame to milliseconds

/** The file is not an image or a video that this browser can show. */
export class NotAnImage extends Error {}

export class Picture {
  field = "image"; // of a question

  constructor(file, bitmap, example = null) {
    this.file = file;
    this.bitmap = bitmap;
    this.example = example; // of EXAMPLES, or null for the visitor's own image
    this.kept = null;
  }

  /** Read a file. Throws NotAnImage. */
  static async of(file, example = null) {
    try {
      return new Picture(file, await bitmapOf(file), example);
    } catch {
      return Film.of(file);
    }
  }

  /** What a question looked at -> [{bitmap, label, relevance}]. `end` is its answer. */
  async looks(end) {
    return [{ bitmap: this.bitmap, label: "", relevance: end.relevance[0] }];
  }

  /** Free what the picture holds. It cannot be shown again. */
  close() {
    this.bitmap.close();
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

/** A short video. Its first frame is shown until a question has looked at some. */
class Film extends Picture {
  field = "video";

  constructor(file, video, bitmap) {
    super(file, bitmap);
    this.video = video;
    this.frames = new Map(); // bitmaps by their times, for all questions
  }

  /** Read a file. Throws NotAnImage. */
  static async of(file) {
    const video = document.createElement("video");
    video.muted = true;
    video.preload = "auto";
    try {
      await happened(video, "loadeddata", () => (video.src = URL.createObjectURL(file)));
      return new Film(file, video, frameOf(video));
    } catch {
      URL.revokeObjectURL(video.src);
      const name = file.name || "This file";
      throw new NotAnImage(
        `${name} is not an image or a video that this page can show. Choose a PNG, JPEG, WebP or GIF, or an MP4 or WebM.`,
      );
    }
  }

  async looks(end, signal) {
    const looks = [];
    for (const { index, time_s: time = 0, relevance } of end.vision.frames ?? []) {
      looks.push({ bitmap: await this.at(time, signal), label: `frame ${index}, ${time.toFixed(2)} s`, relevance });
    }
    return looks;
  }

  /** The frame at a time. Throws if the video cannot be read there, or `signal` is aborted. */
  async at(time, signal) {
    if (!this.frames.has(time)) {
      const presented = presentation(this.video);
      await happened(this.video, "seeked", () => (this.video.currentTime = time + WITHIN_S), signal);
      await presented;
      this.frames.set(time, frameOf(this.video));
    }
    return this.frames.get(time);
  }

  close() {
    super.close();
    for (const bitmap of this.frames.values()) bitmap.close();
    URL.revokeObjectURL(this.video.src);
    this.video.removeAttribute("src");
    this.video.load();
  }
}

/** An image file, not larger than a canvas of the page. */
async function bitmapOf(file) {
  const whole = await createImageBitmap(file);
  const [resizeWidth, resizeHeight] = within(whole.width, whole.height);
  if (resizeWidth === whole.width) return whole;
  const bitmap = await createImageBitmap(whole, { resizeWidth, resizeHeight, resizeQuality: "high" });
  whole.close();
  return bitmap;
}

/** What a video shows now, not larger than a canvas of the page. createImageBitmap of a video may never end in Chromium. */
function frameOf(video) {
  const [width, height] = within(video.videoWidth, video.videoHeight);
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").drawImage(video, 0, 0, width, height);
  return canvas.transferToImageBitmap();
}

/** The sides in pixels of what a canvas of the page shows. */
function within(width, height) {
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  return [width, height].map((side) => Math.max(1, Math.round(side * scale)));
}

/** Wait for the next frame that a video presents: a canvas copies the one before until then. Not all browsers tell. */
function presentation(video) {
  return new Promise((resolve) => {
    video.requestVideoFrameCallback?.(resolve);
    setTimeout(resolve, PRESENTED_MS);
  });
}

/** Wait for an event that `cause` leads to. Throws what the element says is wrong, or that `signal` is aborted. */
function happened(element, event, cause, signal) {
  const over = new AbortController();
  const listening = { signal: over.signal };
  return new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    element.addEventListener(event, resolve, listening);
    element.addEventListener("error", () => reject(element.error), listening);
    signal?.addEventListener("abort", () => reject(signal.reason), listening);
    cause();
  }).finally(() => over.abort());
}

/** Call `taken` with each file that the visitor brings. */
export function takeFiles(taken) {
  for (const id of ["file", "camera"]) {
    const input = byId(id);
    input.addEventListener("change", () => {
      if (input.files[0]) taken(input.files[0]);
      input.value = ""; // the same file can be chosen again
    });
  }
  byId("camera").hidden = byId("camera-button").hidden = !matchMedia("(pointer: coarse)").matches;

  const stage = byId("stage");
  addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("over");
  });
  for (const name of ["dragleave", "drop", "dragend"]) addEventListener(name, () => stage.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) taken(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) {
      event.preventDefault();
      taken(file);
    }
  });
}
