"""Hooks of schemathesis: what a valid question needs and JSON Schema cannot say.

A file of random bytes is no image, an id must be of an image that was sent, a budget must be ordered and within the
model's, question, turns and `max_tokens` share the model's positions, and a chat ends with its user's question. So a
case that counts as valid gets a real image, a short text and a budget that the model offers; its other fields stay as
they were drawn. Invalid cases are sent as they are.
"""

from __future__ import annotations

import base64
import re
from typing import Any

import schemathesis
from schemathesis.transport.serialization import Binary

from benchmarks.bench.models import PROJECT

SCENE = (PROJECT / "service" / "edges" / "http" / "static" / "scene.webp").read_bytes()
ENCODED = base64.b64encode(SCENE).decode()
ID = re.compile(r"img_[0-9a-f]{32}")
FORMS = ("choices", "regex", "json_schema")
MAX_TOKENS = 16
MAX_CHARS = 40  # of a text; every character may be several tokens
TURNS = '[{"question": "is there a ring?", "answer": "yes"}]'
MODEL = "glimpse-reference"
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{ENCODED}"}},
            {"type": "text", "text": "which colour is the ring?"},
        ],
    }
]
FORMATS = {  # by `response_format.type`
    "text": {"type": "text"},
    "json_object": {"type": "json_object"},
    "json_schema": {"type": "json_schema", "json_schema": {"name": "flag", "schema": {"type": "boolean"}}},
}
BUDGET = {"vision_tokens": [64, 128], "visual_tokens": [32, 64]}


def shortened(text: Any) -> Any:
    """Without what may be left of nothing but white space."""
    return text.strip()[:MAX_CHARS].strip() if isinstance(text, str) else text


def fitting(asked: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a question or a chat, with what does not fit together left out."""
    changed = dict(asked)
    for name, value in (("max_tokens", MAX_TOKENS), ("max_completion_tokens", MAX_TOKENS), ("timeout_s", 30)):
        if changed.get(name) is not None:
            changed[name] = value
    for name in [name for name in FORMS if changed.get(name) is not None]:  # one form at most, and one that can be met
        changed[name] = None
        changed |= {"choices": ["yes", "no"]}
    if changed.get("top_logprobs"):  # the schema says so, but what varies one field at a time does not read it
        changed["logprobs"] = True
    return changed


# What every valid question is asked without: of a video nothing but a real file is valid, and a scene has one page.
OF_VIDEOS = {"video", "frames", "video_frames", "video_sampling", "page"}


def with_image(asked: dict[str, Any]) -> dict[str, Any]:
    """Return a question that can be answered, from one that its schema allows."""
    changed = fitting(asked)
    if changed.get("budget") is not None:
        changed["budget"] = {name: BUDGET[name] for name, given in changed["budget"].items() if given is not None}
    if isinstance(changed.get("turns"), str):  # of a form
        changed["turns"] = TURNS
    elif changed.get("turns"):
        turns = [{name: shortened(text) for name, text in turn.items()} for turn in changed["turns"][:2]]
        changed["turns"] = turns
    changed["question"] = shortened(changed["question"])
    changed |= dict.fromkeys(OF_VIDEOS & changed.keys())
    if changed.get("images") is not None:
        changed["images"] = [ENCODED] * min(2, len(changed["images"]))
    else:
        changed["image"] = ENCODED
    return changed


def conversation(asked: dict[str, Any]) -> dict[str, Any]:
    """Return a chat that can be answered, from one that its schema allows."""
    changed = fitting(asked) | {"model": MODEL, "messages": MESSAGES}
    changed |= dict.fromkeys(OF_VIDEOS & changed.keys())
    for name, offered in BUDGET.items():
        if changed.get(name) is not None:
            changed[name] = offered
    if changed.get("max_tokens") is not None:
        changed["max_completion_tokens"] = None  # another name of the same
    if not changed.get("stream"):
        changed["stream_options"] = None
    form = changed.get("response_format")
    if form is not None:
        changed["response_format"] = {"type": "text"} if changed.get("choices") else FORMATS[form["type"]]
    return changed


@schemathesis.hook
def before_load_schema(_: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Drop the conditions of forms: schemathesis cannot judge them on a body with files."""
    for described in raw_schema["components"]["schemas"].values():
        if described.get("title") == "VqaForm":
            described.pop("allOf", None)


@schemathesis.hook
def before_call(_: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
    is_form = case.media_type == "multipart/form-data"
    image = case.body.get("image") if isinstance(case.body, dict) else None
    if is_form and isinstance(image, str) and ID.fullmatch(image):
        case.body = {**case.body, "image": [image]}  # a link knows no forms, whose field may repeat
    if case.meta is None or not case.meta.generation.mode.is_positive:
        if is_form and isinstance(case.body, dict) and str(case.body.get("question", "")).endswith("*"):
            case.body = {**case.body, "question": " "}  # schemathesis breaks a pattern with a *, which \S allows
        return
    if case.operation.path == "/v1/images":
        case.body = {"image": Binary(SCENE)} if is_form else Binary(SCENE)
    elif case.operation.path == "/v1/files":
        case.body = {"file": Binary(SCENE), "purpose": "vision"}
    elif case.operation.path == "/v1/chat/completions" and isinstance(case.body, dict):
        case.body = conversation(case.body)
    elif case.operation.path in ("/v1/vqa", "/v1/vqa/estimate") and isinstance(case.body, dict):
        changed = with_image(case.body)
        if is_form:
            changed = {name: value for name, value in changed.items() if name not in OF_VIDEOS}
            # items are files: an id would be one
            changed["image"] = [Binary(SCENE)] * min(2, len(case.body.get("image") or [SCENE]))
        case.body = changed
    case._record_starting_state()  # it stays a valid case: schemathesis takes bytes for no valid body of JSON's types
