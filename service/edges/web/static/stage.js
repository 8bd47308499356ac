// Show the image: one figure, or two side by side, in the view that the visitor chose.
import { byId, element } from "./dom.js";
import { draw, drawMap } from "./heat.js";
import { lookedAt, VIEWS } from "./words.js";

let shown = { picture: null, runs: [] };
let view = "map";

/** Show an image; `runs` are the settings that were asked about it, with their relevance. */
export function show(picture, runs = []) {
  shown = { picture, runs: runs.filter((run) => run.relevance) };
  const looks = shown.runs.length ? shown.runs : [{ label: "", relevance: null }];
  byId("stage").replaceChildren(...looks.map((run) => figure(picture, run, looks.length > 1)));
  const hasMap = shown.runs.length > 0;
  byId("views").hidden = byId("strength-row").hidden = !hasMap;
  if (hasMap) showSmallMaps();
  drawAll();
}

function figure(picture, run, named) {
  const canvas = element("canvas", { role: "img" });
  const made = element("figure", {}, canvas);
  if (named) made.append(element("figcaption", { text: run.label }));
  return made;
}

function drawAll() {
  const { picture, runs } = shown;
  if (!picture) return;
  const strength = Number(byId("strength").value);
  byId("stage").querySelectorAll("canvas").forEach((canvas, index) => {
    const relevance = runs[index]?.relevance;
    draw(canvas, picture.bitmap, view, relevance, strength);
    const looked = relevance && view !== "image" ? ` ${VIEWS[view].label}. ${lookedAt(relevance)}` : "";
    canvas.setAttribute("aria-label", `${picture.description}.${looked}`);
  });
  byId("caption").textContent = runs.length ? `${VIEWS[view].meaning} ${looks(runs)}` : picture.description;
  const hasColours = view !== "image" && view !== "levels";
  byId("strength-row").hidden = !runs.length || !hasColours;
}

function looks(runs) {
  if (runs.length === 1) return lookedAt(runs[0].relevance);
  return runs.map((run) => `${run.name}: ${lookedAt(run.relevance)}`).join(" ");
}

/** A small map beside the name of each view. */
function showSmallMaps() {
  const { picture, runs } = shown;
  for (const canvas of byId("views").querySelectorAll("canvas")) {
    const { map, scores } = runs[0].relevance;
    const name = canvas.dataset.view;
    if (name === "map") drawMap(canvas, map);
    else if (name in scores) drawMap(canvas, scores[name]);
    else draw(canvas, picture.bitmap, name, runs[0].relevance, 1);
  }
}

/** Make the choice of views. */
export function start() {
  const choices = Object.entries(VIEWS).map(([name, { label }]) => {
    const input = element("input", { type: "radio", name: "view", value: name, checked: name === view, class: "hidden" });
    input.addEventListener("change", () => {
      view = name;
      drawAll();
    });
    return element("label", {}, input, element("canvas", { "data-view": name, "aria-hidden": "true" }), label);
  });
  byId("views").append(...choices);
  byId("strength").addEventListener("input", drawAll);
}
