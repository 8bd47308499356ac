"""Answer the call Batch: read questions as workers come free, and write each result as soon as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from service.core.errors import GlimpseError, InvalidRequest, TooLarge
from service.core.request import Priority
from service.edges.asking import to_request
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


class BatchCall:
    """Run one call of Batch."""

    def __init__(self, call: Call, edge: GrpcEdge) -> None:
        self.call = call
        self.edge = edge

    async def run(self) -> None:
        """Answer until the caller has sent its last question. Raises what reading a message does."""
        timeout_s = self.call.time_left_s()
        timeout_s = self.edge.batches.timeout_s if timeout_s is None else min(timeout_s, self.edge.batches.timeout_s)
        batch = Batch(self.edge.pipeline, self.call.caller, asyncio.get_running_loop().time() + timeout_s)

        async def answer(_: int, question: BatchQuestion) -> pb.BatchResponse:
            return pb.BatchResponse(index=question.index, answer=await self.answer(batch, question))

        async with self.call.present(timeout_s):
            await batch.run(self.questions(), answer, self.write)

    async def questions(self) -> AsyncIterator[tuple[int, BatchQuestion]]:
        """Raises InvalidRequest, TooLarge, SlowBody, Overloaded."""
        count = 0
        while (data := await self.call.next_message()) is not None:
            if count == self.edge.batches.max_questions:
                raise TooLarge(f"the batch has more than {count:,} questions: send it in parts")
            count += 1
            question = batch_question_in(data)
            yield question.index, question

    async def answer(self, batch: Batch, question: BatchQuestion) -> pb.AnswerResponse:
        """Parse and answer one question, whose bytes are reserved meanwhile. Raises GlimpseError."""
        pipeline, caller = self.edge.pipeline, self.call.caller
        with pipeline.bytes_reserved(len(question.data), caller.tenant):
            if question.timeout_s is not None and not question.timeout_s >= LEAST_TIMEOUT_S:
                raise InvalidRequest(f"timeout_s must be at least {LEAST_TIMEOUT_S:g}", param="timeout_s")
            message = question_in(question.data)
            fields = fields_of(message, stream=False, timeout_s=question.timeout_s, priority=Priority.LOW)
            request = to_request(
                fields,
                pipeline.card_for(caller.route),
                self.edge.questions,
                tenant=caller.tenant,
                trace_id=caller.trace_id,
                traceparent=caller.traceparent,
                route=caller.route,
            )
            asked, said, end = await batch.answer(request)
        return answer_message(asked.id, pipeline.card.name, (said.text,), end, message.explain, said.log_probs)

    async def write(self, index: int, result: pb.BatchResponse | GlimpseError) -> None:
        if isinstance(result, GlimpseError):
            result = pb.BatchResponse(index=index, error=error_message(result))
        await self.call.context.write(result)
