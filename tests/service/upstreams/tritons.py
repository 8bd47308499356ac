"""A Triton that fails or hangs on demand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from service.core.card import ModelCard
from service.core.errors import DeadlineExceeded, Unavailable
from service.core.models import Generation
from tests.support.fakes import CARD, FakeLanguage, FakeVision, ids_of


class FakeTriton(FakeVision):
    """`fault` is raised by every call, probes included; `hangs` lets calls wait until they are given up."""

    def __init__(self, address: str = "") -> None:
        super().__init__()
        self.address = address
        self.language = FakeLanguage()
        self.hangs = False
        self.probe_fault: Exception | None = None
        self.fails_after: int | None = None  # tokens
        self.generations: list[str] = []
        self.is_open = False
        self.busy = 0  # calls that go on without their request, and probes
        self.timeouts: list[float] = []  # of calls of the vision models
        self.llm_timeouts: list[float] = []
        self.probes: list[tuple[str, ModelCard, float, float]] = []  # model, card, timeout, freshness

    async def connect(self) -> None:
        self.is_open = True

    async def close(self) -> None:
        self.is_open = False

    @property
    def is_idle(self) -> bool:
        return self.busy == 0

    async def _work(self, call: str) -> None:
        self.calls.append(call)
        await self._trouble()

    async def _trouble(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.fault is not None:
            raise self.fault

    async def see(self, image, question, budget, timeout_s):  # type: ignore[no-untyped-def]
        self.timeouts.append(timeout_s)
        return await bounded(super().see(image, question, budget, timeout_s), timeout_s)

    async def attend(self, vision, question, budget, timeout_s, closer=None):  # type: ignore[no-untyped-def]
        return await bounded(super().attend(vision, question, budget, timeout_s, closer), timeout_s)

    async def generate(self, generation: Generation, timeout_s: float) -> AsyncGenerator[tuple[int, ...], None]:
        self.generations.append(generation.request_id)
        self.llm_timeouts.append(timeout_s)
        self.language.sampling.append(generation.sampling)
        if self.fails_after is None:
            await self._trouble()
        for place, token in enumerate(self.language.tokens[: generation.sampling.max_tokens]):
            if place == self.fails_after and self.fault is not None:
                raise self.fault
            yield (token,)

    async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 0.0) -> None:
        self.probes.append((model, card, timeout_s, fresh_s))
        if (fault := self.probe_fault or self.fault) is not None:
            raise fault
        if self.hangs:
            self.busy += 1
            try:
                await asyncio.sleep(timeout_s)
                raise Unavailable("its probe got no answer")
            finally:
                self.busy -= 1


async def bounded(work, timeout_s):  # type: ignore[no-untyped-def]
    """As a call to Triton ends."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError as exc:
        raise DeadlineExceeded("no response") from exc


__all__ = ["CARD", "FakeTriton", "ids_of"]
