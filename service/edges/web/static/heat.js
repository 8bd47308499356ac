// Draw an image, a heat map over it, or the levels of detail, on a canvas.

// Viridis: its lightness rises evenly, so colour-blind eyes and grey screens read it too.
const RAMP = [
  [68, 1, 84], [72, 36, 117], [65, 68, 135], [53, 95, 141], [42, 120, 142], [33, 145, 140],
  [34, 168, 132], [68, 191, 112], [122, 209, 81], [189, 223, 38], [253, 231, 37],
];
export const LONGEST = 896; // pixels of a canvas's longer side
const FAINT = 0.45; // opacity of what is not relevant, so that the image stays readable
const VEIL = "rgb(255 255 255 / 0.72)"; // over a cell of one token
const LEFT_OUT = "rgb(128 128 128 / 0.9)"; // over a cell without one
const INK = "#1a1a1a";

/** A value in [0, 1] -> [red, green, blue]. */
export function colourOf(value) {
  const place = Math.min(1, Math.max(0, value)) * (RAMP.length - 1);
  const below = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[below].map((part, index) => Math.round(part + (RAMP[below + 1][index] - part) * (place - below)));
}

/** A canvas with one pixel a value; `opacityOf` gives 0 to 255. */
function heat(values, opacityOf = () => 255) {
  const side = values.length;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const pixels = new ImageData(side, side);
  values.flat().forEach((value, index) => pixels.data.set([...colourOf(value), opacityOf(value)], 4 * index));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

/** Draw a map alone, small. */
export function drawMap(canvas, values) {
  canvas.width = canvas.height = 64;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(heat(values), 0, 0, 64, 64);
}

/** Draw one of VIEWS. Without a relevance it is the image. `strength`: the opacity of the colours. */
export function draw(canvas, bitmap, view, relevance, strength) {
  const scale = LONGEST / Math.max(bitmap.width, bitmap.height);
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // the service makes transparent parts white
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  if (!relevance || view === "image") return;
  const place = placeOf(context.canvas, relevance.area);
  if (view === "levels") drawLevels(context, relevance.levels, place);
  else drawHeat(context, view === "map" ? relevance.map : relevance.scores[view], place, strength);
}

/** Where the model's square lies on the canvas. Padding lies outside. */
function placeOf({ width, height }, [left, top, right, bottom]) {
  return { x: left * width, y: top * height, width: (right - left) * width, height: (bottom - top) * height };
}

/** Colours over a grey image, so that colour means relevance alone. */
function drawHeat(context, values, place, strength) {
  const { width, height } = context.canvas;
  context.globalCompositeOperation = "saturation";
  context.fillStyle = "#808080";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "source-over";
  context.globalAlpha = strength;
  context.drawImage(heat(values, (value) => 255 * (FAINT + (1 - FAINT) * value)), place.x, place.y, place.width, place.height);
  context.globalAlpha = 1;
}

function drawLevels(context, levels, place) {
  const wide = place.width / levels[0].length;
  const high = place.height / levels.length;
  context.save();
  context.translate(place.x, place.y);
  levels.forEach((row, y) =>
    row.forEach((level, x) => {
      const [left, top] = [x * wide, y * high];
      context.strokeStyle = level > 0 ? INK : "rgb(0 0 0 / 0.25)";
      context.lineWidth = 1;
      if (level <= 0) {
        context.fillStyle = level === 0 ? VEIL : LEFT_OUT;
        context.fillRect(left, top, wide, high);
      }
      if (level < 0) return;
      const parts = 2 ** level;
      for (let i = 0; i < parts; i++) {
        for (let j = 0; j < parts; j++) {
          context.strokeRect(left + (i * wide) / parts, top + (j * high) / parts, wide / parts, high / parts);
        }
      }
    }),
  );
  context.lineWidth = 4;
  context.strokeStyle = INK;
  levels.forEach((row, y) =>
    row.forEach((level, x) => level === 2 && context.strokeRect(x * wide, y * high, wide, high)),
  );
  context.restore();
}
