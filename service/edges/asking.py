"""Turn the checked fields of any transport into a Request, by the same rules for all transports.

A transport checks types and ranges of its own wire format, makes `Fields` of it, and calls `to_request`.
"""

from __future__ import annotations

import re
import secrets
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from service.core.card import ModelCard
from service.core.errors import GlimpseError, InvalidRequest, naming_frame, naming_image, naming_video
from service.core.frames import MAX_FRAMES, FrameSampling
from service.core.guide import guide_of
from service.core.request import (
    Budget,
    Clip,
    Detail,
    Exchange,
    ImageSource,
    Part,
    Priority,
    Request,
    Sampling,
    Text,
    seen_detail,
    text_of,
)
from service.core.viewport import AskedFit
from service.edges.caller import NOBODY, Caller
from service.edges.image_text import source_of

SHORT_SHARE = 0.9  # of the default timeout

Names = Mapping[str, str]  # from a field's name in errors of the core, and of this module, to its name in a transport


@dataclass(frozen=True, slots=True)
class QuestionLimits:
    """Limit what one question may ask for."""

    max_question_chars: int  # of the question and its earlier turns together
    default_timeout_s: float
    max_timeout_s: float

    def is_short(self, timeout_s: float) -> bool:
        """Return whether a caller gives less time than the service does. A deadline of gRPC loses some on its way."""
        return timeout_s < SHORT_SHARE * self.default_timeout_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Hold a question as it was sent. Types and ranges are checked; None stands for a field that was left out.

    Images and the clip are in their places in `parts` and `turns`. Or they are in `image` or `images` and in `video` or
    `frames`, which come before everything else, the clip behind the images. A `str` in these four is an argument for
    `source_of`. `video_frames` and `video_sampling` are those of the one clip, wherever it stands. `page` is that of
    the one image.
    """

    parts: tuple[Part, ...]
    image: ImageSource | str | None = None
    images: tuple[ImageSource | str, ...] | None = None
    video: ImageSource | str | None = None
    frames: tuple[ImageSource | str, ...] | None = None
    video_frames: int | None = None
    video_sampling: FrameSampling | None = None
    page: int | None = None
    turns: tuple[Exchange, ...] = ()
    system: str = ""
    max_tokens: int = Sampling().max_tokens
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    detail: Detail = "low"
    fit: AskedFit | None = None
    vision_tokens: tuple[int, int] | None = None
    visual_tokens: tuple[int, int] | None = None
    timeout_s: float | None = None
    priority: Priority = Priority.NORMAL
    stream: bool = False
    log_probs: bool = False
    top_log_probs: int = 0
    min_confidence: float | None = None
    choices: tuple[str, ...] | None = None
    regex: str | None = None
    json_schema: Mapping[str, Any] | None = None


def to_request(fields: Fields, card: ModelCard, limits: QuestionLimits, caller: Caller = NOBODY) -> Request:
    """Check the fields against each other, the limits and the model. Raises InvalidRequest."""
    front = _in_front(fields)
    parts, exchanges, system = _stripped(fields.parts), _exchanges(fields), fields.system.strip()
    _require_text(text_of(parts), exchanges, system, limits.max_question_chars)
    _require_likeliest(fields)
    if exchanges:
        first, *others = exchanges
        exchanges = (replace(first, parts=(*front, *first.parts)), *others)
    else:
        parts = (*front, *parts)
    shown = [part for each in (parts, *(told.parts for told in exchanges)) for part in each]
    _require_one_clip(fields, shown)
    _require_one_image(fields, shown)
    images = [part for part in shown if not isinstance(part, Text | Clip)]
    parts = _looked_at(fields, parts)
    exchanges = tuple(replace(told, parts=_looked_at(fields, told.parts)) for told in exchanges)
    timeout_s = _timeout_s(fields, limits)
    return Request(
        id=f"vqa_{uuid.uuid4().hex}",
        parts=parts,
        exchanges=exchanges,
        system=system,
        budget=Budget(
            fields.vision_tokens or card.unasked_vision_tokens(seen_detail(fields.detail, images)),
            fields.visual_tokens or card.default_visual_tokens,
        ),
        detail=fields.detail,
        fit=fields.fit,
        page=fields.page or 1,
        sampling=_sampling(fields),
        timeout_s=timeout_s,
        is_hurried=limits.is_short(timeout_s),
        priority=fields.priority,
        min_confidence=fields.min_confidence,
        trace_id=caller.trace_id,
        traceparent=caller.traceparent,
        tenant=caller.tenant,
        gave_budget=(fields.vision_tokens is not None, fields.visual_tokens is not None),
        route=caller.route,
    )


@contextmanager
def naming(names: Names) -> Iterator[None]:
    """Give an error the transport's name of the field at fault, in its `param` and in its message."""
    try:
        yield
    except GlimpseError as error:
        ours = error.param or ""
        if ours in names:
            error.param = theirs = names[ours]
            # A plain word, such as image, is a name where the message begins with it, and a word elsewhere.
            place = rf"\b{re.escape(ours)}\b" if re.search(r"[_.]", ours) else rf"\A{ours}\b"
            error.message = re.sub(place, theirs, error.message)
            error.args = (error.message,)
        raise


