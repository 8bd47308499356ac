// Show the image, or the frames of a video as a strip, in the view that the visitor chose; two settings side by side.
import { byId, element } from "./dom.js";
import { draw, drawMap } from "./heat.js";
import { allLookedAt, lookedAt, VIEWS } from "./words.js";

let shown = { picture: null, runs: [], looks: [] };
let view = "map";

/** Show a picture; `runs` are the settings that were asked about it, with what they looked at. */
export function show(picture, asked = []) {
  const runs = asked.filter((run) => run.looks.length);
  const looks = runs.flatMap((run) => run.looks.map((look) => ({ ...look, label: labelOf(run, look, runs.length > 1) })));
  shown = { picture, runs, looks: looks.length ? looks : [{ bitmap: picture.bitmap, label: "" }] };
  byId("stage").replaceChildren(...shown.looks.map(figure));
  byId("stage").classList.toggle("strip", runs.some((run) => run.looks.length > 1));
  const first = looks.find((look) => look.relevance);
  byId("views").hidden = byId("strength-row").hidden = !first;
  if (first) showSmallMaps(first);
  drawAll();
}

const labelOf = (run, look, named) => [named ? run.label : "", look.label].filter(Boolean).join(", ");

function figure({ label }) {
  const made = element("figure", {}, element("canvas", { role: "img" }));
  if (label) made.append(element("figcaption", { text: label }));
  return made;
}

function drawAll() {
  const { picture, runs, looks } = shown;
  if (!picture) return;
  const strength = Number(byId("strength").value);
  byId("stage").querySelectorAll("canvas").forEach((canvas, index) => {
    const { bitmap, label, relevance } = looks[index];
    draw(canvas, bitmap, view, relevance, strength);
    const looked = relevance && view !== "image" ? ` ${VIEWS[view].label}. ${lookedAt(relevance)}` : "";
    canvas.setAttribute("aria-label", `${[picture.description, label].filter(Boolean).join(", ")}.${looked}`);
  });
  byId("caption").textContent = runs.length ? `${VIEWS[view].meaning} ${told(runs)}` : picture.description;
  const hasColours = view !== "image" && view !== "levels";
  byId("strength-row").hidden = !runs.length || !hasColours;
}

function told(runs) {
  if (runs.length === 1) return allLookedAt(runs[0].looks);
  return runs.map((run) => `${run.name}: ${allLookedAt(run.looks)}`).join(" ");
}

/** A small map beside the name of each view that there is: a frame has no scores. */
function showSmallMaps({ bitmap, relevance }) {
  for (const canvas of byId("views").querySelectorAll("canvas")) {
    const { map, scores } = relevance;
    const name = canvas.dataset.view;
    const isThere = ["image", "map", "levels"].includes(name) || Boolean(scores);
    canvas.parentElement.hidden = !isThere;
    if (!isThere && view === name) byId("views").querySelector("[value=map]").click();
    if (!isThere) continue;
    if (name === "map") drawMap(canvas, map);
    else if (scores && name in scores) drawMap(canvas, scores[name]);
    else draw(canvas, bitmap, name, relevance, 1);
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
