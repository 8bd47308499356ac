"""Answer Vertex AI's predict requests: `instances` in, `predictions` in the same order out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import orjson
from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from service.core.errors import GlimpseError, InvalidRequest, TooLarge, status_of
from service.core.request import Priority
from service.edges.asking import to_request
from service.edges.batching import Batch
from service.edges.caller import Caller
from service.edges.http.answering import media_type_of, read_question
from service.edges.http.batch_schema import BatchQuestion
from service.edges.http.body import BOM, JSON
from service.edges.http.edge import Edge, edge_of, present
from service.edges.http.faults import require_text
from service.edges.http.json_bounds import MAX_TEXT_BYTES, items
from service.edges.http.schema import ErrorBody, TokenLogprob, VqaAnswer, VqaEnd, or_default
from service.edges.http.vqa import parse_json
from service.edges.slices import joined
from service.pipeline import Reservation

# Vertex AI names its own paths in AIP_PREDICT_ROUTE and AIP_HEALTH_ROUTE: they become these. See Edge.aliases.
PREDICT, HEALTH = "/v1/vqa/predict", "/health/ready"
MEMBER = re.compile(rb'\s*"(instances|parameters)"\s*:\s*')
SHAPE = 'send {"instances": [{"image": ..., "question": ...}]}, and what all of them share in "parameters"'

router = APIRouter()


class Instance(BatchQuestion):
    """One question of a predict request: a question as JSON."""

    priority: Annotated[Priority | None, or_default(Priority.NORMAL)] = Field(Priority.NORMAL)


@dataclass(frozen=True, slots=True)
class Instances:
    """Hold the questions of a request. Each is parsed when its turn comes."""

    questions: Sequence[bytes]
    parameters: bytes  # members of a JSON object, without its brackets; an instance's own come behind them and count

    @classmethod
    async def found(cls, body: bytes, content_type: str, edge: Edge) -> Instances:
        """Raises InvalidRequest, TooLarge."""
        kind = media_type_of(content_type)
        if kind != JSON:
            raise InvalidRequest(
                f"content-type {kind[:80]!r} is not read here: send {JSON}", code="unsupported_content_type"
            )
        body = body.removeprefix(BOM).strip()
        require_text(body)
        if not body.startswith(b"{"):
            raise InvalidRequest(f"the body is not an object: {SHAPE}")
        members: dict[bytes, bytes] = {}
        for start, end in await items(body, edge.batches.max_questions):
            named = MEMBER.match(body, start, end)
            if named is None or named[1] in members:
                raise InvalidRequest(f"the body has another field than instances and parameters, or one twice: {SHAPE}")
            members[named[1]] = body[named.end() : end].strip()
        instances = members.get(b"instances", b"")
        if not instances.startswith(b"["):
            raise InvalidRequest(f"instances is missing or no list: {SHAPE}", param="instances", code="missing_field")
        places = await items(instances, edge.batches.max_questions)
        if not places:
            raise InvalidRequest("instances is empty: send one question or more", param="instances")
        return cls([instances[start:end].strip() for start, end in places], parameters_in(members.get(b"parameters")))

    async def __aiter__(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield each question with its index."""
        for index, question in enumerate(self.questions):
            yield index, self.with_parameters(question)

    def with_parameters(self, question: bytes) -> bytes:
        """Put the parameters in front of an instance's own fields, of which a parser takes the last."""
        if not self.parameters or not question.startswith(b"{"):
            return question
        own = question[1:].lstrip()
        return b"{" + self.parameters + (b"" if own.startswith(b"}") else b",") + own


def parameters_in(given: bytes | None) -> bytes:
    """Return the members of the object `parameters`. Raises InvalidRequest, TooLarge."""
    if given is None:
        return b""
    if len(given) > MAX_TEXT_BYTES:
        raise TooLarge(f"parameters has {len(given):,} bytes: put images into the instances", param="parameters")
    try:
        members = orjson.loads(given)
    except orjson.JSONDecodeError as exc:
        raise InvalidRequest(f"parameters is not valid JSON: {exc}", param="parameters", code="invalid_json") from exc
    if members is None:
        return b""
    if not isinstance(members, dict):
        raise InvalidRequest(
            "parameters is not an object: send the fields that all instances share", param="parameters"
        )
    return orjson.dumps(members)[1:-1]


@router.post(PREDICT, include_in_schema=False)
async def predict(request: Request) -> Response:
    """Answer all instances. One that fails alone has `{"status", "error"}` in its place."""
    edge = edge_of(request)

    async def parse(body: Sequence[bytes], content_type: str, caller: Caller) -> tuple[Instances, Caller]:
        return await Instances.found(await joined(body), content_type, edge), caller

    (instances, caller), reservation = await read_question(request, parse)
    timeout_s = edge.batches.timeout_s
    batch = Batch(edge.pipeline, caller, asyncio.get_running_loop().time() + timeout_s)
    predictions: list[bytes] = [b""] * len(instances.questions)

    async def answer(_: int, question: bytes) -> VqaAnswer:
        return await answered(batch, question, edge, reservation)

    async def write(index: int, result: VqaAnswer | GlimpseError) -> None:
        predictions[index] = prediction(result)

    async with present(request.receive, timeout_s, reservation):
        await batch.run(aiter(instances), answer, write)
    return Response(b'{"predictions":[' + b",".join(predictions) + b"]}", media_type=JSON)


async def answered(batch: Batch, question: bytes, edge: Edge, reservation: Reservation) -> VqaAnswer:
    """Parse and answer one instance. Raises GlimpseError."""
    limits, caller = edge.questions, batch.caller
    card = edge.pipeline.card_for(caller.route)
    parsed, fields = await parse_json(question, limits.max_question_chars, Instance)
    request = to_request(fields, card, limits, caller)
    asked, said, end = await batch.answer(request, reservation)
    logprobs = TokenLogprob.all_of(said) if request.sampling.log_probs else None
    return VqaAnswer(
        answer=said.text, logprobs=logprobs, **VqaEnd.fields_of(asked.id, card.name, end, bool(parsed.explain))
    )


def prediction(result: VqaAnswer | GlimpseError) -> bytes:
    """Write a result as JSON."""
    if isinstance(result, GlimpseError):
        return orjson.dumps({"status": status_of(result)[0], **ErrorBody.of(result).model_dump()})
    return result.model_dump_json(exclude_none=True).encode()