def new_seed() -> int:
    """Make a seed for a request without one, so that its sampled answers differ from each other."""
    return secrets.randbits(63)


def _in_front(fields: Fields) -> tuple[ImageSource | Clip, ...]:
    """Return what stands before all text: the images, then the clip. Raises InvalidRequest."""
    front = (*_images_in_front(fields), *_clip_in_front(fields))
    if not front and all(
        isinstance(part, Text) for parts in (fields.parts, *(turn.parts for turn in fields.turns)) for part in parts
    ):
        raise InvalidRequest("the field image is missing", param="image", code="missing_field")
    return front


def _images_in_front(fields: Fields) -> tuple[ImageSource, ...]:
    if fields.image is not None and fields.images is not None:
        raise InvalidRequest("image and images are both given: leave one out", param="images")
    if fields.images is not None:
        return tuple(_sources(fields.images))
    if fields.image is not None:
        return tuple(_sources([fields.image]))
    return ()


def _clip_in_front(fields: Fields) -> tuple[Clip, ...]:
    if fields.video is not None and fields.frames is not None:
        raise InvalidRequest("video and frames are both given: leave one out", param="frames")
    if fields.frames is not None:
        return (frames_clip(fields.frames, "frames"),)
    if fields.video is not None:
        with naming_video():
            return (Clip(source_of(fields.video) if isinstance(fields.video, str) else fields.video),)
    return ()


def frames_clip(frames: Sequence[ImageSource | str], field: str) -> Clip:
    """Make a clip of images in order; `field` is where they stand. Raises InvalidRequest."""
    count = len(frames)
    if not 1 <= count <= MAX_FRAMES:
        raise InvalidRequest(f"{field} has {count:,} images: send 1 to {MAX_FRAMES}", param=field)
    sources = []
    for index, frame in enumerate(frames):
        with naming_frame(index, count):
            sources.append(source_of(frame) if isinstance(frame, str) else frame)
    return Clip(tuple(sources), frames=count)


def _require_one_clip(fields: Fields, parts: Iterable[Part]) -> None:
    """`parts` are those of all questions. Raises InvalidRequest."""
    clips = sum(isinstance(part, Clip) for part in parts)
    if clips > 1:
        raise InvalidRequest(f"video is given {clips} times: ask about one video at a time", param="video")
    for name in ("video_frames", "video_sampling"):
        if not clips and getattr(fields, name) is not None:
            raise InvalidRequest(f"{name} needs a video: add one, or leave {name} out", param=name)


