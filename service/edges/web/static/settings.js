// The controls of a setting: detail, budgets, and frames of a video. What is left empty is the model's own.
import { byId, element } from "./dom.js";

const DETAILS = {
  low: "low: the image at 224 pixels",
  auto: "auto: closer if the question needs it",
  high: "high: also at 448 pixels",
};

const FITS = {
  "": "the model's own",
  squash: "squash: change its proportions",
  pad: "pad: keep its proportions",
  tiles: "tiles: the whole, then the part that matters",
  auto: "auto: tiles beyond 1.5 to 1, else squash",
};

const MOST_FRAMES = 32; // of a video, that a question can ask for
const ONLY_LOW = "Frames of a video are seen at detail low, and squashed.";

/** One setting's controls in `place`. */
class Setting {
  constructor(place, name, card) {
    this.card = card;
    this.place = place;
    const details = card.closer_view ? DETAILS : { low: DETAILS.low };
    const options = Object.entries(details).map(([value, text]) => element("option", { value, text }));
    this.detail = element("select", { id: `detail-${name}` }, ...options);
    this.detail.addEventListener("change", () => this.showLimits());
    const fits = Object.entries(FITS).map(([value, text]) => element("option", { value, text }));
    this.fit = element("select", { id: `fit-${name}` }, ...fits);
    this.vision = new Range(`vision-${name}`, "Vision tokens", "read by the Q-Former", 1);
    this.visual = new Range(`visual-${name}`, "Visual tokens", "read by the LLM", 32);
    const row = element("p", { class: "control" }, element("label", { for: `detail-${name}`, text: "Detail" }), this.detail);
    const fit = element("p", { class: "control" }, element("label", { for: `fit-${name}`, text: "Image not square" }), this.fit);
    this.whyNot = element("p", { class: "small", id: `why-not-${name}`, text: ONLY_LOW, hidden: true });
    for (const select of [this.detail, this.fit]) select.setAttribute("aria-describedby", this.whyNot.id);
    const frames = { id: `frames-${name}`, type: "number", min: 1, max: MOST_FRAMES, step: 1, inputmode: "numeric" };
    this.frames = element("input", { ...frames, placeholder: card.video_frames });
    const framesLabel = element("label", { for: this.frames.id, text: `Frames at most (1 to ${MOST_FRAMES})` });
    this.framesRow = element("p", { class: "control" }, framesLabel, this.frames);
    this.legend = element("legend", { text: "Setting" });
    place.replaceChildren(
      element("fieldset", { class: "setting" }, this.legend, row, fit, this.whyNot, this.framesRow, this.vision.row, this.visual.row),
    );
    this.name = name.toUpperCase();
    this.about(false);
  }

  showLimits() {
    const { budget, clip, closer_view: closer, default_visual_tokens: visual } = this.card;
    const closely = closer && !this.isVideo && this.detail.value !== "low";
    const vision = closely ? closer.vision_tokens : budget.vision_tokens;
    this.vision.allow(vision, vision);
    if (this.isVideo && clip) this.visual.allow([clip.visual_tokens, clip.visual_tokens], [clip.visual_tokens, clip.visual_tokens]);
    else this.visual.allow(budget.visual_tokens, visual);
  }

  /** Say whether the question is about a video, which has neither a closer view nor a fit. */
  about(isVideo) {
    this.isVideo = isVideo;
    this.detail.disabled = this.fit.disabled = isVideo;
    this.frames.disabled = !isVideo;
    this.whyNot.hidden = this.framesRow.hidden = !isVideo;
    this.showLimits();
  }

  /** A first choice that differs from the model's own. */
  lookElsewise() {
    if (this.card.closer_view && !this.isVideo) this.detail.value = "high";
    else this.vision.most.value = this.card.budget.vision_tokens[0];
    this.showLimits();
  }

  /** The fields of a question that this setting changes. */
  get fields() {
    const budget = {};
    if (this.vision.value) budget.vision_tokens = this.vision.value;
    if (this.visual.value) budget.visual_tokens = this.visual.value;
    const fields = {};
    if (!this.isVideo && this.detail.value !== "low") fields.detail = this.detail.value;
    if (!this.isVideo && this.fit.value) fields.fit = this.fit.value;
    if (this.isVideo && this.frames.value) fields.video_frames = Number(this.frames.value);
    if (Object.keys(budget).length) fields.budget = budget;
    return fields;
  }

  /** In a few words, such as "detail high, 64 to 128 vision tokens". */
  get words() {
    const words = [`detail ${this.isVideo ? "low" : this.detail.value}`];
    if (!this.isVideo && this.fit.value) words.push(`fit ${this.fit.value}`);
    if (this.isVideo && this.frames.value) words.push(`${this.frames.value} frames at most`);
    for (const [range, what] of [[this.vision, "vision tokens"], [this.visual, "visual tokens"]]) {
      if (range.value) words.push(`${[...new Set(range.value)].join(" to ")} ${what}`);
    }
    return words.join(", ");
  }
}

/** The least and the most of something; both may be empty. */
class Range {
  constructor(id, title, meaning, step) {
    const input = (end) => element("input", { id: `${id}-${end}`, type: "number", step, inputmode: "numeric" });
    [this.least, this.most] = [input("least"), input("most")];
    this.hint = element("span", { class: "small", id: `${id}-hint` });
    this.meaning = meaning;
    for (const end of [this.least, this.most]) end.setAttribute("aria-describedby", this.hint.id);
    this.row = element(
      "fieldset",
      { class: "range" },
      element("legend", { text: title }),
      element("label", { for: this.least.id, text: "at least" }),
      this.least,
      element("label", { for: this.most.id, text: "at most" }),
      this.most,
      this.hint,
    );
  }

  /** Set the allowed least and most, and those that are used if nothing is given. */
  allow([least, most], usual) {
    this.usual = usual;
    for (const [input, value] of [[this.least, usual[0]], [this.most, usual[1]]]) {
      input.min = least;
      input.max = most;
      input.placeholder = value;
    }
    this.hint.textContent = `${this.meaning}; ${least} to ${most}` + (this.least.step > 1 ? `, in steps of ${this.least.step}` : "");
  }

  get value() {
    if (!this.least.value && !this.most.value) return null;
    const least = this.least.value ? Number(this.least.value) : Math.min(this.usual[0], Number(this.most.value));
    return [least, this.most.value ? Number(this.most.value) : Math.max(this.usual[1], least)];
  }
}

/** Make the controls for this model -> the settings to ask with, and what is to be told when another file is taken. */
export function start(card) {
  const first = new Setting(byId("setting-a"), "a", card);
  const second = new Setting(byId("setting-b"), "b", card);
  const compare = byId("compare");
  const differ = () => {
    if (compare.checked && second.words === first.words) second.lookElsewise();
  };
  const showSecond = () => {
    byId("setting-b").hidden = !compare.checked;
    first.legend.textContent = compare.checked ? "Setting A" : "Setting";
    second.legend.textContent = "Setting B";
    differ();
  };
  compare.addEventListener("change", showSecond);
  showSecond();
  return {
    chosen: () => (compare.checked ? [first, second] : [first]),
    about(isVideo) {
      for (const setting of [first, second]) setting.about(isVideo);
      differ();
    },
  };
}
