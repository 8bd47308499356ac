// Ask from JavaScript, as Node 18 or a browser: node examples/javascript_fetch.mjs [URL]
import { readFile } from "node:fs/promises";

const url = process.argv[2] ?? "http://127.0.0.1:8080";
const scene = await readFile("benchmarks/scenes/new_003.webp");

async function call(path, body, headers = {}) {
  const response = await fetch(url + path, { method: "POST", body, headers });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

const ask = (question) => call("/v1/vqa", JSON.stringify(question), { "content-type": "application/json" });

const { id: image } = await (await call("/v1/images", scene)).json();

const answer = await (await ask({ image, question: "what character is on the pink square?" })).json();
console.log(answer.answer, answer.vision.vision_tokens);

// An answer as it is written: each event is a line "data: ...", and an empty line ends it.
const stream = (await ask({ image, question: "describe the image.", stream: true })).body;
let waiting = "";
for await (const piece of stream.pipeThrough(new TextDecoderStream())) {
  const events = (waiting + piece).split("\n\n");
  waiting = events.pop();
  for (const event of events) {
    const data = event.slice("data: ".length);
    if (data === "[DONE]") break;
    const { delta, error } = JSON.parse(data);
    if (error) throw new Error(error.message);
    if (delta) process.stdout.write(delta);
  }
}
console.log();
