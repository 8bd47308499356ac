// Take a file that is dropped, pasted, chosen or photographed, and read it as what it is.
import { byId } from "./dom.js";
import { MovingImage, Video } from "./film.js";
import { kindOf } from "./kinds.js";
import { PagedFile } from "./paged.js";
import { Picture } from "./picture.js";

/** The file is not one that this browser can show, or that has pages. */
export class NotAnImage extends Error {}

/** Read a file. Throws NotAnImage. */
export async function pictureOf(file, example = null) {
  try {
    const { kind, type, format } = await kindOf(file);
    if (kind === "document") return await PagedFile.of(file, format);
    if (kind === "animation") return await MovingImage.of(file, type);
    return await Picture.of(file, example).catch(() => Video.of(file));
  } catch {
    throw new NotAnImage(
      `${file.name || "This file"} is not an image or a video that this page can show. Choose a PNG, JPEG, WebP or GIF, `
        + "an MP4 or WebM, or a PDF or TIFF.",
    );
  }
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
