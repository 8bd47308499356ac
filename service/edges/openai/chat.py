"""Serve POST /v1/chat/completions: a conversation about images, for clients of OpenAI's API."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.core import request as core_request
from service.core.answer import Delta, Finished
from service.core.card import ModelCard
from service.core.errors import InvalidRequest
from service.core.request import ImageSource
from service.edges.asking import Names, naming, to_request
from service.edges.caller import Caller
from service.edges.http.answering import EventStream, OpenQuestion, media_type_of, read_question, whole_answer
from service.edges.http.body import BOM, JSON
from service.edges.http.edge import Edge, edge_of, present
from service.edges.http.json_bounds import Question, split
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import seen_fields
from service.edges.openai.messages import fields_of, places_of_images
from service.edges.openai.schema import (
    AnswerMessage,
    ChatCompletion,
    ChatRequest,
    ChatUsage,
    Choice,
    ChoiceLogprobs,
    SeenFields,
)
from service.edges.slices import joined
from service.pipeline import Reservation

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Chat:
    """Hold a chat as it was sent, the core's request that it became, and the chat's names of our fields."""

    sent: ChatRequest
    request: core_request.Request
    names: Names


@router.post("/v1/chat/completions")
async def complete(request: Request) -> Response:
    """Answer the last message of a conversation about images, a video or both, as OpenAI's API does.

    With `stream` the answer comes as server-sent events: chunks, then `[DONE]`. An error after the first chunk is an
    event `{"error": {...}}`.
    """
    edge = edge_of(request)

    async def parse(body: Sequence[bytes], content_type: str, caller: Caller) -> Chat:
        return await parse_chat(body, content_type, caller, edge)

    with naming({"image": "messages"}):  # a body that is too large
        chat, reservation = await read_question(request, parse)
    asked = OpenQuestion(chat.request, reservation, partial(naming, chat.names))
    writer = ChatWriter(chat, edge.pipeline.card, reservation)
    if chat.sent.stream:
        return EventStream(asked, edge, writer.chunks)
    async with present(request.receive, chat.request.timeout_s, reservation):
        return JsonResponse(writer.completion(*await whole_answer(asked, edge)))


async def parse_chat(body: Sequence[bytes], content_type: str, caller: Caller, edge: Edge) -> Chat:
    """Parse a body of JSON, in slices if it is large. Raises InvalidRequest, NotFound, TooLarge."""
    if (media_type := media_type_of(content_type)) != JSON:
        raise InvalidRequest(
            f"content-type {media_type[:80]!r} is not read here: send {JSON}", code="unsupported_content_type"
        )
    whole = (await joined(body)).removeprefix(BOM)
    cut = await split(whole, edge.questions.max_question_chars, ChatRequest.model_fields, is_image)
    sent = ChatRequest.from_json(cut.rest)
    caller = replace(caller, route=replace(caller.route, model=sent.model))
    card = edge.pipeline.card_for(caller.route)
    fields, names = fields_of(sent, await images_of(sent, cut))
    with naming(names):
        question = to_request(fields, card, edge.questions, caller)
    return Chat(sent, question, names)


def is_image(depth: int, field: bytes, name: bytes) -> bool:
    """`messages[].content[].image_url.url`, that of a `video_url`, and `file.file_data`."""
    return (depth, field) == (6, b"messages") and name in (b"url", b"file_data")


async def images_of(chat: ChatRequest, cut: Question) -> dict[str, ImageSource]:
    """Read the images and videos that were cut out of a large body -> by their names. Raises InvalidRequest."""
    images: dict[str, ImageSource] = {}
    for place, url in places_of_images(chat):
        if url in cut.images:
            with naming({"image": place}):
                images[url] = await cut.read(url)
    return images


class ChatWriter:
    """Write an answer in OpenAI's words."""

    def __init__(self, chat: Chat, card: ModelCard, reservation: Reservation) -> None:
        """`reservation` says which variant answers, once one was chosen; before that `card` stands for it."""
        self.sent = chat.sent
        self.card = card
        self.reservation = reservation
        self.id = f"chatcmpl-{chat.request.id.removeprefix('vqa_')}"
        self.created = int(time.time())
        self.options = chat.sent.stream_options
        self.has_begun = False

    @property
    def head(self) -> dict[str, Any]:
        served = self.reservation.served
        return {
            "id": self.id,
            "created": self.created,
            "model": served.model if served else self.card.name,
            "system_fingerprint": served.fingerprint if served else self.card.visual_fingerprint,
        }

    def completion(self, said: Delta, end: Finished) -> ChatCompletion:
        message, logprobs = AnswerMessage(content=said.text), ChoiceLogprobs.of(said) if self.sent.logprobs else None
        return ChatCompletion(
            **self.head,
            choices=(Choice(message=message, logprobs=logprobs, finish_reason=end.finish_reason),),
            usage=ChatUsage.of(end),
            **seen_fields(end, bool(self.sent.explain)),
        )

    def chunks(self, event: Delta | Finished) -> Iterator[bytes]:
        """Yield an event's chunks as JSON: the role, pieces of text, the end, and the usage if it was asked for."""
        if not self.has_begun:
            self.has_begun = True
            yield self._chunk([_choice({"role": "assistant", "content": "", "refusal": None})])
        if isinstance(event, Delta):
            logprobs = ChoiceLogprobs.of(event).model_dump() if self.sent.logprobs else None
            yield self._chunk([_choice({"content": event.text}, logprobs=logprobs)])
            return
        seen = seen_fields(event, bool(self.sent.explain))
        yield self._chunk([_choice({}, event.finish_reason)], **SeenFields(**seen).model_dump())
        if self.includes_usage:
            yield self._chunk([], usage=ChatUsage.of(event).model_dump())

    @property
    def includes_usage(self) -> bool:
        return self.options is not None and bool(self.options.include_usage)

    def _chunk(self, choices: list[dict[str, Any]], **fields: object) -> bytes:
        usage = {"usage": None} if self.includes_usage else {}
        return orjson.dumps(self.head | {"object": "chat.completion.chunk", "choices": choices} | usage | fields)


def _choice(
    delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
