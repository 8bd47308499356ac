// The request that the page made, as curl, Python and JavaScript to copy. A key stays out: the code reads it from the
// environment variable GLIMPSE_API_KEY.
import { addressOf, usesKey } from "./api.js";

const quoted = JSON.stringify; // also a string of Python
const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl({ file, fields }) {
  const parts = [`-F ${shell(`${file.field}=@"${file.name.replaceAll(/["\\]/g, "\\$&")}"`)}`];
  for (const [name, value] of Object.entries(fields)) {
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    parts.push(`--form-string ${shell(`${name}=${text}`)}`);
  }
  if (usesKey()) parts.unshift('-H "x-api-key: $GLIMPSE_API_KEY"');
  return `curl -N ${parts.join(" \\\n  ")} \\\n  ${addressOf("v1/vqa")}`;
}

// Python's iter_lines is not used: it ends a line also at characters that an answer may have, such as U+2028.
function python({ file, fields }) {
  const literal = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : quoted(value));
  const body = Object.entries(fields).map(([name, value]) => `, ${quoted(name)}: ${literal(value)}`);
  const key = usesKey() ? ', headers={"x-api-key": os.environ["GLIMPSE_API_KEY"]}' : "";
  return `import httpx, json${key && ", os"}

with httpx.Client(base_url=${quoted(addressOf(""))}${key}, timeout=30) as glimpse:
    with open(${quoted(file.name)}, "rb") as ${file.field}:
        kept = glimpse.post("v1/images", content=${file.field}.read()).raise_for_status().json()
    body = {${quoted(file.field)}: kept["id"]${body.join("")}}
    with glimpse.stream("POST", "v1/vqa", json=body) as answer:
        answer.raise_for_status()
        text = ""
        for piece in answer.iter_text():
            *lines, text = (text + piece).split("\\n")
            for line in lines:
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise SystemExit(event["error"]["message"])
                    print(event.get("delta", ""), end="", flush=True)
`;
}

function javascript({ file, fields }) {
  const key = usesKey();
  return `import { readFile } from "node:fs/promises"; // in a page: await input.files[0].arrayBuffer()

const service = ${quoted(addressOf(""))};
${key ? 'const key = { "x-api-key": process.env.GLIMPSE_API_KEY };\n' : ""}const ${file.field} = await readFile(${quoted(file.name)});
const post = async (path, body, headers) => {
  const response = await fetch(service + path, { method: "POST", body, headers${key ? ": { ...key, ...headers }" : ""} });
  if (!response.ok) throw new Error(await response.text());
  return response;
};
const kept = await (await post("v1/images", ${file.field})).json();
const body = JSON.stringify({ ${file.field}: kept.id, ...${quoted(fields)} });
const answer = await post("v1/vqa", body, { "content-type": "application/json" });
let text = "";
for await (const piece of answer.body.pipeThrough(new TextDecoderStream())) {
  const events = (text += piece).split("\\n\\n");
  text = events.pop();
  for (const event of events.filter((each) => each.startsWith("data: {"))) {
    const { delta = "", error } = JSON.parse(event.slice(6));
    if (error) throw new Error(error.message);
    process.stdout.write(delta);
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
