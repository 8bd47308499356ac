"""Ask with OpenAI's client: python3 -m pip install openai; python3 examples/python_openai.py [URL]"""

import base64
import sys
from pathlib import Path

import openai

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
scene = base64.b64encode(Path("benchmarks/scenes/new_003.webp").read_bytes()).decode()
image = {"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{scene}"}}


def question(text: str) -> list:
    return [{"role": "user", "content": [{"type": "text", "text": text}, image]}]


model = client.models.list().data[0].id
answer = client.chat.completions.create(model=model, messages=question("what character is on the pink square?"))
print(answer.choices[0].message.content, answer.usage.prompt_tokens_details.image_tokens)

for chunk in client.chat.completions.create(model=model, messages=question("describe the image."), stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

try:
    client.chat.completions.create(model=model, messages=question("which shape?"), max_tokens=100_000)
except openai.BadRequestError as error:
    print(error.code)
