// What the loaded model knows, by its card, and the examples.
import { addressOf, fileAt } from "./api.js";
import { byId, element } from "./dom.js";
import { EXAMPLES } from "./examples.js";

const KINDS = {
  colour: "what colour",
  shape: "which shape",
  size: "how large",
  count: "how many",
  exist: "is there",
  relation: "where to each other",
  read: "what is written",
};

/** Tell the card in plain words. */
export function describe(card) {
  const { knows, knows_clips: clips, architecture, parameters, accuracy_in_pytorch: accuracy } = card.metadata;
  const told = [
    element("p", { text: knows ?? "The card of this model does not say what it was trained on. Ask its operator." }),
    ...(clips ? [element("p", { text: clips })] : []),
  ];
  const scores = accuracy?.new?.adaptive;
  if (scores) {
    const rows = Object.entries(KINDS)
      .filter(([kind]) => scores[kind])
      .map(([kind, words]) => element("li", { text: `${words} ${percent(scores[kind].accuracy)}` }));
    told.push(
      element("p", { class: "small", id: "right-title", text: "Right answers about new scenes of its world:" }),
      element("ul", { class: "chips", "aria-labelledby": "right-title" }, ...rows),
    );
  }
  const size = parameters?.model ? `, ${(parameters.model / 1e6).toFixed(1)} million parameters` : "";
  const kind = architecture ? ` (${architecture}${size})` : "";
  const untrained = card.allocator_trained ? "" : " Its allocator is not trained: relevance does not depend on the question.";
  told.push(element("p", { class: "small", text: `Loaded: ${card.id}${kind}.${untrained}` }));
  byId("knows").replaceChildren(...told);
  byId("model").hidden = false;
}

const percent = (share) => `${(100 * share).toFixed(share === 1 ? 0 : 1)} %`;

/** Show the examples; `chosen` gets the file and the example, `failed` the error. */
export function showExamples(chosen, failed) {
  const items = EXAMPLES.map((example) => {
    const image = element("img", { src: addressOf(`page/${example.file}`), alt: example.alt, width: 96, height: 96 });
    const button = element("button", { type: "button", "aria-pressed": "false", title: example.alt }, image);
    button.addEventListener("click", () =>
      fileAt(`page/${example.file}`).then((file) => chosen(file, example), failed),
    );
    return element("li", {}, button);
  });
  byId("examples").replaceChildren(...items);
}

/** Mark the example that is on the stage, and show its questions; `ask` gets the one that is chosen. */
export function showQuestions(example, ask) {
  byId("examples").querySelectorAll("button").forEach((button, index) => {
    button.setAttribute("aria-pressed", String(EXAMPLES[index] === example));
  });
  const buttons = (example?.questions ?? []).map((question) =>
    element("li", {}, element("button", { type: "button", text: question, on: { click: () => ask(question) } })),
  );
  byId("suggestions").replaceChildren(...buttons);
  byId("hint").textContent = example?.hint ?? "";
  byId("suggested").hidden = !buttons.length;
}
