"""Serve POST /v1/vqa: read a question, call the pipeline, send its answer whole or as events."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.core import request as core_request
from service.core.answer import Delta, Finished
from service.core.errors import Cancelled, GlimpseError, TooLarge
from service.edges.asking import to_request
from service.edges.caller import Caller
from service.edges.http.body import BOM, INLINE_PARSE_BYTES, JSON, FormPart, parse_form, read_body
from service.edges.http.edge import Edge, caller_of, edge_of, present, reserved
from service.edges.http.faults import no_question
from service.edges.http.json_bounds import BYTES_PER_CHAR, MAX_TEXT_BYTES, require_small
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import ErrorBody, VqaAnswer, VqaEnd, VqaForm, VqaRequest
from service.pipeline import Reservation

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Ask:
    """Hold a question as a core Request, its reservation, and the form in which the caller wants the answer."""

    request: core_request.Request
    reservation: Reservation
    stream: bool
    explain: bool


@router.post("/v1/vqa")
async def ask(request: Request) -> Response:
    """Answer a question about one or more images.

    With `stream` the answer comes as server-sent events: `{"id", "delta"}` for each piece of text, then one event with
    all fields except the text, then `[DONE]`. An error after the first event is an event `{"error": {...}}`.
    """
    edge = edge_of(request)
    asked = await read_question(request, edge)
    if asked.stream:
        return EventStream(asked, edge)
    async with present(request.receive, asked.request.timeout_s):
        return JsonResponse(await whole_answer(asked, edge))


async def read_question(request: Request, edge: Edge) -> Ask:
    """Reserve, read and parse a question.

    Raises InvalidRequest, UnsupportedEncoding, TooLarge, SlowBody, Overloaded, Cancelled.
    """
    caller = caller_of(request)
    reservation = reserved(request, caller.tenant)
    body = await read_body(request, edge.bodies.max_body_bytes, edge.bodies, reservation)
    content_type = request.headers.get("content-type", JSON)
    if len(body) > INLINE_PARSE_BYTES:
        parsed, asked = await asyncio.to_thread(parse_question, body, content_type, caller, edge)
    else:
        parsed, asked = parse_question(body, content_type, caller, edge)
    return Ask(asked, reservation, parsed.stream, parsed.explain)


def parse_question(
    body: bytes, content_type: str, caller: Caller, edge: Edge
) -> tuple[VqaRequest | VqaForm, core_request.Request]:
    """Parse a body by its content type -> the wire type and the core Request. Raises InvalidRequest, TooLarge."""
    parsed: VqaRequest | VqaForm
    match content_type.partition(";")[0].strip().lower():
        case "application/json":
            body = body.removeprefix(BOM)
            require_small(body, edge.questions.max_question_chars, VqaRequest.model_fields)
            parsed = VqaRequest.from_json(body)
            fields = parsed.fields()
        case "multipart/form-data":
            parts = parse_form(body, content_type)
            require_small_parts(parts, edge.questions.max_question_chars)
            parsed, images = VqaForm.from_parts(parts)
            fields = parsed.fields(images)
        case other:
            raise no_question(body, other)
    asked = to_request(fields, edge.pipeline.card, edge.questions, tenant=caller.tenant, trace_id=caller.trace_id)
    return parsed, asked


def require_small_parts(parts: list[FormPart], max_question_chars: int) -> None:
    """All but the images. Raises TooLarge."""
    for part in parts:
        if part.name in ("turns", "budget"):
            require_small(part.data, max_question_chars)
        elif part.name != "image" and len(part.data) > MAX_TEXT_BYTES + BYTES_PER_CHAR * max_question_chars:
            raise TooLarge(f"{part.name} has {len(part.data):,} bytes: shorten it", param=part.name)


async def whole_answer(asked: Ask, edge: Edge) -> VqaAnswer:
    """Collect the whole answer. Raises GlimpseError only."""
    texts: list[str] = []
    async with aclosing(edge.pipeline.answer(asked.request, asked.reservation)) as events:
        async for event in events:
            if isinstance(event, Delta):
                texts.append(event.text)
            else:
                fields = VqaEnd.fields_of(asked.request.id, edge.pipeline.card.name, event, asked.explain)
    return VqaAnswer(answer="".join(texts), **fields)


class EventStream(Response):
    """Send an answer as server-sent events: deltas, then all fields except the text, then [DONE].

    Nothing is sent before the first event, so that an early error still has its own status. A later error is an event.
    """

    def __init__(self, ask: Ask, edge: Edge) -> None:
        super().__init__()
        self.ask = ask
        self.edge = edge
        self.started = False

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        try:
            async with present(receive, self.ask.request.timeout_s):
                await self.send_events(send)
        except Cancelled:
            # After the start no error can be sent: the caller has gone, or it does not read.
            if not self.started:
                raise

    async def send_events(self, send: Send) -> None:
        """Send all events. Raises GlimpseError before the first event, and only then."""
        try:
            async with aclosing(self.edge.pipeline.answer(self.ask.request, self.ask.reservation)) as events:
                async for event in events:
                    if not self.started:
                        await send(self.start())
                        self.started = True
                    await send(self.chunk(event))
        except GlimpseError as error:
            if not self.started:
                raise
            await send(self.data(ErrorBody.of(error).model_dump_json().encode()))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def start(self) -> Message:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx would hold the events back
        ]
        return {"type": "http.response.start", "status": 200, "headers": headers}

    def chunk(self, event: Delta | Finished) -> Message:
        if isinstance(event, Delta):
            return self.data(orjson.dumps({"id": self.ask.request.id, "delta": event.text}))
        model = self.edge.pipeline.card.name
        end = VqaEnd(**VqaEnd.fields_of(self.ask.request.id, model, event, self.ask.explain))
        return self.data(end.model_dump_json(exclude_none=True).encode())

    def data(self, json: bytes) -> Message:
        return {"type": "http.response.body", "body": b"data: " + json + b"\n\n", "more_body": True}
