"""Serve POST /v1/vqa: read a question, call the pipeline, send its answer whole or as events."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.core import request as core_request
from service.core.answer import Delta, Finished
from service.core.errors import TooLarge, naming_frame, naming_image, naming_video
from service.core.request import ImageSource
from service.edges.asking import Fields, to_request
from service.edges.caller import Caller
from service.edges.http.answering import EventStream, OpenQuestion, media_type_of, read_question, whole_answer
from service.edges.http.body import BOM, FormPart, parse_form
from service.edges.http.edge import Edge, edge_of, present
from service.edges.http.faults import no_question, require_text
from service.edges.http.json_bounds import BYTES_PER_CHAR, MAX_TEXT_BYTES, Question, split
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import FILES, TokenLogprob, VqaAnswer, VqaEnd, VqaForm, VqaRequest
from service.edges.slices import joined

Image = ImageSource | str

router = APIRouter()


@router.post("/v1/vqa")
async def ask(request: Request) -> Response:
    """Answer a question about images, a video or both.

    With `stream` the answer comes as server-sent events: `{"id", "delta"}` for each piece of text, then one event with
    all fields except the text, then `[DONE]`. An error after the first event is an event `{"error": {...}}`.
    """
    edge = edge_of(request)

    async def parse(
        body: Sequence[bytes], content_type: str, caller: Caller
    ) -> tuple[VqaRequest | VqaForm, core_request.Request]:
        parsed, fields = await parse_question(body, content_type, edge)
        return parsed, to_request(fields, edge.pipeline.card_for(caller.route), edge.questions, caller)

    (parsed, question), reservation = await read_question(request, parse)
    asked = OpenQuestion(question, reservation)
    writer = VqaWriter(question, edge.pipeline.card.name, bool(parsed.explain))
    if parsed.stream:
        return EventStream(asked, edge, writer.events)
    async with present(request.receive, question.timeout_s, reservation):
        return JsonResponse(writer.answer(*await whole_answer(asked, edge)))


async def parse_question(body: Sequence[bytes], content_type: str, edge: Edge) -> tuple[VqaRequest | VqaForm, Fields]:
    """Parse a body by its content type, in slices if it is large. Raises InvalidRequest, TooLarge."""
    match media_type_of(content_type):
        case "application/json":
            return await parse_json(await joined(body), edge.questions.max_question_chars)
        case "multipart/form-data":
            parts = await parse_form(body, content_type)
            await require_small_parts(parts, edge.questions.max_question_chars)
            form, files = await VqaForm.from_parts(parts)
            return form, form.fields(files)
        case other:
            raise no_question(body[0] if body else b"", other)


async def parse_json(
    body: bytes, max_question_chars: int, kind: type[VqaRequest] = VqaRequest
) -> tuple[VqaRequest, Fields]:
    """`kind` is the wire type of the route. Raises InvalidRequest, TooLarge."""
    if body.startswith(BOM):
        body = body[len(BOM) :]
    require_text(body)
    question = await split(body, max_question_chars, kind.model_fields)
    parsed = kind.from_json(question.rest)
    fields = parsed.fields()
    return parsed, await with_large_images(fields, question) if question.images else fields


async def with_large_images(fields: Fields, question: Question) -> Fields:
    """Put in the images that were cut out of the body. Raises InvalidRequest."""

    async def found(image: Image, naming: AbstractContextManager[None]) -> Image:
        if not isinstance(image, str) or image not in question.images:
            return image
        with naming:
            return await question.read(image)

    async def all_found(
        given: Sequence[Image], naming: Callable[[int, int], AbstractContextManager[None]]
    ) -> tuple[Image, ...]:
        return tuple([await found(each, naming(index, len(given))) for index, each in enumerate(given)])

    read: dict[str, Any] = {}
    if fields.image is not None:
        read["image"] = await found(fields.image, nullcontext())
    if fields.images is not None:
        read["images"] = await all_found(fields.images, naming_image)
    if fields.video is not None:
        read["video"] = await found(fields.video, naming_video())
    if fields.frames is not None:
        read["frames"] = await all_found(fields.frames, naming_frame)
    return replace(fields, **read)


async def require_small_parts(parts: list[FormPart], max_question_chars: int) -> None:
    """All but the images and videos. Raises TooLarge."""
    for part in parts:
        if part.name in ("turns", "budget", "json_schema"):
            await split(part.data, max_question_chars)
        elif part.name not in FILES and part.content.nbytes > MAX_TEXT_BYTES + BYTES_PER_CHAR * max_question_chars:
            raise TooLarge(f"{part.name} has {part.content.nbytes:,} bytes: shorten it", param=part.name)


class VqaWriter:
    """Write an answer in the wire types of this route."""

    def __init__(self, question: core_request.Request, model: str, explain: bool) -> None:
        self.request_id = question.id
        self.log_probs = question.sampling.log_probs
        self.model = model
        self.explain = explain

    def answer(self, said: Delta, end: Finished) -> VqaAnswer:
        fields = VqaEnd.fields_of(self.request_id, self.model, end, self.explain)
        return VqaAnswer(answer=said.text, logprobs=TokenLogprob.all_of(said) if self.log_probs else None, **fields)

    def events(self, event: Delta | Finished) -> Iterator[bytes]:
        """Yield an event's JSON: a delta, or all fields except the text."""
        if isinstance(event, Delta):
            told = {"logprobs": [each.model_dump() for each in TokenLogprob.all_of(event)]} if self.log_probs else {}
            yield orjson.dumps({"id": self.request_id, "delta": event.text} | told)
        else:
            end = VqaEnd(**VqaEnd.fields_of(self.request_id, self.model, event, self.explain))
            yield end.model_dump_json(exclude_none=True).encode()
