"""Turn values and errors into responses, and wrap every request (id, count, reservation)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import cast

import structlog
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from service.core.errors import (
    GlimpseError,
    InvalidRequest,
    Overloaded,
    SlowBody,
    Unauthenticated,
    UnsupportedEncoding,
    internal_error,
    status_of,
    without_frames,
)
from service.edges.caller import TRACE_ID_KEY, VARIANT_KEY, trace_id_in
from service.edges.http.access import GRANT, let_in
from service.edges.http.body import JSON, declared_bytes
from service.edges.http.edge import RESERVATION, Edge
from service.edges.http.hosts import name_in
from service.edges.http.schema import ErrorBody, WireError, WithNulls
from service.edges.proxies import FORWARDED_KEY
from service.pipeline import Reservation

log = structlog.get_logger()

OPEN_REQUESTS = "glimpse.open_requests"  # in the scope: how many the server has, also those that have not begun
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # others are counted as one
OTHER_APIS = ("/v1/responses", "/v1/completions")  # of OpenAI's: many clients ask there unless told otherwise
CHAT_INSTEAD = (
    "ask POST /v1/chat/completions (openai.chat(...) in Vercel's AI SDK, OpenAIChatCompletionsModel in OpenAI's "
    "Agents SDK)"
)


class JsonResponse(Response):
    """Send a wire type as JSON. Fields without a value are left out, except of a WithNulls."""

    media_type = JSON

    def render(self, content: BaseModel) -> bytes:
        return content.model_dump_json(exclude_none=not isinstance(content, WithNulls)).encode()


async def respond_to_error(_: Request, error: Exception) -> Response:
    """Answer with a GlimpseError. `protocol.py` answers what never reaches the application."""
    assert isinstance(error, GlimpseError)
    return response_to(error)


def response_to(error: GlimpseError) -> Response:
    """Make the answer of a request that failed, and let go of what the error holds."""
    without_frames(error)
    status, _grpc = status_of(error)
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = f"{max(1, math.ceil(error.retry_after_s))}"
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = 'Bearer realm="glimpse"'
    if isinstance(error, SlowBody):
        headers["connection"] = "close"  # the rest of the body is not awaited
    if isinstance(error, UnsupportedEncoding):
        headers["accept-encoding"] = "gzip"
    return JsonResponse(ErrorBody.of(error), status_code=status, headers=headers)


async def respond_to_no_route(request: Request, error: Exception) -> Response:
    """Answer 404 or 405, which the router raises."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    message = f"{what} is not allowed" if error.status_code == 405 else f"there is no {what}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    mend = CHAT_INSTEAD if request.url.path in OTHER_APIS else "see /docs"
    body = ErrorBody(error=WireError(message=f"{message}: {mend}", type=InvalidRequest.type, param=None, code=code))
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(methods_of(request))
    return JsonResponse(body, status_code=error.status_code, headers=headers)


def methods_of(request: Request) -> list[str]:
    """Return what may be asked of a path. The router names the methods of the first route alone."""
    routes = request.app.router.routes

    def is_served(method: str) -> bool:
        scope = {**request.scope, "method": "GET" if method == "HEAD" else method}
        return any(route.matches(scope)[0] is Match.FULL for route in routes)

    return [method for method in METHODS if is_served(method)]


def refuse_host(host: str) -> Response:
    """421 for a name that is none of this service's."""
    message = f"{host[:100]!r} is not a name of this service: ask localhost, or add the name to GLIMPSE_ALLOWED_HOSTS"
    body = ErrorBody(error=WireError(message=message, type=InvalidRequest.type, param="host", code="unknown_host"))
    return JsonResponse(body, status_code=421)


def told_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """Return what the response says of its tenant's quota and of the variant that answers; nothing if there is none."""
    reservation = cast("Reservation | None", scope.get(RESERVATION))
    if reservation is None:
        return []
    headers = [(name.encode(), value.encode()) for name, value in reservation.account.headers()]
    if (served := reservation.served) is not None and served.is_named:
        headers.append((VARIANT_KEY.encode(), served.variant.encode()))
    return headers


