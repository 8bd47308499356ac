"""Serve POST /v1/vqa: read a question, call the pipeline, send its answer whole or as events."""

from __future__ import annotations

from collections.abc import Iterator

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.core import request as core_request
from service.core.answer import Delta, Finished
from service.core.errors import TooLarge
from service.edges.asking import to_request
from service.edges.caller import Caller
from service.edges.http.answering import Asked, EventStream, media_type_of, read_question, whole_answer
from service.edges.http.body import BOM, FormPart, parse_form
from service.edges.http.edge import Edge, edge_of, present
from service.edges.http.faults import no_question
from service.edges.http.json_bounds import BYTES_PER_CHAR, MAX_TEXT_BYTES, require_small
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import VqaAnswer, VqaEnd, VqaForm, VqaRequest

router = APIRouter()


@router.post("/v1/vqa")
async def ask(request: Request) -> Response:
    """Answer a question about one or more images.

    With `stream` the answer comes as server-sent events: `{"id", "delta"}` for each piece of text, then one event with
    all fields except the text, then `[DONE]`. An error after the first event is an event `{"error": {...}}`.
    """
    edge = edge_of(request)

    def parse(body: bytes, content_type: str, caller: Caller) -> tuple[VqaRequest | VqaForm, core_request.Request]:
        return parse_question(body, content_type, caller, edge)

    (parsed, question), reservation = await read_question(request, parse)
    asked = Asked(question, reservation)
    writer = VqaWriter(question.id, edge.pipeline.card.name, bool(parsed.explain))
    if parsed.stream:
        return EventStream(asked, edge, writer.events)
    async with present(request.receive, question.timeout_s):
        return JsonResponse(writer.answer(*await whole_answer(asked, edge)))


def parse_question(
    body: bytes, content_type: str, caller: Caller, edge: Edge
) -> tuple[VqaRequest | VqaForm, core_request.Request]:
    """Parse a body by its content type -> the wire type and the core Request. Raises InvalidRequest, TooLarge."""
    parsed: VqaRequest | VqaForm
    match media_type_of(content_type):
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


class VqaWriter:
    """Write an answer in the wire types of this route."""

    def __init__(self, request_id: str, model: str, explain: bool) -> None:
        self.request_id = request_id
        self.model = model
        self.explain = explain

    def answer(self, said: Delta, end: Finished) -> VqaAnswer:
        return VqaAnswer(answer=said.text, **VqaEnd.fields_of(self.request_id, self.model, end, self.explain))

    def events(self, event: Delta | Finished) -> Iterator[bytes]:
        """Yield an event's JSON: a delta, or all fields except the text."""
        if isinstance(event, Delta):
            yield orjson.dumps({"id": self.request_id, "delta": event.text})
        else:
            end = VqaEnd(**VqaEnd.fields_of(self.request_id, self.model, event, self.explain))
            yield end.model_dump_json(exclude_none=True).encode()
