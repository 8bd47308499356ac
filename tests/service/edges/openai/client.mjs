// The openai package of npm, unmodified: node client.mjs BASE_URL MODEL IMAGE_FILE. It prints what came as JSON.
import { File } from "node:buffer";
import { createReadStream, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

globalThis.File ??= File; // Node.js 18, which Debian 12 has, knows it by its module alone
// NODE_PATH counts for require alone.
const { default: OpenAI } = await import(pathToFileURL(createRequire(import.meta.url).resolve("openai")));
const [baseURL, model, file] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const url = `data:image/webp;base64,${readFileSync(file).toString("base64")}`;
const ask = (image, fields = {}) =>
  client.chat.completions.create({
    model,
    max_completion_tokens: 64,
    messages: [
      {
        role: "user",
        content: [
          { type: "text", text: "describe the image." },
          { type: "image_url", image_url: { url: image, detail: "low" } },
        ],
      },
    ],
    ...fields,
  });
const failed = async (work) => {
  try {
    await work;
    return null;
  } catch (error) {
    return [error.constructor.name, error.status, error.code, error.param];
  }
};

const whole = await ask(url);
let streamed = "";
let usage = null;
for await (const chunk of await ask(url, { stream: true, stream_options: { include_usage: true } })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const kept = await client.files.create({ file: createReadStream(file), purpose: "vision" });
console.log(
  JSON.stringify({
    models: (await client.models.list()).data.map((each) => each.id),
    whole: whole.choices[0].message.content,
    vision: whole.vision,
    streamed,
    usage,
    by_id: (await ask(kept.id)).choices[0].message.content,
    errors: [
      await failed(ask(url, { n: 2 })),
      await failed(ask("img_none")),
      await failed(ask(url, { model: "gpt-5" })),
      await failed(ask(url, { timeout_s: 0.000001 })),
    ],
  }),
);
