"""Give the routes the gateway behind them, and read the caller's name and id from a request."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request
from starlette.types import Receive

from service.core.access import Authenticator, Grant
from service.core.variant import VariantControl
from service.edges import caller
from service.edges.asking import QuestionLimits
from service.edges.batching import BatchLimits
from service.edges.caller import SESSION_KEY, TENANT_KEY, TRACEPARENT_KEY, VARIANT_KEY, Caller, route_in, tenant_in
from service.edges.http.access import GRANT
from service.edges.http.body import BodyLimits, declared_bytes
from service.edges.loop_turns import LoopTurns
from service.edges.proxies import NO_PROXIES, Proxies
from service.pipeline import Pipeline, Reservation, Size


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may cost, and how many there may be."""

    max_connections: int = 4096
    max_connections_per_address: int = 3072
    replaced_per_address_s: float = 10.0  # connections a second that new ones of an address may take the place of
    held_s: float = 10.0  # before the connection of an address that comes too fast is closed
    max_head_bytes: int = 32 * 1024  # of a request line and its headers
    max_headers: int = 100
    max_url_bytes: int = 8 * 1024
    max_queued_requests: int = 16  # pipelined: sent before the response to an earlier request has ended
    head_timeout_s: float = 10.0  # from a head's first byte, or from the connection's start
    idle_timeout_s: float = 75.0  # longer than a load balancer in front keeps its idle connections
    write_timeout_s: float = 30.0  # for a client to read anything of what waits for it
    linger_s: float = 5.0  # for a client to read a refusal while it still sends

    @property
    def check_interval_s(self) -> float:
        return min(1.0, self.head_timeout_s / 4, self.write_timeout_s / 4, self.linger_s / 4)


@dataclass(frozen=True, slots=True)
class Edge:
    """Hold the parts of the gateway that HTTP uses. Made once by the composition root."""

    pipeline: Pipeline
    questions: QuestionLimits
    batches: BatchLimits
    bodies: BodyLimits
    connections: ConnectionLimits
    hosts: frozenset[str] | None  # names that a Host header may hold; None for any
    faults: Callable[[], Mapping[str, str]]  # by model, why it does not answer; empty if the service is ready
    degraded: Callable[[], Mapping[str, str]]  # by [VARIANT/]ADDRESS, why a Triton is out
    metrics: Callable[
        [str], Awaitable[tuple[bytes, str]]
    ]  # from an Accept header, the text for Prometheus and its media type
    count: Callable[[str, str, str], None]  # one HTTP request: its method, route and status
    lag_s: Callable[[], float]  # how late the event loop is, or the next request of `turns` if that is more
    turns: LoopTurns  # in which questions are read
    access: Authenticator
    variants: VariantControl | None = None  # of a service with variants
    metrics_are_open: bool = False  # whether /metrics needs no key where other paths do
    log_client_address: bool = False  # to the log's lines of each request
    proxies: Proxies = NO_PROXIES  # in front of the service
    cors_origins: tuple[str, ...] = ()  # whose pages may call the service from a browser
    aliases: Mapping[str, str] = field(default_factory=dict)  # paths that a platform names: they stand for ours
    started_at: int = field(default_factory=lambda: int(time.time()))  # seconds since the epoch


RESERVATION = "glimpse.reservation"  # in the scope of ASGI: what the response's headers tell of


def edge_of(request: Request) -> Edge:
    return cast(Edge, request.app.state.edge)


def caller_of(request: Request) -> Caller:
    """Return the request's caller: from its key, or without keys from its headers. Raises InvalidRequest."""
    grant, trace_id = cast(Grant, request.scope[GRANT]), cast(str, request.scope["glimpse.trace_id"])
    tenant = grant.tenant if grant.key else tenant_in(request.headers.get(TENANT_KEY, ""))
    headers = request.headers
    route = route_in(headers.getlist(VARIANT_KEY), headers.getlist(SESSION_KEY))
    return Caller(tenant, trace_id, headers.get(TRACEPARENT_KEY, ""), grant.key, route)


def reserved(request: Request, tenant: str, *, row: bool = True) -> Reservation:
    """Open the request's one reservation, which ends with its response. `row`: it needs the LLM. Raises Overloaded."""
    held = cast(ExitStack, request.scope["glimpse.held"])
    key = cast(Grant, request.scope[GRANT]).key
    size = Size.of(declared_bytes(request.scope["headers"]))
    reservation = held.enter_context(edge_of(request).pipeline.reservation(tenant, key, row=row, size=size))
    request.scope[RESERVATION] = reservation
    return reservation


@asynccontextmanager
async def present(receive: Receive, timeout_s: float, reservation: Reservation) -> AsyncIterator[None]:
    """Cancel the block when the caller goes away, or when the service ends its requests.

    Raises Cancelled, DeadlineExceeded, ShuttingDown.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with reservation.until_end(), caller.present(gone, timeout_s):
        yield
