"""Give the routes the gateway behind them, and read the caller's name and id from a request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import cast

from starlette.requests import Request
from starlette.types import Receive

from service.edges import caller
from service.edges.asking import QuestionLimits
from service.edges.caller import TENANT_KEY, Caller, tenant_in
from service.pipeline import Pipeline, Reservation


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limit the size of a request's body, and the time that it may take to arrive."""

    max_body_bytes: int  # of a question
    max_image_bytes: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Edge:
    """Hold the parts of the gateway that HTTP uses. Made once by the composition root."""

    pipeline: Pipeline
    questions: QuestionLimits
    bodies: BodyLimits
    faults: Callable[[], Mapping[str, str]]  # by model, why it does not answer; empty if the service is ready
    metrics: Callable[[], tuple[bytes, str]]  # the text for Prometheus, and its media type
    count: Callable[[str, str, str], None]  # one HTTP request: its method, route and status


def edge_of(request: Request) -> Edge:
    return cast(Edge, request.app.state.edge)


def caller_of(request: Request) -> Caller:
    """Read the caller from the request's headers. Raises InvalidRequest."""
    return Caller(tenant_in(request.headers.get(TENANT_KEY, "")), cast(str, request.scope["glimpse.trace_id"]))


def reserved(request: Request, tenant: str) -> Reservation:
    """Open the request's one reservation, which ends with its response. Raises Overloaded."""
    held = cast(ExitStack, request.scope["glimpse.held"])
    return held.enter_context(edge_of(request).pipeline.reservation(tenant))


@asynccontextmanager
async def present(receive: Receive, timeout_s: float) -> AsyncIterator[None]:
    """Cancel the block when the caller goes away. Raises Cancelled."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with caller.present(gone, timeout_s):
        yield
