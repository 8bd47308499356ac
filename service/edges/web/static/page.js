// The page: an image, a video or a document, a question, and the answer as it comes.
import * as api from "./api.js";
import { Entry } from "./answers.js";
import { byId, element } from "./dom.js";
import { NotAnImage, pictureOf, takeFiles } from "./files.js";
import * as model from "./model.js";
import * as settings from "./settings.js";
import * as stage from "./stage.js";
import { allLookedAt, troubleInWords } from "./words.js";

const LOOK_AGAIN_MS = 3000; // at a service that is not ready

let picture = null;
let card = null;
let chosenSettings = () => [{ name: "A", words: "detail low", fields: {} }]; // until the card is there
let fitSettings = () => {}; // to an image, or to a video
let running = null; // an AbortController
let failed = null; // the entry that the visitor can ask again
let takes = 0; // files that were brought so far
let nextLook = 0; // a timer's id
const entries = [];

/** Put an image on the stage. */
async function take(file, example = null) {
  clearTrouble();
  const take = (takes += 1);
  let found;
  try {
    found = await pictureOf(file, example);
  } catch (error) {
    if (!(error instanceof NotAnImage)) throw error;
    if (take !== takes) return;
    return showTrouble({ title: "Wrong file", text: error.message, retryAfterS: 0 });
  }
  if (take !== takes) return found.close(); // a later file was read sooner
  const before = picture;
  picture = found;
  byId("page").value = 1;
  showPicture();
  release(before);
  byId("said").textContent = `${picture.noun}: ${picture.description}.`;
}

/** Free a picture that is not shown and that no answer shows. */
function release(old) {
  const isAsked = (running && entries.at(-1).picture === old) || failed?.picture === old;
  const isNeeded = entries.some((each) => each.picture === old && each.runs.some((run) => run.looks.length));
  if (old && old !== picture && !isAsked && !isNeeded) old.close();
}

function showPicture(entry = null) {
  if (entry) picture = entry.picture;
  fitSettings(picture.field === "video");
  stage.show(picture, entry?.runs);
  for (const each of entries) each.shown = each === entry;
  model.showQuestions(picture.example, (question) => {
    byId("question").value = question;
    byId("form").requestSubmit();
  });
  showForeign();
  showPages();
}

/** Let the visitor choose a page, if there are some. How many, the service tells when it has the file. */
function showPages() {
  const { isPaged, pages } = picture;
  const input = byId("page");
  byId("page-row").hidden = input.disabled = !isPaged;
  if (pages) input.max = pages;
  else input.removeAttribute("max");
  byId("page-count").textContent = pages ? `of ${pages}` : "";
}

/** Say what an answer about an image of another world is worth. */
function showForeign() {
  byId("foreign").hidden = Boolean(picture.example) || !card?.metadata.knows;
  byId("foreign").textContent = "This model knows only scenes like the examples. Of another image it tells what it knows, "
    + "so its answer may mean nothing.";
}

/** Ask the question of the form with every chosen setting, one after the other. */
async function ask() {
  const question = byId("question").value.trim();
  if (!isAskable(question)) return;
  const page = picture.isPaged ? Number(byId("page").value) : null;
  await pursue(picture, question, page, chosenSettings().map(({ name, words, fields }) => ({ name, words, fields })));
}

/** Ask a question about a picture, which may no longer be the one on the stage. */
async function pursue(asked, question, page, settings) {
  if (running) return;
  const entry = new Entry(asked, question, page, settings, (shown) => {
    if (shown.page) byId("page").value = shown.page;
    showPicture(shown);
    byId("stage").scrollIntoView({ block: "nearest" });
  });
  entries.push(entry);
  running = new AbortController();
  clearTrouble();
  showRunning(true);
  try {
    for (const run of entry.runs) await answer(entry, run, running.signal);
  } catch (error) {
    for (const run of entry.runs) if (!run.isFinished) run.stop(error.name === "AbortError" ? "Stopped." : "No answer.");
    if (error.name !== "AbortError") {
      showTrouble(troubleInWords(error), () => pursue(asked, question, page, settings));
      failed = entry;
    }
    if (isAboutKey(error)) askForKey("");
    if (error instanceof api.Unreachable || error.status === 503) showHealth();
  } finally {
    running = null;
    showRunning(false);
    if (picture === entry.picture) showPages();
    release(entry.picture);
  }
}

