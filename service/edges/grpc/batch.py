"""Answer the call Batch: read questions as workers come free, and write each result as soon as it is there."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

from service.core.errors import GlimpseError, InvalidRequest, Overloaded, TooLarge, without_frames
from service.core.request import Priority
from service.edges.asking import naming, to_request
from service.edges.batching import Batch
from service.edges.grpc.calls import Call
from service.edges.grpc.edge import GrpcEdge
from service.edges.grpc.messages import (
    BatchQuestion,
    answer_message,
    batch_question_in,
    error_message,
    fields_of,
    question_in,
)
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.http.schema import LEAST_TIMEOUT_S
from service.pipeline import Reservation


@dataclass(slots=True)
class Taken:
    """Hold a question whose bytes are reserved, or which has a fault."""

    question: BatchQuestion
    reservation: Reservation
    held: ExitStack = field(default_factory=ExitStack)


class BatchCall:
    """Run one call of Batch. As an iterator it reads its questions, and keeps nothing of the last one."""

    def __init__(self, call: Call, edge: GrpcEdge) -> None:
        self.call = call
        self.edge = edge
        self._count = 0  # of questions so far

    async def run(self) -> None:
        """Answer until the caller has sent its last question. Raises what reading a message does."""
        left_s, most_s = self.call.time_left_s(), self.edge.batches.timeout_s
        timeout_s = most_s if left_s is None else min(left_s, most_s)
        ends_at = asyncio.get_running_loop().time() + timeout_s
        is_hurried = timeout_s < most_s and self.edge.questions.is_short(timeout_s)
        batch = Batch(self.edge.pipeline, self.call.caller, ends_at, is_hurried=is_hurried)

        async def answer(index: int, taken: Taken) -> pb.BatchResponse:
            if taken.question.fault is not None:
                raise taken.question.fault
            return pb.BatchResponse(index=index, answer=await self.answer(batch, taken.question, taken.reservation))

        async with self.call.present(timeout_s):
            await batch.run(self, answer, self.write, lambda taken: taken.held.close())

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, Taken]:
        """Read the next question, and reserve its bytes until it is answered. Without room it is refused, and let go.

        Raises TooLarge, Overloaded.
        """
        data = await self.call.next_message()
        if data is None:
            raise StopAsyncIteration
        if self._count == self.edge.batches.max_questions:
            raise TooLarge(f"the batch has more than {self._count:,} questions: send it in parts")
        self._count += 1
        question = batch_question_in(data)
        taken = Taken(question, self.call.reservation)
        if question.fault is None:
            try:
                reserved = self.edge.pipeline.bytes_reserved(len(data), self.call.reservation)
                taken.reservation = taken.held.enter_context(reserved)
            except Overloaded as refusal:
                without_frames(refusal)
                taken.question = BatchQuestion(question.index, fault=refusal)
        return question.index, taken

    async def answer(self, batch: Batch, question: BatchQuestion, reservation: Reservation) -> pb.AnswerResponse:
        """Parse and answer one question. Raises GlimpseError."""
        pipeline, caller = self.edge.pipeline, self.call.caller
        if question.timeout_s is not None and not question.timeout_s >= LEAST_TIMEOUT_S:
            raise InvalidRequest(f"timeout_s must be at least {LEAST_TIMEOUT_S:g}", param="timeout_s")
        message = question_in(question.data)
        fields, names = fields_of(message, stream=False, timeout_s=question.timeout_s, priority=Priority.LOW)
        with naming(names):
            request = to_request(fields, pipeline.card_for(caller.route), self.edge.questions, caller)
            asked, said, end = await batch.answer(request, reservation)
        return answer_message(asked.id, pipeline.card.name, said.text, end, message.explain, said.log_probs)

    async def write(self, index: int, result: pb.BatchResponse | GlimpseError) -> None:
        if isinstance(result, GlimpseError):
            result = pb.BatchResponse(index=index, error=error_message(result))
        await self.call.context.write(result)
