"""Answer many questions side by side, for every transport. A question that fails leaves the others alone."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from service.core.answer import Delta, Finished
from service.core.errors import (
    DeadlineExceeded,
    GlimpseError,
    Overloaded,
    internal_error,
    without_frames,
)
from service.core.request import Request
from service.edges.caller import Caller
from service.edges.whole import whole
from service.pipeline import Patience, Pipeline, Reservation
from service.system.tasks import first_failure

log = structlog.get_logger()

Question = TypeVar("Question")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limit what one batch may ask for."""

    max_questions: int
    timeout_s: float  # for all of them


@dataclass(frozen=True, slots=True)
class Batch:
    """Answer the questions of one batch until its deadline, each under a reservation of its own."""

    pipeline: Pipeline
    caller: Caller
    deadline: float  # of the event loop's clock
    is_hurried: bool = False  # the caller gave it less time than the service does

    async def run(
        self,
        questions: AsyncIterator[tuple[int, Question]],
        answer: Callable[[int, Question], Awaitable[Answer]],
        write: Callable[[int, Answer | GlimpseError], Awaitable[None]],
        done: Callable[[Question], None] = lambda _: None,
    ) -> None:
        """Read, answer and write until the questions end. Results are written as they come, with their index.

        `answer` and `write` get the question's index. A question is read when the one before has its turn, so at most
        one waits for a turn. `done` is told each question that was read, once its result is written or the batch ends.
        An error of `answer` is its question's result. An error of `questions` or `write` ends the batch, and is raised.
        """
        reading, writing = asyncio.Lock(), asyncio.Lock()

        async def work() -> None:
            while True:
                with ExitStack() as held:
                    async with AsyncExitStack() as turn:
                        async with reading:
                            asked = await anext(questions, None)
                            if asked is None:
                                return
                            held.callback(done, asked[1])
                            await turn.enter_async_context(self.pipeline.batch_turn(self.caller.tenant))
                        outcome = await self._outcome(answer, *asked)
                    async with writing:
                        await write(asked[0], outcome)
                del asked, outcome  # not kept while the next question is awaited

        async with first_failure() as tasks:
            for _ in range(self.pipeline.batch_turns):
                tasks.create_task(work())

    async def answer(self, request: Request, within: Reservation) -> tuple[Request, Delta, Finished]:
        """Answer one question -> the question as last asked, its text and its end. Raises GlimpseError.

        If there is no room, it is asked again after the time that the refusal says, as long as its timeout allows. It
        counts as one request of the tenant's quota. `within` is the reservation of its message, or of the batch.
        """
        loop, is_counted = asyncio.get_running_loop(), False
        deadline = min(loop.time() + request.timeout_s, self.deadline)
        patience = Patience(time.monotonic() + deadline - loop.time())
        request = replace(request, is_hurried=request.is_hurried or self.is_hurried)
        while True:
            if (left_s := deadline - loop.time()) <= 0:
                with (
                    self.pipeline.reservation(request.tenant, self.caller.key, row=False, within=within) as reservation,
                    self.pipeline.outcomes.of(request, reservation),  # counts and logs it
                ):
                    raise DeadlineExceeded(
                        "the batch's time was over before this question was answered: try again",
                        param="timeout_s",
                    )
            asked = replace(request, id=f"vqa_{uuid.uuid4().hex}", timeout_s=min(left_s, request.timeout_s))
            try:
                with self.pipeline.reservation(
                    request.tenant, self.caller.key, within=within, patience=patience
                ) as reservation:
                    if not is_counted:
                        await reservation.account.enter(place=False)  # the batch has one
                        is_counted = True
                    return asked, *await whole(self.pipeline.answer(asked, reservation))
            except Overloaded as refusal:
                if not patience.waits_for(refusal):
                    raise
                await asyncio.sleep(refusal.retry_after_s)

    async def _outcome(
        self, answer: Callable[[int, Question], Awaitable[Answer]], index: int, question: Question
    ) -> Answer | GlimpseError:
        try:
            return await answer(index, question)
        except GlimpseError as error:
            without_frames(error)
            return error
        except Exception as error:
            log.exception("fault", request_id=self.caller.trace_id)
            without_frames(error)
            return internal_error(self.caller.trace_id)
