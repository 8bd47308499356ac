"""Track the state and the times of one request."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from service.admission.admission import Reservation, UntilEnd
from service.admission.scheduler import Kind
from service.core.errors import DeadlineExceeded, no_complete_answer
from service.core.payer import NOBODY, Payer, pay_for
from service.core.request import Request
from service.core.variant import DEFAULT, Served
from service.core.viewport import Fit
from service.telemetry.tracing import Value

if TYPE_CHECKING:
    from service.telemetry.spans import Trace


@dataclass(slots=True)
class Stage:
    """Measure how long a request was in one stage.

    The time counts once if several of the request's images are in the stage together.
    """

    seconds: float = 0.0
    inside: int = 0
    begun: float = 0.0

    def __enter__(self) -> None:
        if not self.inside:
            self.begun = time.monotonic()
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1
        if not self.inside:
            self.seconds += time.monotonic() - self.begun


class InTime:
    """The block of `Ticket.in_time`. No generator, because each response of the LLM enters one."""

    def __init__(self, ticket: Ticket, until_end: UntilEnd) -> None:
        self._ticket = ticket
        self._until_end = until_end

    async def __aenter__(self) -> None:
        await self._until_end.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._until_end.__aexit__(kind, error, trace)
        except TimeoutError as exc:
            raise self._ticket.too_late() from exc
        if isinstance(error, TimeoutError):
            raise self._ticket.too_late() from error


@dataclass(slots=True)
class Ticket:
    """The state of one request. Times are seconds of the monotonic clock."""

    request: Request
    reservation: Reservation
    arrived: float
    deadline: float
    always_streams: bool = False  # the LLM sends tokens one by one, whatever the request says
    outcome: str = "cancelled"  # until another outcome is known
    tokens: int = 0  # upper limit of its LLM tokens; 0 until it is admitted
    kind: Kind | None = None  # known once an image was looked up
    encoded: int = 0  # encoded images; a closer view counts as its crops
    frames: int = 0  # of its clip that are looked at; known once it is known which
    compared: int = 0  # frames of its clip among which they were chosen
    encoded_frames: int = 0  # of its clip, in all attempts
    cache: Literal["hit", "miss"] = "miss"  # final once every image was looked up
    detail: Literal["low", "high"] = "low"  # high once a closer view was used
    fit: Fit = "squash"  # another once an image was fitted otherwise
    reduced: bool = False  # True once an image got less than the request allows, because of load
    image_ids: tuple[str, ...] = ()  # known once the images are loaded
    stages: defaultdict[str, Stage] = field(default_factory=lambda: defaultdict(Stage))
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0  # 0 until there is a prompt
    visual_tokens: int = 0  # likewise
    completion_tokens: int = 0
    answer: list[str] = field(default_factory=list)  # pieces of its text so far
    log_prob: float = 0.0  # of the answer's tokens so far, if the models tell it
    finish_reason: Literal["stop", "length"] = "length"
    payer: Payer = NOBODY
    trace: Trace | None = None  # None: not recorded
    variant: str = DEFAULT  # that answers, or answered last
    fallback_from: str = ""  # the variant that should have answered
    asked_model: str = ""  # the name of that variant's model; empty until an attempt begins
    model: str = ""  # that of the variant that answers

    def begin(self, request: Request, served: Served) -> None:
        """Begin an attempt of a variant. What an earlier one has generated was not sent, and is forgotten."""
        if self.trace is not None:
            self.trace.end_lasting(self.completion_tokens)
        self.request, self.variant, self.fallback_from = request, served.variant, served.fallback_from
        self.model = served.model
        self.first_token = self.last_token = None
        self.prompt_tokens = self.visual_tokens = self.completion_tokens = 0
        self.log_prob, self.finish_reason = 0.0, "length"
        self.answer.clear()
        pay_for(served.variant)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Count the block's time for this stage, and record its span if the request is traced."""
        stage = self.stages[name]
        return stage if self.trace is None else self.trace.stage(name, stage)

    def tell(self, **attributes: Value) -> None:
        """Say something of the current stage in the request's trace."""
        if self.trace is not None:
            self.trace.tell(**attributes)

    @property
    def streams(self) -> bool:
        """Return whether the LLM sends tokens as they come: the time of the first one is known."""
        return self.always_streams or self.request.sampling.streaming

    @property
    def writing(self) -> str:
        """Name the LLM's current stage.

        An answer that is not streamed has one stage, generate, because its first token's time is unknown.
        """
        if not self.streams:
            return "generate"
        return "prefill" if self.first_token is None else "decode"

    def in_time(self) -> InTime:
        """Raise DeadlineExceeded if the block outlives the request's deadline, ShuttingDown if it outlives the service.

        Do not yield events inside the block.
        """
        return InTime(self, self.reservation.until_end(self.left_s))

    def too_late(self) -> DeadlineExceeded:
        return no_complete_answer(self.request.timeout_s)

    def timing_ms(self) -> dict[str, float]:
        seconds = {name: self.stages.get(name, Stage()).seconds for name in ("queue", "load", "vision")}
        seconds["first_token"] = (self.first_token or self.arrived) - self.arrived
        seconds["total"] = time.monotonic() - self.arrived
        return {name: round(value * 1e3, 2) for name, value in seconds.items()}
