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
  shown = { picture, runs, looks: looks.length ? looks : [picture.atFirst] };
  byId("stage").replaceChildren(...shown.looks.map(figure));
  byId("stage").classList.toggle("strip", runs.some((run) => run.looks.length > 1));
  const first = looks.find((look) => look.relevance);
  byId("views").hidden = byId("strength-row").hidden = !first;
  if (first) showSmallMaps(first);
  drawAll();
}

const labelOf = (run, look, named) => [named ? run.label : "", look.label].filter(Boolean).join(", ");

function figure({ bitmap, label, moving, words }) {
  const { name, description } = shown.picture;
  if (!bitmap) {
    return element("div", { class: "empty" }, element("p", {}, element("strong", { text: name })), element("p", { text: words }));
  }
  const canvas = element("canvas", { role: "img" });
  const made = element("figure", {}, canvas);
  if (label) made.append(element("figcaption", { text: label }));
  if (moving) made.append(...motion(canvas, element("img", { src: moving, alt: `${description}, moving` }), bitmap));
  return made;
}

/** An image that moves in place of a canvas, and a button that lets it rest. It rests at first if the visitor likes that. */
function motion(canvas, image, { width, height }) {
  image.style.setProperty("--shape", width / height);
  const button = element("button", { type: "button" });
  const move = (is) => {
    image.hidden = !is;
    canvas.hidden = is;
    button.textContent = is ? "Pause" : "Play";
  };
  button.addEventListener("click", () => move(image.hidden));
  move(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  return [image, button];
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
  const notes = [...new Set(looks.map(({ note }) => note))].filter(Boolean);
  const isNamed = looks.some(({ words }) => words); // in place of the picture
  const untold = isNamed ? "" : picture.description;
  byId("caption").textContent = runs.length ? [...notes, VIEWS[view].meaning, told(runs)].join(" ") : untold;
  const hasColours = view !== "image" && view !== "levels";
  byId("strength-row").hidden = !runs.length || !hasColours;
}

function told(runs) {
  if (runs.length === 1) return allLookedAt(runs[0].looks);
  return runs.map((run) => `${run.name}: ${allLookedAt(run.looks)}`).join(" ");
}

/** A small map beside the name of each view that there is: a frame has no scores, and some pages have no image. */
function showSmallMaps({ bitmap, relevance, isBlank }) {
  for (const canvas of byId("views").querySelectorAll("canvas")) {
    const { map, scores } = relevance;
    const name = canvas.dataset.view;
    const isThere = name === "image" ? !isBlank : ["map", "levels"].includes(name) || Boolean(scores);
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
