// The list of questions with their answers, newest first: text, facts, timings, tensions, and the request as code.
import { byId, element } from "./dom.js";
import { copy, LANGUAGES } from "./code.js";
import { tensionsInWords } from "./words.js";

/** One question about a picture, or about a page of it, and a run for each setting. */
export class Entry {
  constructor(picture, question, page, settings, onShow) {
    this.picture = picture;
    this.page = page; // of a PDF or a TIFF, else null
    this.question = question;
    const named = settings.length > 1;
    this.runs = settings.map((setting) => new Run(setting, { question, ...(page && { page }) }, picture, named));
    this.showButton = element("button", { type: "button", text: `Show on the ${picture.shownOn}`, "aria-pressed": "false", hidden: true });
    this.showButton.addEventListener("click", () => onShow(this));
    const about = page ? [element("p", { class: "small", text: `Page ${page} of ${picture.name}` })] : [];
    const runs = element("div", { class: "runs" }, ...this.runs.map((run) => run.place));
    this.place = element("li", { class: "card entry" }, element("h3", { text: question }), ...about, runs, this.showButton);
    byId("answers-title").hidden = false;
    byId("answers").prepend(this.place);
  }

  /** Whether the stage shows this entry. */
  set shown(is) {
    this.showButton.hidden = !this.runs.some((run) => run.looks.length);
    this.showButton.setAttribute("aria-pressed", String(is));
    this.showButton.textContent = `${is ? "Shown" : "Show"} on the ${this.picture.shownOn}`;
    this.place.classList.toggle("shown", is);
  }
}

/** One setting's answer to a question. */
export class Run {
  constructor(setting, asked, picture, named) {
    this.fields = { ...asked, ...setting.fields };
    this.name = setting.name;
    this.label = `${setting.name}: ${setting.words}`;
    this.file = { name: picture.name, field: picture.field };
    this.end = null; // the fields of the answer
    this.looks = []; // after that: {bitmap, label, relevance} of the image, or of each frame
    this.text = element("p", { class: "answer", "aria-busy": "true" });
    this.below = element("div");
    const isPlain = !named && !Object.keys(setting.fields).length;
    const label = element("p", { class: "small", text: named ? this.label : setting.words, hidden: isPlain });
    this.place = element("section", { class: "run", "aria-label": named ? this.label : "Answer" }, label, this.text, this.below);
  }

  get answer() {
    return this.text.textContent;
  }

  add(delta) {
    this.text.append(delta);
  }

  get isFinished() {
    return this.end !== null;
  }

  /** The answer is complete: `end` has its fields without the text. */
  finish(end) {
    this.end = end;
    const relevance = end.relevance?.[0] ?? end.vision.frames?.[0]?.relevance;
    const why = relevance ? [tensions(relevance.tensions)] : [];
    this.below.replaceChildren(facts(end), timings(end.timing_ms), ...why, code(this));
    this.stop();
  }

  /** Say more below the answer. */
  tell(text) {
    this.below.prepend(element("p", { class: "small", text }));
  }

  /** No more text comes. */
  stop(why = "") {
    this.text.setAttribute("aria-busy", "false");
    this.text.hidden = !this.answer;
    if (why) this.below.replaceChildren(element("p", { class: "small", text: why }));
  }
}

function facts({ vision, finish_reason: reason }) {
  const said = [
    vision.cache === "hit" ? "features from the cache" : `${vision.frames ? "frames" : "image"} encoded anew`,
    `${vision.vision_tokens} vision tokens`,
    `${vision.visual_tokens} visual tokens`,
    `detail ${vision.detail}`,
    ...(vision.frames ? [`${vision.frames.length} frames`] : []),
    ...(vision.fit === "squash" ? [] : [`fit ${vision.fit}`]),
  ];
  if (vision.reduced) said.push("looked less closely because of load");
  if (reason === "length") said.push("cut at the longest answer");
  const chips = said.map((text) => element("li", { text }));
  if (vision.cache === "hit") chips[0].className = "good";
  return element("ul", { class: "chips facts", "aria-label": "Facts" }, ...chips);
}

function timings(ms) {
  const seen = ms.queue + ms.load + ms.vision;
  const parts = [
    ["queue", ms.queue],
    ["load", ms.load],
    ["vision", ms.vision],
    ["first token", Math.max(0, ms.first_token - seen)],
    ["other tokens", Math.max(0, ms.total - Math.max(ms.first_token, seen))],
  ];
  const bar = element("div", { class: "bar", "aria-hidden": "true" });
  const list = element("ul", { class: "key" });
  parts.forEach(([name, value], index) => {
    const part = element("span", { class: `part-${index}` });
    part.style.flexGrow = value; // through the object model, which the policy allows
    bar.append(part);
    list.append(element("li", { class: `part-${index}`, text: `${name} ${inMs(value)}` }));
  });
  return element("div", { class: "timings" }, element("p", { class: "small", text: `Answered in ${inMs(ms.total)}` }), bar, list);
}

function inMs(value) {
  if (value >= 1000) return `${(value / 1000).toFixed(1)} s`;
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
}

function tensions(values) {
  const rows = tensionsInWords(values).map(({ low, high, value, words }) => {
    const mark = element("span", { class: "mark" });
    mark.style.left = `${value * 100}%`;
    return element(
      "li",
      {},
      element("span", { class: "end", text: low }),
      element("span", { class: "track", "aria-hidden": "true" }, mark),
      element("span", { class: "end", text: high }),
      element("span", { class: "words", text: `${value.toFixed(2)}: ${words}` }),
    );
  });
  return element("details", {}, element("summary", { text: "Why it looked there" }), element("ul", { class: "tensions" }, ...rows));
}

/** The request in one language at a time. */
function code(run) {
  const text = element("code");
  const request = { file: run.file, fields: { ...run.fields, stream: true, explain: true } };
  const buttons = Object.entries(LANGUAGES).map(([name, write]) => {
    const button = element("button", { type: "button", text: name });
    button.addEventListener("click", () => {
      text.textContent = write(request);
      for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
    });
    return button;
  });
  buttons[0].click();
  const copyButton = element("button", { type: "button", class: "copy", text: "Copy" });
  copyButton.addEventListener("click", async () => {
    await copy(text);
    copyButton.textContent = "Copied";
    byId("said").textContent = "Copied.";
  });
  const bar = element("div", { class: "languages", role: "group", "aria-label": "Language" }, ...buttons, copyButton);
  const block = element("pre", { tabindex: "0", "aria-label": "The request as code" }, text);
  return element("details", { class: "code" }, element("summary", { text: "The same request as code" }), bar, block);
}
