"""Try the variants that can answer a request, one after the other, until one has answered or something was sent."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType

from service.core.attempt_time import begin_attempt
from service.core.errors import FirstTokenLate, InternalError, Unavailable
from service.record.ticket import Ticket
from service.telemetry.metrics import Metrics
from service.upstreams.models import Choice, Model, Models


class Attempts:
    """Give one Attempt after the other, for `with attempt:`, until one is the last."""

    def __init__(self, models: Models, choices: Sequence[Choice], ticket: Ticket, metrics: Metrics) -> None:
        self.models = models
        self.own, self.order = models.in_order(choices, ticket.image_ids[0])
        self.ticket = ticket
        self.metrics = metrics

    def __iter__(self) -> Iterator[Attempt]:
        if self.order[0].model is not self.own:
            self.metrics.fallbacks.labels(self.own.variant, "out").inc()
        left = deque(self.order)
        while left:
            attempt = Attempt(self, left.popleft(), left)
            yield attempt
            if attempt.is_last:
                return


class Attempt:
    """One variant's attempt. Its block ends without an error if the next variant may try."""

    def __init__(self, attempts: Attempts, choice: Choice, left: deque[Choice]) -> None:
        """`left` are those to try after it."""
        self.model: Model = choice.model
        self.sent = False  # True once anything went to the caller
        self.is_last = False
        self._attempts = attempts
        self._choice = choice
        self._left = left
        self._held = ExitStack()

    def __enter__(self) -> None:
        attempts, ticket = self._attempts, self._attempts.ticket
        ticket.reservation.served = served = attempts.models.served(self.model, attempts.own)
        ticket.begin(self._choice.request, served)
        ticket.asked_model = attempts.own.card.name
        begin_attempt()
        if self._left:  # else the request's end gives back what it holds
            self._held.enter_context(ticket.reservation.work())
        self.model.in_flight += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.model.in_flight -= 1
        self._held.__exit__(kind, error, trace)
        attempts, left = self._attempts, self._left
        if isinstance(error, Unavailable | InternalError) and not self.sent:
            while left and not left[0].model.answers:
                left.popleft()
            if left and attempts.models.retries.take(time.monotonic()):
                reason = "late" if isinstance(error, FirstTokenLate) else "failed"
                attempts.metrics.fallbacks.labels(self.model.variant, reason).inc()
                return True
        self.is_last = True
        return False
