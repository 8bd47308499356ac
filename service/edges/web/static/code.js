// The request that the page made, as curl, Python and JavaScript to copy.
import { addressOf } from "./api.js";

const quoted = JSON.stringify; // also a string of Python
const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl({ file, fields }) {
  const parts = [`-F ${shell(`${file.field}=@"${file.name.replaceAll(/["\\]/g, "\\$&")}"`)}`];
  for (const [name, value] of Object.entries(fields)) {
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    parts.push(`--form-string ${shell(`${name}=${text}`)}`);
  }
  return `curl -N ${parts.join(" \\\n  ")} \\\n  ${addressOf("v1/vqa")}`;
}

function python({ file, fields }) {
  const literal = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : quoted(value));
  const body = Object.entries(fields).map(([name, value]) => `, ${quoted(name)}: ${literal(value)}`);
  return `import httpx, json

with httpx.Client(base_url=${quoted(addressOf(""))}, timeout=30) as glimpse:
    with open(${quoted(file.name)}, "rb") as ${file.field}:
        kept = glimpse.post("v1/images", content=${file.field}.read()).raise_for_status().json()
    body = {${quoted(file.field)}: kept["id"]${body.join("")}}
    with glimpse.stream("POST", "v1/vqa", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                print(json.loads(line.removeprefix("data: ")).get("delta", ""), end="", flush=True)
`;
}

function javascript({ file, fields }) {
  return `import { readFile } from "node:fs/promises"; // in a page: await input.files[0].arrayBuffer()

const service = ${quoted(addressOf(""))};
const ${file.field} = await readFile(${quoted(file.name)});
const kept = await (await fetch(service + "v1/images", { method: "POST", body: ${file.field} })).json();
const body = JSON.stringify({ ${file.field}: kept.id, ...${quoted(fields)} });
const headers = { "content-type": "application/json" };
const answer = await fetch(service + "v1/vqa", { method: "POST", headers, body });
let text = "";
for await (const piece of answer.body.pipeThrough(new TextDecoderStream())) {
  const events = (text += piece).split("\\n\\n");
  text = events.pop();
  for (const event of events.filter((each) => each.startsWith("data: {"))) {
    process.stdout.write(JSON.parse(event.slice(6)).delta ?? "");
  }
}
`;
}

export const LANGUAGES = { curl, Python: python, JavaScript: javascript };

/** Copy a text, also where a page without TLS has no clipboard. */
export async function copy(element) {
  if (navigator.clipboard) return navigator.clipboard.writeText(element.textContent);
  const range = document.createRange();
  range.selectNodeContents(element);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  document.execCommand("copy");
}
