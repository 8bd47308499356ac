"""Serve POST /v1/vqa/batch: read many questions at once, and send each result as soon as it is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.core.errors import Cancelled, GlimpseError, InvalidRequest, TooLarge, status_of, without_frames
from service.edges.asking import to_request
from service.edges.batching import Batch
from service.edges.caller import Caller
from service.edges.http.answering import TELLING_S, media_type_of, read_question, start_of_stream
from service.edges.http.batch_schema import BatchAnswer, BatchEnd, BatchError, BatchQuestion, line_of
from service.edges.http.body import BOM, JSON
from service.edges.http.edge import Edge, edge_of, present
from service.edges.http.faults import require_text
from service.edges.http.json_bounds import items
from service.edges.http.schema import ErrorBody, TokenLogprob, VqaEnd
from service.edges.http.vqa import parse_json
from service.edges.slices import joined
from service.pipeline import Reservation

JSON_LINES = "application/jsonl"
LINES = (JSON_LINES, "application/x-ndjson", "application/x-jsonlines", "application/json-lines")

router = APIRouter()


@router.post("/v1/vqa/batch")
async def ask_many(request: Request) -> Response:
    """Answer many questions, each with the fields of `POST /v1/vqa`: a JSON list, or JSON text line by line.

    Each result is a line of JSON with the question's `index`, in the order in which they are ready: an answer, or
    `{"index", "status", "error"}` for a question that failed alone. Questions about one image share its encode. If the
    batch ends early, the last line is `{"error": {...}}`.
    """
    edge = edge_of(request)

    async def parse(body: Sequence[bytes], content_type: str, caller: Caller) -> tuple[Questions, Caller]:
        return await Questions.found(await joined(body), content_type, edge), caller

    (questions, caller), reservation = await read_question(request, parse)
    return ResultStream(questions, caller, reservation, edge)


@dataclass(frozen=True, slots=True)
class Questions:
    """Hold a batch's body, and where each question stands in it. Each is parsed when its turn comes."""

    body: bytes
    places: Sequence[tuple[int, int]]

    @classmethod
    async def found(cls, body: bytes, content_type: str, edge: Edge) -> Questions:
        """Raises InvalidRequest, TooLarge."""
        kind = media_type_of(content_type)
        if kind != JSON and kind not in LINES:
            raise InvalidRequest(
                f"content-type {kind[:80]!r} is not read here: send {JSON} for a list, or {JSON_LINES} for lines",
                code="unsupported_content_type",
            )
        if body.startswith(BOM):
            body = body[len(BOM) :]
        require_text(body)
        most = edge.batches.max_questions
        start = len(body) - len(body.lstrip())
        begins = body[start : start + 1]
        if kind == JSON and begins == b"[":
            places = await items(body, most)
        elif kind == JSON and begins not in (b"{", b""):
            raise InvalidRequest(f"the batch is not a list of questions: send a JSON list, or lines as {JSON_LINES}")
        else:
            places = lines(body, most)
        if not places:
            raise InvalidRequest(f"the batch is empty: send 1 to {most:,} questions", code="missing_field")
        return cls(body, places)

    async def __aiter__(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield each question with its index."""
        for index, (start, end) in enumerate(self.places):
            yield index, self.body[start:end]


def lines(body: bytes, most: int) -> list[tuple[int, int]]:
    """Find where each line that is not empty begins and ends. Raises TooLarge if there are more than `most` lines."""
    found: list[tuple[int, int]] = []
    start = 0
    for _ in range(most + 1):
        if start >= len(body):
            return found
        end = body.find(b"\n", start)
        end = len(body) if end < 0 else end
        if body[start:end].strip():
            found.append((start, end))
        start = end + 1
    if start >= len(body) and len(found) <= most:
        return found
    raise TooLarge(f"the batch has more than {most:,} lines: send it in parts")


class ResultStream(Response):
    """Answer a batch, and send each result as a line of JSON. If the caller goes away, all its work ends."""

    def __init__(self, questions: Questions, caller: Caller, reservation: Reservation, edge: Edge) -> None:
        super().__init__()
        self.questions = questions
        self.caller = caller
        self.reservation = reservation
        self.edge = edge

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        timeout_s = self.edge.batches.timeout_s
        batch = Batch(self.edge.pipeline, self.caller, asyncio.get_running_loop().time() + timeout_s)

        async def answer(index: int, question: bytes) -> BatchAnswer:
            return await self.answer(batch, index, question)

        async def write(index: int, result: BatchAnswer | GlimpseError) -> None:
            await send(body_of(line_of(told(index, result)), more=True))

        try:
            async with present(receive, timeout_s, self.reservation):
                await send(start_of_stream(JSON_LINES))
                await batch.run(aiter(self.questions), answer, write)
                await send(body_of(b"", more=False))
        except GlimpseError as error:
            without_frames(error)
            if not isinstance(error, Cancelled):  # else nobody is there
                with suppress(TimeoutError):
                    async with asyncio.timeout(TELLING_S):
                        await send(body_of(line_of(BatchEnd(error=ErrorBody.of(error).error)), more=False))

    async def answer(self, batch: Batch, index: int, question: bytes) -> BatchAnswer:
        """Parse and answer one question. Raises GlimpseError."""
        limits, card = self.edge.questions, self.edge.pipeline.card_for(self.caller.route)
        parsed, fields = await parse_json(question, limits.max_question_chars, BatchQuestion)
        request = to_request(fields, card, limits, self.caller)
        asked, said, end = await batch.answer(request, self.reservation)
        fields_of_end = VqaEnd.fields_of(asked.id, card.name, end, bool(parsed.explain))
        logprobs = TokenLogprob.all_of(said) if request.sampling.log_probs else None
        return BatchAnswer(index=index, answer=said.text, logprobs=logprobs, **fields_of_end)


def body_of(line: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": line, "more_body": more}


def told(index: int, result: BatchAnswer | GlimpseError) -> BatchAnswer | BatchError:
    if isinstance(result, GlimpseError):
        status, _ = status_of(result)
        return BatchError(index=index, status=status, error=ErrorBody.of(result).error)
    return result
