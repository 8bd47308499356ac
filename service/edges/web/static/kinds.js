// Tell from a file's first bytes whether it moves or has pages, as the service does.

const HEAD_BYTES = 1024; // the service searches a PDF's mark within them
const GIF_BYTES = 20_000_000; // that are walked through; the service's usual limit of a file
const TIFF = /^(II[*+]\0|MM\0[*+])/;
const MOVING_WEBP = /^RIFF.{4}WEBPVP8X.{4}(.)/s; // behind its size, the flags
const MOVES = 2; // of these flags
const OTHERS = /^(\x89PNG|\xff\xd8|GIF8|RIFF|BM|.{4}ftyp)/s; // may hold a PDF's mark by chance
const GIF_EXTENSION = 0x21;
const GIF_PICTURE = 0x2c;

/** A file -> {kind: "animation", type} or {kind: "document", format}, else {kind: "other"}. */
export async function kindOf(file) {
  const head = String.fromCharCode(...(await bytesOf(file, HEAD_BYTES)));
  if (TIFF.test(head)) return { kind: "document", format: "TIFF" };
  if (head.includes("%PDF-") && !OTHERS.test(head)) return { kind: "document", format: "PDF" };
  if (MOVING_WEBP.exec(head)?.[1].charCodeAt(0) & MOVES) return { kind: "animation", type: "image/webp" };
  const isMovingGif = /^GIF8[79]a/.test(head) && hasTwoPictures(await bytesOf(file, GIF_BYTES));
  return isMovingGif ? { kind: "animation", type: "image/gif" } : { kind: "other" };
}

/** The first bytes; none of a file that cannot be read, such as a folder. */
async function bytesOf(file, most) {
  return new Uint8Array(await file.slice(0, most).arrayBuffer().catch(() => new ArrayBuffer(0)));
}

/** Walk a GIF from block to block: what a picture or a comment holds is never taken for a block. */
function hasTwoPictures(bytes) {
  let offset = 13 + coloursOf(bytes[10]);
  let pictures = 0;
  while (bytes[offset] === GIF_EXTENSION || bytes[offset] === GIF_PICTURE) {
    if (bytes[offset] === GIF_EXTENSION) offset += 2;
    else if (++pictures === 2) return true;
    else offset += 11 + coloursOf(bytes[offset + 9]);
    while (bytes[offset] > 0) offset += 1 + bytes[offset]; // pieces behind their lengths; 0 ends them
    offset += 1;
  }
  return false;
}

/** The bytes of a table of colours, which these flags tell. */
const coloursOf = (flags) => (flags & 0x80 ? 3 << ((flags & 7) + 1) : 0);
