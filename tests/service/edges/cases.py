"""One table of questions for every transport: each must give the same answer, or the same kind of error.

A transport is an `Ask`: it turns a Case into its own words, and what comes back into an Outcome. `test_cases.py` runs
the table over all transports against one gateway. To join it, add an `Ask` to TRANSPORTS there.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from service.core.errors import (
    STATUS,
    DeadlineExceeded,
    GlimpseError,
    InvalidImage,
    InvalidRequest,
    NotFound,
)
from tests.support import documents, films
from tests.support.fakes import png
from tests.support.paths import SCENES

# Committed scenes, and the same ones with bytes of this table's own behind them, which no decoder reads.
SCENE, OTHER = ((SCENES / f"new_{number:03}.webp").read_bytes() + b"cases" for number in (3, 7))
WIDE = png((20, 60, 200), (900, 300))
LARGE = (SCENES / "small_print_004.webp").read_bytes() + b"cases"
GIF = films.gif()
PAGES = documents.pdf([documents.filled(documents.BLUE), documents.filled(documents.RED)])
FEW = MappingProxyType({"video_frames": 4})
UNKNOWN = "img_00000000000000000000000000000000"
SCHEMA = {
    "type": "object",
    "properties": {"shape": {"enum": ["ring", "cross"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["shape", "count"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A question, in the words of POST /v1/vqa. Images and videos come before all else, in the earliest turn."""

    name: str
    question: str = "which shape is the large blue object?"
    images: tuple[bytes | str, ...] = (SCENE,)  # files, ids or addresses
    video: bytes | str | None = None  # behind the images
    frames: tuple[bytes | str, ...] | None = None  # in its place
    turns: tuple[tuple[str, str], ...] = ()  # earlier questions and answers
    fields: Mapping[str, object] = field(default_factory=dict)  # the others
    error: type[GlimpseError] | None = None
    code: str = ""  # of the error


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a transport gave: an answer, or an error."""

    answer: str = ""
    finish_reason: str = ""
    image_ids: tuple[str, ...] = ()
    text_tokens: int = 0  # of the prompt
    visual_tokens: int = 0
    completion_tokens: int = 0
    vision_tokens: int = 0
    detail: str = ""
    fit: str = ""
    relevance: object = None
    frames: object = None  # of the video, that were looked at
    video_id: str = ""
    abstained: bool | None = None
    reason: str = ""
    confidence: float | None = field(default=None, compare=False)  # differs a little between batches
    found: float | None = field(default=None, compare=False)
    status: int = 200  # of HTTP: the row of STATUS
    code: str = ""
    tokens: tuple[tuple[bytes, tuple[bytes, ...]], ...] | None = None  # with logprobs: each with the likeliest ones
    logprobs: tuple[float, ...] = field(default=(), compare=False)  # of the tokens and of the likeliest ones, in order


Ask = Callable[[Case], Awaitable[Outcome]]


def in_base64(image: bytes | str) -> str:
    return image if isinstance(image, str) else base64.b64encode(image).decode()


def status_of(case: Case) -> int:
    """The HTTP status that the table of errors gives."""
    if case.error is None:
        return 200
    return next(STATUS[kind][0] for kind in case.error.__mro__ if kind in STATUS)


def refused(name: str, error: type[GlimpseError], code: str | None = None, **asked: object) -> Case:
    return Case(name=name, error=error, code=code or error.code, **asked)  # type: ignore[arg-type]


def with_fields(name: str, /, **fields: object) -> Case:
    return Case(name=name, fields=MappingProxyType(fields))


CASES = [
    Case(name="plain"),
    Case(name="a count", question="how many objects are there?"),
    Case(name="a description", question="describe the image."),
    Case(name="white space around", question="  how many objects are there?\n"),
    Case(name="other letters", question="¿qué es esto? 这是什么"),
    Case(name="another format", images=(png(),), question="what color is it?"),
    Case(name="two images", images=(SCENE, OTHER), question="is there a blue square?"),
    Case(name="the same image twice", images=(SCENE, SCENE)),
    Case(name="a turn", turns=(("is there a pink square?", "yes"),), question="is it below the blue square?"),
    Case(
        name="turns about two images",
        images=(SCENE, OTHER),
        turns=(("is there a pink square?", "yes"), ("is there a star?", "no")),
        question="how many objects are there?",
    ),
    with_fields("one token", max_tokens=1),
    with_fields("many tokens", max_tokens=100),
    with_fields("drawn", temperature=2.0, seed=5),
    with_fields("drawn from few", temperature=1.5, seed=6, top_k=3),
    with_fields("drawn from the likeliest", temperature=1.5, seed=7, top_p=0.5),
    with_fields("repetition made unlikely", repetition_penalty=2.0),
    with_fields("a stop string", stop=["q", "i"]),
    with_fields("one of some choices", choices=["violet", "no idea", "9/4 (a|b)?"]),
    with_fields("a choice, drawn", choices=["star", "square", "start"], temperature=2.0, seed=3),
    with_fields("a regular expression", regex=r"[A-F]{3}/\d", temperature=1.0, seed=4),
    with_fields("a schema", json_schema=SCHEMA),
    with_fields("a schema, drawn, with a penalty", json_schema=SCHEMA, temperature=2.0, seed=5, repetition_penalty=1.5),
    with_fields("a schema that is cut", json_schema=SCHEMA, max_tokens=4),
    with_fields("a regular expression and a stop string", regex="[a-z]+, [a-z]+", stop=[","]),
    with_fields("a stop string where the form is whole", regex="[a-z]+(, [a-z]+)?", stop=[","]),
    with_fields("least vision tokens", budget={"vision_tokens": [64, 64]}),
    with_fields("most vision tokens", budget={"vision_tokens": [256, 256]}),
    with_fields("more visual tokens", budget={"visual_tokens": [64, 64]}),
    with_fields("low priority, long timeout", priority="low", timeout_s=100),
    with_fields("explained", explain=True),
    with_fields("with log probabilities", logprobs=True),
    with_fields("with the likeliest tokens", logprobs=True, top_logprobs=2),
    with_fields("a form with the likeliest tokens", logprobs=True, top_logprobs=1, choices=["violet", "no idea"]),
    with_fields("sure enough", min_confidence=0.5),
    Case(name="two images, sure enough", images=(SCENE, OTHER), fields={"min_confidence": 0.01}),
    Case(name="a video, sure enough", images=(), video=GIF, fields={**FEW, "min_confidence": 0.01}),
    Case(name="not sure enough", images=(png(),), question="what shape is the star?", fields={"min_confidence": 1}),
    with_fields("detail low", detail="low"),
    Case(name="detail high", images=(LARGE,), fields={"detail": "high"}),
    Case(name="detail auto", images=(LARGE,), fields={"detail": "auto"}, question="what character is on the square?"),
    Case(name="squashed", images=(WIDE,), fields={"fit": "squash", "explain": True}),
    Case(name="padded", images=(WIDE,), fields={"fit": "pad", "explain": True}),
    Case(name="padded, detail high", images=(WIDE,), fields={"fit": "pad", "detail": "high"}),
    Case(name="tiled", images=(WIDE,), fields={"fit": "tiles", "explain": True}, question="is there a ring?"),
    Case(name="fitted by its proportions", images=(WIDE, SCENE), fields={"fit": "auto", "explain": True}),
    Case(name="a page of a PDF", images=(PAGES,), question="what color is it?", fields={"page": 2}),
    Case(name="a PDF, tiled", images=(PAGES,), question="what color is it?", fields={"fit": "tiles", "explain": True}),
    Case(name="a video", images=(), video=GIF, fields=FEW, question="which shape moves?"),
    Case(name="a video, explained", images=(), video=GIF, fields={**FEW, "explain": True}),
    Case(name="a video behind an image", video=GIF, fields=FEW),
    Case(name="a video by change", images=(), video=GIF, fields={"video_frames": 3, "video_sampling": "change"}),
    Case(name="a WebM", images=(), video=films.video(), fields=FEW),
    Case(name="an MP4", images=(), video=films.video(container="mp4"), fields=FEW),
    Case(name="a video of an earlier turn", images=(), video=GIF, fields=FEW, turns=(("does it move?", "yes"),)),
    Case(name="frames", images=(), frames=(SCENE, OTHER), fields={"explain": True}),
    # Errors.
    refused("a page that is not there", InvalidImage, "page_not_found", images=(PAGES,), fields={"page": 3}),
    refused("a page of a picture", InvalidImage, "page_not_found", fields={"page": 2}),
    refused("a page before the first", InvalidRequest, images=(PAGES,), fields={"page": 0}),
    refused("a page of two images", InvalidRequest, images=(PAGES, SCENE), fields={"page": 1}),
    refused("a page beside a video", InvalidRequest, images=(PAGES,), video=GIF, fields={"page": 1}),
    refused("no image", InvalidRequest, "missing_field", images=()),
    refused("no question", InvalidRequest, question=" "),
    refused("a question that is too long", InvalidRequest, question="w" * 2_001),
    refused("an empty turn", InvalidRequest, turns=((" ", "yes"),)),
    refused("a turn without an answer", InvalidRequest, turns=(("is it red?", ""),)),
    refused("an unknown image", NotFound, "image_not_found", images=(UNKNOWN,)),
    refused("an address", InvalidRequest, "url_not_supported", images=("https://example.com/x.png",)),
    refused("no image file", InvalidImage, images=(b"hello",)),
    refused("half an image", InvalidImage, images=(SCENE[:1_000],)),
    refused("not base64", InvalidImage, images=("!",)),
    refused("the second of two is no image", InvalidImage, images=(SCENE, b"hello")),
    refused("too many images", InvalidRequest, "context_length_exceeded", images=(SCENE,) * 12),
    refused("too many tokens", InvalidRequest, "context_length_exceeded", fields={"max_tokens": 100_000}),
    refused("no tokens", InvalidRequest, fields={"max_tokens": 0}),
    refused("a budget out of range", InvalidRequest, fields={"budget": {"vision_tokens": [1, 2]}}),
    refused("a budget upside down", InvalidRequest, fields={"budget": {"vision_tokens": [128, 64]}}),
    refused("a budget between multiples", InvalidRequest, fields={"budget": {"visual_tokens": [40, 40]}}),
    refused("a temperature too small", InvalidRequest, fields={"temperature": 0.001}),
    refused("a timeout that is too long", InvalidRequest, fields={"timeout_s": 1_000}),
    refused("a timeout that is over", DeadlineExceeded, fields={"timeout_s": 1e-6}),
    refused("more than certain", InvalidRequest, fields={"min_confidence": 1.5}),
    refused("less than nothing", InvalidRequest, fields={"min_confidence": -0.1}),
    refused("likeliest tokens alone", InvalidRequest, fields={"top_logprobs": 2}),
    refused("too many likeliest tokens", InvalidRequest, fields={"logprobs": True, "top_logprobs": 21}),
    refused("an empty choice", InvalidRequest, fields={"choices": ["yes", ""]}),
    refused("two forms", InvalidRequest, fields={"choices": ["yes", "no"], "regex": "yes|no"}),
    refused("a malformed regular expression", InvalidRequest, fields={"regex": "(yes"}),
    refused("a regular expression for white space", InvalidRequest, fields={"regex": " +"}),
    refused("a schema that nothing fits", InvalidRequest, fields={"json_schema": {"type": "strin"}}),
    refused("a schema with keywords that are not followed", InvalidRequest, fields={"json_schema": {"not": {}}}),
    refused("a schema that is too large", InvalidRequest, fields={"json_schema": {"enum": ["w" * 20_000]}}),
    refused("an unknown detail", InvalidRequest, fields={"detail": "medium"}),
    refused("an unknown fit", InvalidRequest, fields={"fit": "stretch"}),
    refused("an unknown priority", InvalidRequest, fields={"priority": "high"}),
    refused("an unknown video", NotFound, "image_not_found", images=(), video=UNKNOWN),
    refused("no video file", InvalidImage, images=(), video=b"hello"),
    refused("half a video", InvalidImage, images=(), video=GIF[:400]),
    refused("a video twice", InvalidRequest, video=GIF, frames=(SCENE, OTHER)),
    refused("no frames", InvalidRequest, images=(), frames=()),
    refused("too many frames", InvalidRequest, images=(), frames=(SCENE,) * 33),
    refused("a video that is not base64", InvalidImage, images=(), video="!"),
    refused("frames to look at without a video", InvalidRequest, fields={"video_frames": 4}),
    refused("a sampling without a video", InvalidRequest, fields={"video_sampling": "change"}),
    refused("no frames to look at", InvalidRequest, images=(), video=GIF, fields={"video_frames": 0}),
    refused("too many frames to look at", InvalidRequest, images=(), video=GIF, fields={"video_frames": 33}),
    refused("an unknown sampling", InvalidRequest, images=(), video=GIF, fields={"video_sampling": "all"}),
    refused("an unknown field", InvalidRequest, "unknown_field", fields={"colour": "red"}),
]
