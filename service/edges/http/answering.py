"""Share between the routes that answer a question: read it, and send its answer whole or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext, suppress
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from service.core import request as core_request
from service.core.answer import Delta, Finished
from service.core.errors import Cancelled, GlimpseError, without_frames
from service.edges.caller import Caller
from service.edges.http.body import JSON, read_body
from service.edges.http.edge import Edge, caller_of, edge_of, present, reserved
from service.edges.http.schema import ErrorBody
from service.edges.whole import whole
from service.pipeline import Reservation

TELLING_S = 5.0  # for a caller to take the event that says why its stream ends

DONE = b"data: [DONE]\n\n"

Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class OpenQuestion:
    """Hold a question as a core Request, its reservation, and what gives errors the caller's names of fields."""

    request: core_request.Request
    reservation: Reservation
    naming: Callable[[], AbstractContextManager[None]] = nullcontext


async def read_question(
    request: Request, parse: Callable[[Sequence[bytes], str, Caller], Awaitable[Parsed]]
) -> tuple[Parsed, Reservation]:
    """Reserve, read and parse a question. `parse` takes the body in pieces, its content type and the caller.

    Raises what `parse` does, UnsupportedEncoding, TooLarge, SlowBody, Overloaded, Cancelled.
    """
    edge, caller = edge_of(request), caller_of(request)
    reservation = reserved(request, caller.tenant)
    body = await read_body(request, edge.bodies.max_body_bytes, edge.bodies, reservation)
    await edge.turns.next()
    return await parse(body, request.headers.get("content-type", JSON), caller), reservation


def media_type_of(content_type: str) -> str:
    """Return a content-type header's media type, without its parameters."""
    return content_type.partition(";")[0].strip().lower()


async def whole_answer(asked: OpenQuestion, edge: Edge) -> tuple[Delta, Finished]:
    """Collect the whole answer: its text, which may be empty, and its end. Raises GlimpseError only."""
    with asked.naming():
        return await whole(edge.pipeline.answer(asked.request, asked.reservation))


def start_of_stream(media_type: str) -> Message:
    """Return a new message: what wraps the request adds its headers to it."""
    headers = [
        (b"content-type", media_type.encode()),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
    ]
    return {"type": "http.response.start", "status": 200, "headers": headers}


class EventStream(Response):
    """Send an answer as server-sent events, then [DONE].

    Nothing is sent before the first event, so that an early error still has its own status. A later error is an event.
    """

    def __init__(self, asked: OpenQuestion, edge: Edge, written: Callable[[Delta | Finished], Iterable[bytes]]) -> None:
        """`written` gives the events' JSON for each piece of the answer."""
        super().__init__()
        self.asked = asked
        self.edge = edge
        self.written = written
        self.started = False

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        try:
            async with present(receive, self.asked.request.timeout_s, self.asked.reservation):
                await self.send_events(send)
        except GlimpseError as error:
            if not self.started:
                raise
            without_frames(error)
            if not isinstance(error, Cancelled):  # else nobody is there
                await self.send_error(error, send)

    async def send_events(self, send: Send) -> None:
        """Send all events. The last ones go in one write with [DONE], once the request is over. Raises GlimpseError."""
        last = b""
        with self.asked.naming():
            async with aclosing(self.edge.pipeline.answer(self.asked.request, self.asked.reservation)) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        last = told(self.written(event))
                    else:
                        await self.send_some(told(self.written(event)), send)
        await self.send_some(last + DONE, send, is_last=True)

    async def send_some(self, body: bytes, send: Send, *, is_last: bool = False) -> None:
        if not self.started:
            await send(start_of_stream("text/event-stream; charset=utf-8"))
            self.started = True
        await send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def send_error(self, error: GlimpseError, send: Send) -> None:
        """Send the last events. A caller that does not read them is not waited for."""
        with suppress(TimeoutError):
            async with asyncio.timeout(TELLING_S):
                await self.send_some(told([ErrorBody.of(error).model_dump_json().encode()]) + DONE, send, is_last=True)


def told(events: Iterable[bytes]) -> bytes:
    """Write events, given as JSON, as server-sent events."""
    return b"".join(b"data: " + json + b"\n\n" for json in events)
