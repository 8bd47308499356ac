"""What the pipeline asks of the models, whoever serves them: see, attend, generate."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from service.core.answer import LogProb
from service.core.prompt import Prompt, Question
from service.core.request import Budget, Sampling
from service.core.vision import CloserFeatures, Seen, SeenClip, UInt8Array, VisionFeatures


class VisionModel(Protocol):
    """Make visual tokens from an image and a question.

    Raises Unavailable, Overloaded, DeadlineExceeded, GlimpseError only.
    """

    async def see(
        self, image: UInt8Array, question: Question, budget: Budget, timeout_s: float
    ) -> tuple[VisionFeatures, Seen]:
        """Encode and attend in one call. `image` is RGB, uint8 [3, 224, 224]."""
        ...

    async def encode(self, images: UInt8Array, timeout_s: float) -> list[VisionFeatures]:
        """Encode one batch, without a question. `images` is RGB, uint8 [N, 3, 224, 224]."""
        ...

    async def attend(
        self,
        vision: VisionFeatures,
        question: Question,
        budget: Budget,
        timeout_s: float,
        closer: CloserFeatures | None = None,
    ) -> Seen:
        """Attend to features that an earlier `see` or `encode` gave, and to those of the closer view if it is given."""
        ...

    async def attend_clip(
        self,
        frames: Sequence[VisionFeatures],
        times: Sequence[float],
        question: Question,
        budget: Budget,
        timeout_s: float,
    ) -> SeenClip:
        """Attend to the features of a clip's frames together, if the card has a clip resampler.

        `times` are from 0, the first frame, to 1, the last one. `budget` is that of the whole clip.
        """
        ...


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer to generate."""

    prompt: Prompt
    sampling: Sampling
    end_id: int  # the token that ends the answer
    pad_id: int
    request_id: str  # no two that run at the same time are equal: a stream is stopped by its id
    stall_timeout_s: float  # the most that tokens may take after those before them
    log_probs: list[LogProb] | None = None
    """Those of tokens are appended before the tokens are yielded, if `sampling` asks for log probabilities."""


class LanguageModel(Protocol):
    """Generate an answer's tokens. Raises Unavailable, Overloaded, DeadlineExceeded, GlimpseError only."""

    def generate(self, generation: Generation, timeout_s: float) -> AsyncGenerator[tuple[int, ...], None]:
        """Yield token ids as they come, `end_id` included if it was generated. Closing the generator cancels."""
        ...
