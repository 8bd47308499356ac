// A PDF or a TIFF: a question is about one of its pages, which the browser seldom can draw.
import { LONGEST } from "./heat.js";
import { bitmapOf, Picture, within } from "./picture.js";

export class PagedFile extends Picture {
  noun = "Document";
  shownOn = "page";
  isPaged = true;
  blanks = new Map(); // bitmaps in place of pages, by their sides

  constructor(file, bitmap, format) {
    super(file, bitmap);
    this.format = format;
  }

  /** Read a file. What this browser can draw of it, if anything, is its first page. */
  static async of(file, format) {
    return new PagedFile(file, await bitmapOf(file).catch(() => null), format);
  }

  /** How many pages the file has; null until the service has told. */
  get pages() {
    return this.kept?.pages ?? null;
  }

  get atFirst() {
    if (this.bitmap) return { bitmap: this.bitmap, label: "page 1" };
    const words = `This browser cannot draw the pages of a ${this.format}. You can ask about them all the same: `
      + "an answer shows where on the page the model looked.";
    return { bitmap: null, label: "", words };
  }

  async looks({ end, fields: { page } }) {
    const [relevance] = end.relevance;
    const label = `page ${page}`;
    if (this.bitmap && page === 1) return [{ bitmap: this.bitmap, label, relevance }];
    const [left, top, right, bottom] = relevance.area;
    const isSquashed = right - left === 1 && bottom - top === 1; // else a square, which tells the page's proportions
    const [width, height] = isSquashed ? [this.kept.width, this.kept.height] : [bottom - top, right - left];
    const shape = isSquashed && page > 1 ? ", in the proportions of page 1" : "";
    const note = `This browser cannot draw page ${page} of ${this.name}, so its map stands alone${shape}.`;
    return [{ bitmap: this.blank(width, height), label, relevance, note, isBlank: true }];
  }

  /** A white page of these proportions. */
  blank(width, height) {
    const scale = LONGEST / Math.max(width, height);
    const sides = within(width * scale, height * scale);
    if (!this.blanks.has(String(sides))) {
      const canvas = new OffscreenCanvas(...sides);
      const context = canvas.getContext("2d");
      context.fillStyle = "#fff";
      context.fillRect(0, 0, ...sides);
      this.blanks.set(String(sides), canvas.transferToImageBitmap());
    }
    return this.blanks.get(String(sides));
  }

  close() {
    super.close();
    for (const blank of this.blanks.values()) blank.close();
  }
}
