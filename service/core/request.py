"""Define a caller's request, in the same form for every edge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt

from service.core.frames import FrameSampling
from service.core.guide import Guide
from service.core.variant import ANY, Route
from service.core.viewport import AskedFit

MAX_TOP_LOG_PROBS = 20  # OpenAI's
Detail = Literal["low", "high", "auto"]  # without the closer view, with it, or as the question needs


@dataclass(frozen=True, slots=True)
class Budget:
    """The least and the most tokens a request allows, both ends included."""

    vision_tokens: tuple[int, int] = (64, 256)  # read by the Q-Former; CLS does not count
    visual_tokens: tuple[int, int] = (32, 32)  # read by the LLM; multiples of 32

    def to_array(self) -> npt.NDArray[np.int32]:
        """Return int32 [4]: least and most vision tokens, least and most visual tokens."""
        return np.array([*self.vision_tokens, *self.visual_tokens], np.int32)

    def within(self, vision_tokens: int) -> Budget:
        """Return the budget with at most this number of vision tokens."""
        least, most = self.vision_tokens
        if most <= vision_tokens:
            return self
        return replace(self, vision_tokens=(min(least, vision_tokens), min(most, vision_tokens)))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the answer's tokens are drawn and returned.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch the filters off.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    streaming: bool = True  # tokens as they come; else all at the end, which takes a fraction of the CPU time
    log_probs: bool = False  # with each token's log probability
    top_log_probs: int = 0  # of so many of the likeliest tokens beside each token, at most MAX_TOP_LOG_PROBS
    guide: Guide | None = None  # constrains the answer


@dataclass(frozen=True, slots=True)
class Text:
    """A text from the caller, without white space around it."""

    text: str


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """A file as it was sent."""

    data: bytes


@dataclass(frozen=True, slots=True)
class ImageId:
    """The id of an image that was sent before."""

    id: str


@dataclass(frozen=True, slots=True)
class ImageUrl:
    """The address of a file."""

    url: str


ImageSource = ImageBytes | ImageId | ImageUrl


@dataclass(frozen=True, slots=True)
class Clip:
    """A short video in its place in the prompt: a file with several pictures, or its frames in order."""

    source: ImageSource | tuple[ImageSource, ...]
    frames: int | None = (
        None  # at most so many are looked at, 1 to frames.MAX_FRAMES; None: as many as the model's card says
    )
    sampling: FrameSampling = "uniform"


Part = Text | ImageSource | Clip


def text_of(parts: Iterable[Part]) -> str:
    """Join the texts with spaces, without the pictures between them."""
    return " ".join(part.text for part in parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Exchange:
    """An earlier question, with the images and clips in it, and its answer."""

    parts: tuple[Part, ...]
    answer: str

    @property
    def question(self) -> str:
        return text_of(self.parts)


class Priority(StrEnum):
    """The priority among the requests of one tenant."""

    NORMAL = "normal"
    LOW = "low"  # may wait for the others


def seen_detail(asked: Detail, images: Sequence[ImageSource]) -> Detail:
    """Return the detail at which pictures can be seen: the frames of a clip have no closer view."""
    return asked if images else "low"


@dataclass(frozen=True, slots=True)
class Request:
    """One question about images or a clip, in the same form for every edge. `parts` have at least one text."""

    id: str  # unique: Triton cancels by it
    parts: tuple[Part, ...]  # the question: text, and images and clips in their places
    budget: Budget  # of each image, and of each frame of a clip
    sampling: Sampling
    timeout_s: float
    detail: Detail = "low"
    fit: AskedFit | None = None  # of images that are not square; None: as the model's card says
    page: int = 1  # of the one image, if it is a document
    exchanges: tuple[Exchange, ...] = ()  # earlier questions and answers, oldest first
    system: str = ""  # what the model is told before the first question
    trace_id: str = ""  # the caller's own id of the request
    traceparent: str = ""  # the caller's span, as W3C Trace Context writes it
    is_hurried: bool = False  # the caller gave it less time than the service does
    tenant: str = ""  # tenants share the service fairly; all requests without a name are one tenant
    priority: Priority = Priority.NORMAL
    min_confidence: float | None = None  # with less, the answer says that it abstains
    gave_budget: tuple[bool, bool] = (True, True)  # of vision and visual tokens; what a caller left out is the model's
    route: Route = ANY  # which variant may answer
    question: str = field(init=False)  # text of the last question; the allocator reads this
    images: tuple[ImageSource, ...] = field(init=False)  # in the order of the prompt, those of earlier questions first
    clips: tuple[Clip, ...] = field(init=False)  # likewise; models read at most one

    def __post_init__(self) -> None:
        object.__setattr__(self, "question", text_of(self.parts))
        object.__setattr__(self, "images", tuple(part for part in self.pictures if not isinstance(part, Clip)))
        object.__setattr__(self, "clips", tuple(part for part in self.pictures if isinstance(part, Clip)))

    @property
    def pictures(self) -> tuple[ImageSource | Clip, ...]:
        """Return the images and clips in the order of the prompt, those of earlier questions first."""
        parts = [part for exchange in self.exchanges for part in exchange.parts] + [*self.parts]
        return tuple(part for part in parts if not isinstance(part, Text))

    @property
    def seen_detail(self) -> Detail:
        """Return the detail at which its pictures can be seen, which decides the vision tokens it can ask for."""
        return seen_detail(self.detail, self.images)

    @property
    def clip(self) -> Clip | None:
        """Return the only clip of a request that was admitted."""
        return self.clips[0] if self.clips else None

    @property
    def sources(self) -> tuple[ImageSource, ...]:
        """Return the images, and the clip's file or frames."""
        if self.clip is None:
            return self.images
        source = self.clip.source
        return (*self.images, *(source if isinstance(source, tuple) else (source,)))