def _require_one_image(fields: Fields, parts: Sequence[Part]) -> None:
    """A page is one of the only image. `parts` are those of all questions. Raises InvalidRequest."""
    if fields.page is None:
        return
    for name in ("video", "frames"):
        if getattr(fields, name) is not None:
            raise InvalidRequest(
                f"page is about one image, and {name} is given: send the document alone, as image, or leave page out",
                param="page",
            )
    images = sum(not isinstance(part, Text | Clip) for part in parts)
    if images != 1 or fields.images is not None or len(parts) > images + sum(isinstance(part, Text) for part in parts):
        raise InvalidRequest(
            "page is about one image: send the document alone as image, without other images or a video, or leave page "
            "out",
            param="page",
        )


def _looked_at(fields: Fields, parts: Iterable[Part]) -> tuple[Part, ...]:
    """Give a clip the frames and the sampling that are asked for."""
    return tuple(
        replace(part, frames=fields.video_frames or part.frames, sampling=fields.video_sampling or part.sampling)
        if isinstance(part, Clip)
        else part
        for part in parts
    )


def _sources(images: Iterable[ImageSource | str]) -> list[ImageSource]:
    given, sources = list(images), []
    for index, image in enumerate(given):
        with naming_image(index, len(given)):
            sources.append(source_of(image) if isinstance(image, str) else image)
    return sources


def _stripped(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Strip the white space around each text, and drop texts that are only white space."""
    stripped = (Text(part.text.strip()) if isinstance(part, Text) else part for part in parts)
    return tuple(part for part in stripped if part != Text(""))


def _exchanges(fields: Fields) -> tuple[Exchange, ...]:
    exchanges = tuple(Exchange(_stripped(turn.parts), turn.answer.strip()) for turn in fields.turns)
    for index, exchange in enumerate(exchanges):
        if not exchange.question or not exchange.answer:
            side = "answer" if exchange.question else "question"
            raise InvalidRequest(
                f"turns.{index}.{side} is empty: fill it in, or leave this turn out", param=f"turns.{index}.{side}"
            )
    return exchanges


def _require_text(question: str, exchanges: tuple[Exchange, ...], system: str, max_chars: int) -> None:
    if not question:
        raise InvalidRequest("question is empty: say what you want to know", param="question")
    told = sum(len(exchange.question) + len(exchange.answer) for exchange in exchanges)
    chars = len(system) + len(question) + told
    if chars > max_chars:
        count = f"{chars:,} characters, the limit is {max_chars:,}"
        if len(system) > max(len(question), told):
            raise InvalidRequest(f"system, question and turns have {count}: shorten system", param="system")
        if told:
            raise InvalidRequest(f"question and turns have {count}: leave the earliest turns out", param="turns")
        raise InvalidRequest(f"question has {count}: shorten it", param="question")


def _require_likeliest(fields: Fields) -> None:
    if fields.top_log_probs and not fields.log_probs:
        raise InvalidRequest("top_logprobs needs logprobs: set logprobs to true", param="top_logprobs")


def _timeout_s(fields: Fields, limits: QuestionLimits) -> float:
    timeout_s = limits.default_timeout_s if fields.timeout_s is None else fields.timeout_s
    if timeout_s > limits.max_timeout_s:
        raise InvalidRequest(
            f"timeout_s is {timeout_s:g}, the limit is {limits.max_timeout_s:g}: lower it", param="timeout_s"
        )
    return timeout_s


def _sampling(fields: Fields) -> Sampling:
    return Sampling(
        max_tokens=fields.max_tokens,
        temperature=fields.temperature,
        top_k=fields.top_k,
        top_p=fields.top_p,
        seed=new_seed() if fields.seed is None else fields.seed,
        repetition_penalty=fields.repetition_penalty,
        stop=fields.stop,
        streaming=fields.stream or bool(fields.stop),  # stop strings are searched for as tokens come
        log_probs=fields.log_probs,
        top_log_probs=fields.top_log_probs,
        guide=guide_of(fields.choices, fields.regex, fields.json_schema),
    )
