// A video, or an image that moves: a question looks at some of its frames.
import { bitmapOf, drawn, Picture } from "./picture.js";

const PRESENTED_MS = 200; // the longest that a frame may take after its seek
const WITHIN_S = 0.002; // the service rounds the time of a frame to milliseconds

class Film extends Picture {
  field = "video";
  noun = "Video";
  shownOn = "frames";
  frames = new Map(); // bitmaps by their indices, for all questions

  async looks({ end }, signal) {
    const looks = [];
    for (const { index, time_s: time = 0, relevance } of end.vision.frames ?? []) {
      if (!this.frames.has(index)) this.frames.set(index, await this.read(index, time, signal));
      looks.push({ bitmap: this.frames.get(index), label: `frame ${index}, ${time.toFixed(2)} s`, relevance });
    }
    return looks;
  }

  close() {
    super.close();
    for (const bitmap of this.frames.values()) bitmap.close();
  }
}

/** A short video. Its first frame is shown until a question has looked at some. */
export class Video extends Film {
  constructor(file, video, bitmap) {
    super(file, bitmap);
    this.video = video;
  }

  /** Read a file. Throws if the browser cannot play it. */
  static async of(file) {
    const video = document.createElement("video");
    video.muted = true;
    video.preload = "auto";
    try {
      await happened(video, "loadeddata", () => (video.src = URL.createObjectURL(file)));
      return new Video(file, video, shownBy(video));
    } catch (error) {
      URL.revokeObjectURL(video.src);
      throw error;
    }
  }

  /** The frame at a time. Throws if the video cannot be read there, or `signal` is aborted. */
  async read(index, time, signal) {
    const presented = presentation(this.video);
    await happened(this.video, "seeked", () => (this.video.currentTime = time + WITHIN_S), signal);
    await presented;
    return shownBy(this.video);
  }

  close() {
    super.close();
    URL.revokeObjectURL(this.video.src);
    this.video.removeAttribute("src");
    this.video.load();
  }
}

/** A GIF or a WebP that moves, and that is shown so until a question has looked at its frames. */
export class MovingImage extends Film {
  constructor(file, bitmap, type) {
    super(file, bitmap);
    this.type = type;
    this.url = URL.createObjectURL(file);
    this.decoder = null;
  }

  /** Read a file. Throws if the browser cannot draw it. */
  static async of(file, type) {
    return new MovingImage(file, await bitmapOf(file), type);
  }

  get atFirst() {
    return { bitmap: this.bitmap, label: "", moving: this.url };
  }

  /** The frame of an index. Throws if it cannot be read, if `signal` is aborted, or if the browser has no decoder. */
  async read(index, time, signal) {
    signal?.throwIfAborted();
    this.decoder ??= new ImageDecoder({ data: await this.file.arrayBuffer(), type: this.type });
    const { image } = await this.decoder.decode({ frameIndex: index });
    try {
      return drawn(image, image.displayWidth, image.displayHeight);
    } finally {
      image.close();
    }
  }

  close() {
    super.close();
    this.decoder?.close();
    URL.revokeObjectURL(this.url);
  }
}

const shownBy = (video) => drawn(video, video.videoWidth, video.videoHeight);

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
