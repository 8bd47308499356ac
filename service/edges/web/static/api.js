// Call the service: keep an image, ask a question as a stream, read the model card and the health.

/** An address of the service, which may stand behind a path. */
export const addressOf = (path) => new URL(path, document.baseURI).href;

/** The service answered with an error. */
export class Refused extends Error {
  constructor(status, { message, code }, retryAfterS) {
    super(message);
    this.status = status; // 0 if it came inside a stream
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

/** Nothing answered. */
export class Unreachable extends Error {}

let key = ""; // in this page's memory only: a reload forgets it

/** Use an API key from now on. An empty one is none. */
export function useKey(text) {
  key = text.trim();
}

/** Whether the service gets a key from this page. */
export const usesKey = () => Boolean(key);

async function call(path, options = {}) {
  let response;
  try {
    const headers = { ...options.headers, ...(key && { "x-api-key": key }) };
    response = await fetch(addressOf(path), { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Unreachable(error.message);
  }
  if (!response.ok) throw await refused(response);
  return response;
}

async function refused(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? { message: "", code: "" };
  return new Refused(response.status, error, Number(response.headers.get("retry-after")) || 0);
}

/** Send an image once -> {id, width, height, expires_at}. Throws Refused, Unreachable. */
export async function keepImage(file, signal) {
  const headers = { "content-type": "application/octet-stream" };
  return (await call("v1/images", { method: "POST", body: file, headers, signal })).json();
}

/** Ask -> yields {delta} for each piece of text, then the fields of the answer. Throws Refused, Unreachable. */
export async function* ask(fields, signal) {
  const headers = { "content-type": "application/json" };
  const body = JSON.stringify({ ...fields, stream: true, explain: true });
  const response = await call("v1/vqa", { method: "POST", body, headers, signal });
  for await (const text of events(response.body)) {
    if (text === "[DONE]") return;
    const event = JSON.parse(text);
    if (event.error) throw new Refused(0, event.error, 0);
    yield event;
  }
  throw new Unreachable("the stream ended before the answer did");
}

/** The data of each server-sent event. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new Unreachable(error.message);
      });
      if (done) return;
      text += value;
      const complete = text.split("\n\n");
      text = complete.pop();
      for (const event of complete) yield event.replace(/^data: ?/, "");
    }
  } finally {
    reader.cancel().catch(() => {}); // the stream may have ended already
  }
}

/** A file of the service. Throws Refused, Unreachable. */
export async function fileAt(path) {
  return new File([await (await call(path)).blob()], path.split("/").pop());
}

/** The card of the served model. Throws Refused, Unreachable. */
export async function model() {
  return (await (await call("v1/models?detail=full")).json()).data[0];
}

/** null if the service is ready, else its reasons in one line. Throws Unreachable. */
export async function notReady() {
  try {
    await call("health/ready");
    return null;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return "some models do not answer yet";
  }
}
