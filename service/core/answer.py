"""Define the pipeline's results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from service.core.confidence import Confidence, Reason
from service.core.variant import Served
from service.core.viewport import Fit
from service.core.vision import Relevance


class LogProb(NamedTuple):
    """The model's own log probability of a token, before penalty, constraint, temperature and filters."""

    value: float
    top: tuple[tuple[int, float], ...] = ()  # ids and log probabilities of the likeliest tokens there, if asked for


@dataclass(frozen=True, slots=True)
class TokenLogProb:
    """A token of the answer: its bytes, which may be part of a character, and its log probability, as in LogProb."""

    spelled: bytes
    log_prob: float
    top: tuple[TokenLogProb, ...] = ()  # the likeliest tokens there, likeliest first, if asked for


@dataclass(frozen=True, slots=True)
class Delta:
    """The next piece of the answer's text, never empty.

    If the request asks for them, `log_probs` has the tokens that made the piece certain. The tokens of a stop string
    are in none.
    """

    text: str
    log_probs: tuple[TokenLogProb, ...] = ()


@dataclass(frozen=True, slots=True)
class FrameSeen:
    """One frame of a clip that was looked at."""

    index: int  # in the clip, from 0
    time_s: float | None  # after the clip's first frame; None if the frames came as images
    relevance: Relevance
    image_id: str = ""  # of a frame that came as an image


@dataclass(frozen=True, slots=True)
class Finished:
    """Everything about an answer except its text, known when the text is complete."""

    finish_reason: Literal["stop", "length"]
    image_ids: tuple[str, ...]
    cache: Literal["hit", "miss"]  # miss if anything had to be encoded
    detail: Literal["low", "high"]  # high if a closer view was used
    reduced: bool  # looked less closely than the request allows, because of load
    prompt_tokens: int
    completion_tokens: int
    visual_tokens: int
    relevance: tuple[Relevance, ...]  # of each image
    timing_ms: dict[str, float]
    fit: Fit = "squash"  # another if an image was fitted otherwise
    confidence: Confidence | None = None  # None if the models are not calibrated
    min_confidence: float | None = None  # of the request
    served: Served | None = None  # which variant answered
    frames: tuple[FrameSeen, ...] = ()  # of the clip, in order; `relevance` leaves them out
    clip_id: str = ""  # of the clip's file

    @property
    def abstained(self) -> bool | None:
        """Whether the answer is less sure than the request asks; None if it asks for nothing."""
        if self.confidence is None or self.min_confidence is None:
            return None
        return self.confidence.value < self.min_confidence

    @property
    def abstain_reason(self) -> Reason | None:
        return self.confidence.weakest if self.confidence is not None and self.abstained else None

    @property
    def vision_tokens(self) -> int:
        return sum(each.vision_tokens for each in (*self.relevance, *(frame.relevance for frame in self.frames)))


@dataclass(frozen=True, slots=True)
class KeptImage:
    """An image that can be asked about by its id until `expires_at`, seconds since the epoch."""

    id: str
    nbytes: int
    width: int
    height: int
    expires_at: float
    pages: int = 1
