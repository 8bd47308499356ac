"""What is wrong with a body, in the words of JSON and of forms."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from service.core.errors import InvalidRequest
from service.edges.http.body import FORM, JSON, MAX_NAME_CHARS

MAX_FAULTS = 100  # of a body, before they are only counted
MAX_SHOWN_CHARS = 60
UNNAMED = ""  # the tag of a union's branch
UNSUPPORTED = "unsupported_parameter"  # the type of a fault, and its code

# What callers of other services write.
SYNONYMS = dict.fromkeys(("file", "files", "photo", "picture", "pic", "img", "upload", "image_url"), "image")
SYNONYMS |= dict.fromkeys(("pdf", "document", "doc"), "image")
SYNONYMS |= dict.fromkeys(("page_number", "page_index", "page_no", "pages"), "page")
SYNONYMS |= dict.fromkeys(("clip", "movie", "video_url"), "video")
SYNONYMS |= dict.fromkeys(("num_frames", "max_frames", "nframes"), "video_frames")
SYNONYMS |= dict.fromkeys(("prompt", "query", "text", "q", "message"), "question")
SYNONYMS |= dict.fromkeys(("history", "messages"), "turns")
SYNONYMS |= dict.fromkeys(("max_new_tokens", "max_completion_tokens"), "max_tokens")

LISTS = {
    "images": 'a list of images, such as ["img_...", "img_..."]',
    "frames": 'a list of images, such as ["img_...", "img_..."]',
    "choices": 'a list of texts, such as ["yes", "no"]',
    "turns": 'a list of turns, such as [{"question": "which shape?", "answer": "a circle"}]',
    "vision_tokens": "a list of the least and the most, such as [64, 128]",
    "visual_tokens": "a list of the least and the most, such as [32, 64]",
}

STARTS = {
    b"\xff\xd8\xff": "a JPEG",
    b"\x89PNG": "a PNG",
    b"GIF8": "a GIF",
    b"RIFF": "a WebP",
    b"BM": "a BMP",
    b"%PDF": "a PDF",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
}
VIDEOS = {
    re.compile(rb"....ftyp(?!avif|avis|hei|hev|mif1|msf1)", re.DOTALL): "an MP4",  # those others are images
    re.compile(rb"\x1a\x45\xdf\xa3"): "a WebM",
}


def invalid_request(
    exc: ValidationError, known: Collection[str], nested: Mapping[str, Collection[str]]
) -> InvalidRequest:
    """The first fault of a body in words; how many more there are is said too. What is told of the body is short.

    `nested` has the fields of the objects inside, by the field that holds them. A branch of a union whose tag is empty
    is left out of a field's place.
    """
    count = exc.error_count()
    if count > MAX_FAULTS:
        return InvalidRequest(f"the body has {count:,} faults; the fields are {', '.join(known)}")
    faults = exc.errors(include_url=False)
    # A field that does not exist may be why another is missing.
    fault = next((each for each in faults if each["type"] == "extra_forbidden"), faults[0])
    param = ".".join(str(step) for step in fault["loc"] if step != UNNAMED)[:MAX_NAME_CHARS]
    more = f" (and {count - 1} more)" if count > 1 else ""
    match fault["type"]:
        case "json_invalid":
            reason = fault["msg"].removeprefix("Invalid JSON: ")
            return InvalidRequest(f"the body is not valid JSON: {reason}", code="invalid_json")
        case "extra_forbidden":
            holder = next((step for step in reversed(fault["loc"][:-1]) if isinstance(step, str) and step), "")
            return unknown_field(param, nested[holder] if holder else known, holder, more)
        case "missing" if isinstance(fault["loc"][-1], str):
            return InvalidRequest(f"the field {param} is missing{more}", param=param, code="missing_field")
        case "model_type" | "model_attributes_type":
            return InvalidRequest(f"{param or 'the body'} must be a JSON object{more}", param=param or None)
    if fault["type"] == "missing":  # of a list whose length is fixed
        param = param.rpartition(".")[0]
    code = UNSUPPORTED if fault["type"] == UNSUPPORTED else None
    return InvalidRequest(f"{_reason(fault, param)}; it is {shown(fault['input'])}{more}", param=param, code=code)


def unknown_field(param: str, fields: Collection[str], holder: str = "", more: str = "") -> InvalidRequest:
    """A field that does not exist, and what the caller may have meant.

    `param` has the steps to it, with dots; `holder` is the field whose object holds it, empty for the body.
    """
    last = param.rpartition(".")[2]
    synonym = SYNONYMS.get(last.lower(), "")
    near = [synonym] if synonym in fields else difflib.get_close_matches(last, fields, n=1)
    of = f" of {holder}" if holder else ""
    mend = f"did you mean {near[0]}?" if near else f"the fields{of} are {', '.join(fields)}"
    return InvalidRequest(f"there is no field {param!r}: {mend}{more}", param=param, code="unknown_field")


def no_question(body: bytes, content_type: str) -> InvalidRequest:
    """A body of a type that is not read here."""
    if kind := kind_of(body):
        return _sent_bare(kind)
    return InvalidRequest(
        f"content-type {content_type[:80]!r} is not read here: send {JSON} (curl -H 'content-type: {JSON}' -d ...) or "
        f"{FORM} (curl -F image=@FILE -F question=...)",
        code="unsupported_content_type",
    )


def require_text(body: bytes) -> None:
    """Raises InvalidRequest for a file in place of JSON."""
    if kind := kind_of(body):
        raise _sent_bare(kind)


def kind_of(body: bytes) -> str:
    """`a JPEG` and so on if the body is a file; empty if it is not known for one."""
    image = next((kind for start, kind in STARTS.items() if body.startswith(start)), "")
    return image or next((kind for start, kind in VIDEOS.items() if start.match(body)), "")


def shown(value: object) -> str:
    """A value of the body as JSON has it, cut short."""
    text = _SHOWN.repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[: MAX_SHOWN_CHARS - 3]}..."


def _sent_bare(kind: str) -> InvalidRequest:
    field = "video" if kind in VIDEOS.values() else "image"
    return InvalidRequest(
        f"the body is {kind}, where JSON or a form is expected: send {field} and question as a form (curl -F "
        f"{field}=@FILE -F question=...), or the file alone to POST /v1/images (curl --data-binary @FILE)",
        code="unsupported_content_type",
    )


def _reason(fault: ErrorDetails, param: str) -> str:
    """The field, and what it must be."""
    context: Mapping[str, Any] = fault.get("ctx", {})
    match fault["type"]:
        case "tuple_type" | "list_type":
            return f"{param} must be {LISTS.get(str(fault['loc'][-1]), 'a list')}"
        case "missing":
            return f"{param} must be {LISTS.get(str(fault['loc'][-2]), 'a longer list')}"
        case "too_long" if fault["loc"][-1] in ("vision_tokens", "visual_tokens"):
            return f"{param} must be {LISTS[str(fault['loc'][-1])]}"
        case "too_short":
            return f"{param} must hold {_items('at least', context['min_length'])}"
        case "too_long":
            return f"{param} may hold {_items('at most', context['max_length'])}"
    return f"{param} {fault['msg'].removeprefix('Value error, ').removeprefix('Input ').removeprefix('String ')}"


def _items(bound: str, count: int) -> str:
    return f"{bound} {count} item{'' if count == 1 else 's'}"


class _Shown(reprlib.Repr):
    """repr itself has no bound, and fails on what is nested deeply."""

    def repr_NoneType(self, *_: object) -> str:
        return "null"

    def repr_bool(self, value: bool, *_: object) -> str:
        return "true" if value else "false"

    def repr_float(self, value: float, *_: object) -> str:
        return json.dumps(value)  # NaN, Infinity

    def repr_tuple(self, value: tuple[Any, ...], level: int) -> str:
        return self.repr_list(list(value), level)


_SHOWN = _Shown()
