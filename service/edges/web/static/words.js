// Say in plain words what a picture of numbers says, and what an error means.
import { Refused, Unreachable } from "./api.js";

const ROWS = ["top", "middle", "bottom"];
const COLUMNS = ["left", "centre", "right"];

/** The place of the highest value of a square map, such as "top left". */
export function placeOfPeak(map) {
  const side = map.length;
  let best = { value: -1, row: 0, column: 0 };
  for (let row = 0; row < side; row++) {
    for (let column = 0; column < side; column++) {
      if (map[row][column] > best.value) best = { value: map[row][column], row, column };
    }
  }
  const third = (index) => Math.floor((index * 3) / side);
  const place = [ROWS[third(best.row)], COLUMNS[third(best.column)]].join(" ");
  return place === "middle centre" ? "centre" : place;
}

/** What an answer's relevance says, for eyes and for screen readers. */
export function lookedAt({ map, levels }) {
  const cells = levels.flat();
  const closely = cells.filter((level) => level > 0).length;
  const closest = cells.filter((level) => level === 2).length;
  const leftOut = cells.filter((level) => level < 0).length;
  const twice = closest ? `, ${closest} of them at twice the resolution` : "";
  const without = leftOut ? ` ${leftOut} left out.` : "";
  return `Most relevant: ${placeOfPeak(map)}. ${closely} of ${cells.length} cells seen closely${twice}.${without}`;
}

/** What was looked at: one image, or the frames of a video. */
export function allLookedAt(looks) {
  if (!looks.length) return "";
  return looks.length === 1 && looks[0].relevance ? lookedAt(looks[0].relevance) : `${looks.length} frames looked at.`;
}

export const VIEWS = {
  image: { label: "Image", meaning: "As it was sent." },
  map: { label: "Relevance", meaning: "How much each place matters for this question, all three ways together." },
  propositional: { label: "Propositional", meaning: "How much is there: detail that any question could need." },
  perspectival: { label: "Perspectival", meaning: "What stands out to the vision encoder." },
  participatory: { label: "Participatory", meaning: "What this question asks about." },
  levels: {
    label: "Levels",
    meaning:
      "Pale cells are one token each. Clear cells are seen closely, with a line around each token. Grey cells are left out.",
  },
};

const TENSIONS = {
  particularize: ["compress", "spends few tokens", "spends many tokens"],
  explore: ["exploit", "looks where relevance is highest", "looks around, too"],
  diversify: ["focus", "looks at neighbouring places together", "looks at separate places"],
};

/** Each tension -> {low, high, value, words}. */
export function tensionsInWords(tensions) {
  return Object.entries(tensions).map(([high, value]) => {
    const [low, lowWords, highWords] = TENSIONS[high] ?? ["less", "", ""];
    if (Math.abs(value - 0.5) < 0.05) return { low, high, value, words: "balanced" };
    return { low, high, value, words: value > 0.5 ? highWords : lowWords };
  });
}

const TITLES = {
  400: "The service cannot use this",
  401: "The service does not know this key",
  403: "The key does not allow this",
  404: "The service no longer has this file",
  408: "The upload was too slow",
  413: "This is too large",
  415: "The service cannot use this",
  429: "The service is full",
  500: "The service made a mistake",
  503: "The service is not ready",
  504: "The answer took too long",
};
const CODES = {
  invalid_image: "This file is not an image or a video that the service reads",
  page_not_found: "The document has no such page",
  shutting_down: "The service is stopping",
};

/** An error -> {title, text, retryAfterS}. */
export function troubleInWords(error) {
  if (error instanceof Unreachable) {
    return {
      title: "The service does not answer",
      text: "Check that it runs (make serve) and that this device reaches it. Then ask again.",
      retryAfterS: 0,
    };
  }
  if (error instanceof Refused) {
    const title = CODES[error.code] ?? TITLES[error.status] ?? "The answer broke off";
    return { title, text: sentence(error.message), retryAfterS: error.retryAfterS };
  }
  return { title: "This page made a mistake", text: sentence(error.message), retryAfterS: 0 };
}

function sentence(text) {
  if (!text) return "It gave no reason. Ask again; if it stays, tell the operator.";
  return text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