async function answer(entry, run, signal) {
  await entry.picture.withId(async (image) => {
    for await (const event of api.ask({ [entry.picture.field]: image, ...run.fields }, signal)) {
      if (event.delta !== undefined) run.add(event.delta);
      else run.finish(event);
    }
  }, signal);
  if (!run.isFinished) return;
  try {
    run.looks = await entry.picture.looks(run, signal);
  } catch {
    run.tell(signal.aborted ? "Stopped before its frames were shown." : "This browser cannot show the frames of this video.");
  }
  if (picture === entry.picture) showPicture(entry);
  else entry.shown = false; // the visitor has taken another picture meanwhile
  const name = entry.runs.length > 1 ? ` ${run.name}` : "";
  byId("said").textContent = `Answer${name}: ${run.answer}. ${allLookedAt(run.looks)}`;
}

/** Whether there is all that a question needs; else say what is missing. */
function isAskable(question) {
  if (running) return false;
  const input = byId("question");
  const fault = question ? "" : "Write a question first.";
  byId("question-fault").textContent = fault;
  input.setAttribute("aria-invalid", String(Boolean(fault)));
  if (fault) {
    input.focus();
    return false;
  }
  if (!picture) {
    showTrouble({ title: "No image yet", text: "Drop, paste or choose an image, a video or a document, or take an example.", retryAfterS: 0 });
    return false;
  }
  for (const control of byId("settings").querySelectorAll("input")) {
    if (!control.closest("[hidden]:not(#settings)") && !control.checkValidity()) {
      byId("settings").open = true; // a control that is not shown cannot say what is wrong
      control.reportValidity();
      return false;
    }
  }
  return byId("page").reportValidity();
}

function showRunning(is) {
  byId("ask").disabled = is;
  byId("stop").hidden = !is;
  byId("form").setAttribute("aria-busy", String(is));
}

function clearTrouble() {
  byId("trouble").replaceChildren();
  const old = failed;
  failed = null;
  if (old) release(old.picture);
}

/** `again` is offered once the service has the time that it asked for. */
function showTrouble({ title, text, retryAfterS }, again) {
  const shown = [element("p", {}, element("strong", { text: title })), element("p", { text })];
  if (again) {
    const button = element("button", { type: "button", text: "Ask again", on: { click: again } });
    shown.push(button);
    if (retryAfterS) waitFor(button, Date.now() + 1000 * retryAfterS);
  }
  byId("trouble").replaceChildren(...shown);
}

function waitFor(button, until) {
  const left = Math.ceil((until - Date.now()) / 1000);
  button.disabled = left > 0;
  button.textContent = left > 0 ? `Ask again in ${left} s` : "Ask again";
  if (left > 0) setTimeout(() => waitFor(button, until), 250);
}

/** Show whether the service is ready; ask again until it is. */
async function showHealth() {
  clearTimeout(nextLook);
  const place = byId("health");
  try {
    const why = await api.notReady();
    if (!card && !(await showModel())) return;
    place.className = `health ${why ? "waiting" : "ready"}`;
    place.textContent = why ? `Not ready: ${why}` : `Ready: ${card.id}`;
    if (!why) return;
  } catch {
    place.className = "health down";
    place.textContent = "The service does not answer";
  }
  if (!document.hidden) nextLook = setTimeout(showHealth, LOOK_AGAIN_MS);
}

/** Returns whether the model could be described: not without a key that the service wants. */
async function showModel() {
  try {
    card = await api.model();
  } catch (error) {
    if (!isAboutKey(error)) throw error;
    askForKey(byId("key").value ? troubleInWords(error).text : "");
    return false;
  }
  byId("key-form").hidden = true;
  model.describe(card);
  ({ chosen: chosenSettings, about: fitSettings } = settings.start(card));
  fitSettings(picture?.field === "video");
  byId("settings").hidden = false;
  if (picture) showForeign();
  return true;
}

const isAboutKey = (error) => error instanceof api.Refused && error.status === 401;

function askForKey(fault) {
  byId("health").className = "health waiting";
  byId("health").textContent = "The service needs a key";
  byId("key-form").hidden = false;
  for (const link of document.querySelectorAll("nav [data-needs-key]")) link.hidden = true; // a link sends no key
  byId("key-fault").textContent = fault;
}

stage.start();
model.showExamples(take, (error) => showTrouble(troubleInWords(error)));
takeFiles(take);
byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.useKey(byId("key").value);
  card = null;
  showHealth();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("question").addEventListener("input", () => {
  byId("question-fault").textContent = "";
  byId("question").setAttribute("aria-invalid", "false");
});
addEventListener("visibilitychange", () => document.hidden || showHealth());
await showHealth();
