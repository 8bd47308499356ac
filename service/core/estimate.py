"""Define what the service can say about a request without doing any of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EstimatedImage:
    """An image as its file's header describes it. Width and height are those before EXIF turns the picture."""

    id: str
    nbytes: int
    width: int | None  # None if the header does not say
    height: int | None
    known: bool  # its features are in this gateway's memory, so that nothing has to be decoded or encoded


@dataclass(frozen=True, slots=True)
class EstimatedClip:
    """A clip as it was sent."""

    id: str  # of its file; empty if its frames came as images
    nbytes: int
    frames: int  # the most that would be looked at, at the load of now
    known: bool  # all of their features are in this gateway's memory


@dataclass(frozen=True, slots=True)
class NotAdmitted:
    """Why the request would be refused now."""

    code: str
    message: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Amounts:
    """What admission counts."""

    nbytes: int
    pixels: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a request would take, and whether there is room for it now."""

    prompt_tokens: int  # text tokens of the prompt
    max_tokens: int
    vision_tokens: tuple[int, int]  # the least and the most, of all images and frames together, at the load of now
    visual_tokens: tuple[int, int]
    reduced: bool  # the most would be less than the request allows, because of load
    images: tuple[EstimatedImage, ...]
    clip: EstimatedClip | None
    cost: Amounts
    limits: Amounts  # of all requests together
    refusal: NotAdmitted | None
