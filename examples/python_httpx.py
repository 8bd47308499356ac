"""Ask with httpx: python3 -m pip install httpx; python3 examples/python_httpx.py [URL]"""

import json
import sys
from pathlib import Path

import httpx

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
scene = Path("benchmarks/scenes/new_003.webp").read_bytes()


def lines(response):
    """Split at line feeds only. httpx's iter_lines splits at U+2028 and others, too, which an answer may have."""
    text = ""
    for piece in response.raise_for_status().iter_text():
        *whole, text = (text + piece).split("\n")
        yield from filter(None, whole)


with httpx.Client(base_url=url, timeout=60) as glimpse:
    image = glimpse.post("/v1/images", content=scene).raise_for_status().json()["id"]

    asked = {"image": image, "question": "what character is on the pink square?"}
    answer = glimpse.post("/v1/vqa", json=asked).raise_for_status().json()
    print(answer["answer"], answer["vision"]["vision_tokens"])

    asked = {"image": image, "question": "describe the image.", "stream": True}
    with glimpse.stream("POST", "/v1/vqa", json=asked) as response:
        for line in lines(response):
            if line != "data: [DONE]":
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    sys.exit(event["error"]["message"])
                print(event.get("delta", ""), end="", flush=True)
    print()

    questions = [{"image": image, "question": f"is there a {color} ring?"} for color in ("blue", "red")]
    with glimpse.stream("POST", "/v1/vqa/batch", json=questions) as response:
        for line in lines(response):
            result = json.loads(line)
            if "index" not in result:  # the batch ended before all were answered
                sys.exit(result["error"]["message"])
            print(result["index"], result["error"]["message"] if "error" in result else result["answer"])

    estimate = glimpse.post("/v1/vqa/estimate", json=questions[0]).raise_for_status().json()
    print(estimate["admitted"], estimate["image_tokens"])