async def run(route: APIRoute, scope: Scope, receive: Receive, send: Send) -> None:
    """Run a route whose endpoint takes the request and returns a Response.

    FastAPI does the same after 0.1 ms of routing, dependencies and error handlers, which such a route does not use.
    """
    scope["route"] = route
    request, started = Request(scope, receive, send), False

    async def noted(message: Message) -> None:
        nonlocal started
        started = True
        await send(message)

    try:
        response = await route.endpoint(request)
        await response(scope, receive, noted)
    except GlimpseError as error:
        if started:
            raise
        await response_to(error)(scope, receive, send)


class RequestScope:
    """Wrap every request, in pure ASGI.

    It checks the Host and the caller's key, refuses questions while the event loop cannot keep up, reads and returns
    the request's id, counts the request, and ends its reservation after its response. It answers HEAD as GET without
    the body, and an unexpected exception with 500.
    """

    def __init__(self, app: ASGIApp, edge: Edge, direct: Mapping[tuple[str, str], APIRoute]) -> None:
        """`direct`: routes by method and path that are run without FastAPI's layers: see `run`."""
        self.app = app
        self.edge = edge
        self.hosts = edge.hosts
        self.direct = {key: partial(run, route) for key, route in direct.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (path := self.edge.aliases.get(scope["path"])) is not None:
            scope = {**scope, "path": path, "raw_path": path.encode()}
        method = scope["method"]
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # the server reads its own copy
        given = (value.decode("latin-1") for name, value in scope["headers"] if name == TRACE_ID_KEY.encode())
        trace_id = scope["glimpse.trace_id"] = trace_id_in(given)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(TRACE_ID_KEY.encode(), trace_id.encode()), *told_headers(scope)]
                message["headers"] = [*message.get("headers", ()), *more]
            elif method == "HEAD":
                message = {**message, "body": b""}
            await send(message)

        try:
            with ExitStack() as scope["glimpse.held"]:
                if self.edge.log_client_address and scope.get("client"):
                    scope["glimpse.held"].enter_context(bound_contextvars(client=self.client(scope)))
                await self.app_for(scope)(scope, receive, send_with_id)
        except Exception as error:
            log.exception("fault", request_id=trace_id, path=scope["path"])
            without_frames(error)
            if not status:
                body = JsonResponse(ErrorBody.of(internal_error(trace_id)), status_code=500)
                await body(scope, receive, send_with_id)
        finally:
            route = cast(str, getattr(scope.get("route"), "path", "none"))
            self.edge.count(method if method in METHODS else "other", route, str(status))

    def client(self, scope: Scope) -> str:
        """Return the caller's address."""
        forwarded = (value.decode("latin-1") for name, value in scope["headers"] if name == FORWARDED_KEY.encode())
        return self.edge.proxies.client(scope["client"][0], forwarded)

    def app_for(self, scope: Scope) -> ASGIApp:
        """The application, or the answer of a request that it need not see."""
        if (unknown := self.unknown_host(scope)) is not None:
            return refuse_host(unknown)
        edge = self.edge
        try:
            scope[GRANT] = let_in(scope, edge.access, metrics_are_open=edge.metrics_are_open)
            if scope["method"] == "POST" and scope["path"].startswith("/v1/"):
                edge.pipeline.refuse_early(scope.get(OPEN_REQUESTS, 0), edge.lag_s(), declared_bytes(scope["headers"]))
        except GlimpseError as error:
            return response_to(error)
        return self.direct.get((scope["method"], scope["path"]), self.app)

    def unknown_host(self, scope: Scope) -> str | None:
        """A Host header that names another service."""
        if self.hosts is None:
            return None
        hosts = (value.decode("latin-1") for name, value in scope["headers"] if name == b"host")
        return next((host for host in hosts if host and name_in(host) not in self.hosts), None)
