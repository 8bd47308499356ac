"""The HTTP edge: decode, call the pipeline, encode. Errors become responses in one place, `respond_to_error`."""

from __future__ import annotations

import asyncio
import math
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import cast

import orjson
import structlog
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0 as METRICS_TYPE
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import pipeline
from service.admission.quota import Cost
from service.core import request as core_request
from service.core.answer import Delta, Finished
from service.core.errors import Cancelled, GlimpseError, InvalidRequest, Overloaded, internal_error, status_of
from service.edges.asking import QuestionLimits, to_request
from service.edges.http.body import FORM, JSON, parse_form, read_body
from service.edges.http.openapi import Api
from service.edges.http.schema import (
    ErrorBody,
    Health,
    Model,
    ModelList,
    UploadedImage,
    VqaAnswer,
    VqaEnd,
    VqaForm,
    VqaRequest,
    WireError,
)
from service.metrics import Metrics
from service.readiness import Readiness
from service.settings import Settings

log = structlog.get_logger()

INLINE_PARSE_BYTES = 256 * 1024  # above this a body is taken apart in a thread: base64 of 20 MB blocks for 50 ms
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # others are counted as one
TRACE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
TENANT = re.compile(r"[A-Za-z0-9._:-]{1,64}")


@dataclass(frozen=True, slots=True)
class Edge:
    """What the routes need; made once by the composition root."""

    pipeline: pipeline.Pipeline
    readiness: Readiness
    settings: Settings
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Ask:
    """A question in the core's words, and how the caller wants to hear of it."""

    request: core_request.Request
    stream: bool
    explain: bool


def edge_of(request: Request) -> Edge:
    return cast(Edge, request.app.state.edge)


def trace_id_of(request: Request) -> str:
    return cast(str, request.scope["glimpse.trace_id"])


def tenant_of(request: Request) -> str:
    """Raises InvalidRequest."""
    tenant = request.headers.get("x-tenant-id", "")
    if tenant and not TENANT.fullmatch(tenant):
        raise InvalidRequest(
            "x-tenant-id may hold 1 to 64 letters, digits and . _ : -", param="x-tenant-id", code="invalid_tenant"
        )
    return tenant


class JsonResponse(Response):
    """A wire type as JSON; fields without a value are left out, but for an error's `param`."""

    media_type = JSON

    def render(self, content: BaseModel) -> bytes:
        return content.model_dump_json(exclude_none=not isinstance(content, ErrorBody)).encode()


class EventStream(Response):
    """An answer as server-sent events: deltas, then all but the text, then [DONE].

    Nothing is sent before the first event is there, so that an early error still has a status of its own; a later one
    is an event.
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
            # Once it has started there is nobody to tell: to send more would wait for a reader who does not read.
            if not self.started:
                raise

    async def send_events(self, send: Send) -> None:
        """Raises GlimpseError before the first event is there, and only then."""
        try:
            async with aclosing(self.edge.pipeline.answer(self.ask.request)) as events:
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


@asynccontextmanager
async def present(receive: Receive, timeout_s: float) -> AsyncIterator[None]:
    """Cancels the block when the caller goes away, or does not take what is sent for `timeout_s`. Raises Cancelled."""
    # The pipeline keeps the request's deadline itself; a second more is for a caller that reads too slowly.
    try:
        async with asyncio.timeout(timeout_s + 1.0) as presence:
            watching = asyncio.create_task(_until_gone(receive, presence))
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError as exc:
        raise Cancelled("the caller went away") from exc


async def _until_gone(receive: Receive, presence: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    with suppress(RuntimeError):  # the block ended meanwhile
        presence.reschedule(asyncio.get_running_loop().time())


router = APIRouter()


@router.post("/v1/vqa")
async def ask(request: Request) -> Response:
    """Answers a question about an image or several.

    With `stream` the answer comes as server-sent events: `{"id", "delta"}` for each piece of text, then one event with
    everything but the text, then `[DONE]`. An error after the first event is an event `{"error": {...}}`.
    """
    edge = edge_of(request)
    asked = await read_question(request, edge)
    if asked.stream:
        return EventStream(asked, edge)
    async with present(request.receive, asked.request.timeout_s):
        return JsonResponse(await whole_answer(asked, edge))


async def read_question(request: Request, edge: Edge) -> Ask:
    """Raises InvalidRequest, TooLarge, Overloaded."""
    tenant = tenant_of(request)
    body = await admitted_body(request, edge, edge.settings.max_body_bytes)
    content_type = request.headers.get("content-type", JSON)
    if len(body) > INLINE_PARSE_BYTES:
        asked = await asyncio.to_thread(parse_question, body, content_type, trace_id_of(request), edge)
    else:
        asked = parse_question(body, content_type, trace_id_of(request), edge)
    return replace(asked, request=replace(asked.request, tenant=tenant)) if tenant else asked


async def admitted_body(request: Request, edge: Edge, max_bytes: int) -> bytes:
    """The body, its bytes reserved until the response has ended; nothing is read in a full house.

    Raises InvalidRequest, TooLarge, Overloaded.
    """
    admission = edge.pipeline.admission
    held = cast(ExitStack, request.scope["glimpse.held"])
    reservation = held.enter_context(admission.reservation(tenant_of(request)))
    reservation.require_room(Cost(tokens=admission.row_tokens))
    return await read_body(
        request, max_bytes, edge.settings.body_timeout_s, lambda nbytes: reservation.reserve(Cost(nbytes=nbytes))
    )


def parse_question(body: bytes, content_type: str, trace_id: str, edge: Edge) -> Ask:
    """Raises InvalidRequest."""
    asked: VqaRequest | VqaForm
    match content_type.partition(";")[0].strip().lower():
        case "application/json":
            asked = VqaRequest.from_json(body)
            fields = asked.fields()
        case "multipart/form-data":
            asked, images = VqaForm.from_parts(parse_form(body, content_type))
            fields = asked.fields(images)
        case other:
            raise InvalidRequest(
                f"content-type {other[:80]!r} is not read here: send {JSON} (curl -H 'content-type: {JSON}' -d ...) or "
                f"{FORM} (curl -F image=@FILE -F question=...)",
                code="unsupported_content_type",
            )
    settings = edge.settings
    limits = QuestionLimits(settings.max_question_chars, settings.default_timeout_s, settings.max_timeout_s)
    asking = to_request(fields, edge.pipeline.card, limits, trace_id=trace_id)
    return Ask(asking, asked.stream, asked.explain)


async def whole_answer(asked: Ask, edge: Edge) -> VqaAnswer:
    """Raises GlimpseError only."""
    texts: list[str] = []
    async with aclosing(edge.pipeline.answer(asked.request)) as events:
        async for event in events:
            if isinstance(event, Delta):
                texts.append(event.text)
            else:
                fields = VqaEnd.fields_of(asked.request.id, edge.pipeline.card.name, event, asked.explain)
    return VqaAnswer(answer="".join(texts), **fields)


@router.post("/v1/images")
async def keep_image(request: Request) -> Response:
    """Takes an image once, to be asked about by its id until it expires. The body is the file, or a form with it."""
    edge = edge_of(request)
    content_type = request.headers.get("content-type", "")
    is_form = content_type.lower().startswith(FORM)
    form_bytes = 64 * 1024 if is_form else 0  # room for the form's own text
    body = await admitted_body(request, edge, edge.settings.max_image_bytes + form_bytes)
    image = image_of(body, content_type) if is_form else body
    async with present(request.receive, edge.settings.default_timeout_s):
        return JsonResponse(UploadedImage.of(await edge.pipeline.keep_image(image, tenant_of(request))))


def image_of(body: bytes, content_type: str) -> bytes:
    """The one file of a form. Raises InvalidRequest."""
    parts = parse_form(body, content_type)
    if [part.name for part in parts] != ["image"]:
        names = ", ".join(part.name for part in parts) or "none"
        raise InvalidRequest(
            f"the form must have the one field image, it has {names}: curl -F image=@FILE", param="image"
        )
    return bytes(parts[0].data)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The model that answers, what it was trained on, and what budgets it offers."""
    return JsonResponse(ModelList(data=[Model.of(edge_of(request).pipeline.card)]))


@router.get("/health/live")
async def live() -> Response:
    """200 while the process can answer at all."""
    return JsonResponse(Health(status="ok"))


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 while every model answers a real inference, else 503 and the reasons."""
    readiness = edge_of(request).readiness
    if readiness.ready:
        return JsonResponse(Health(status="ok"))
    faults = {model: fault for model, fault in readiness.faults.items() if fault}
    return JsonResponse(Health(status="not ready", faults=faults), status_code=503)


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    return Response(generate_latest(edge_of(request).metrics.registry), media_type=METRICS_TYPE)


@router.get("/", include_in_schema=False)
async def root(request: Request) -> Response:
    return HTMLResponse(
        "<!doctype html><title>Glimpse</title><h1>Glimpse</h1><p>Answers questions about images. Try</p>"
        f"<pre>curl -F image=@photo.jpg -F question='what is this?' {request.base_url}v1/vqa</pre>"
        "<p><a href=docs>API</a> · <a href=openapi.json>OpenAPI</a> · <a href=v1/models>model</a> · "
        "<a href=health/ready>health</a> · <a href=metrics>metrics</a></p>"
    )


async def respond_to_error(_: Request, error: Exception) -> Response:
    """The one place where an error gets its status."""
    assert isinstance(error, GlimpseError)
    status, _grpc = status_of(error)
    headers = {"retry-after": f"{max(1, math.ceil(error.retry_after_s))}"} if isinstance(error, Overloaded) else None
    return JsonResponse(ErrorBody.of(error), status_code=status, headers=headers)


async def respond_to_no_route(request: Request, error: Exception) -> Response:
    """404 and 405, which the router raises."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    message = f"{what} is not allowed" if error.status_code == 405 else f"there is no {what}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    body = ErrorBody(error=WireError(message=f"{message}: see /docs", type=InvalidRequest.type, param=None, code=code))
    return JsonResponse(body, status_code=error.status_code, headers=dict(error.headers or {}))


class RequestScope:
    """Pure ASGI around every request: its id in and out, its count, what it holds until its response has ended, and the
    500 of a fault that nobody foresaw."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trace_id = scope["glimpse.trace_id"] = _trace_id(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", trace_id.encode())]
            await send(message)

        try:
            with ExitStack() as scope["glimpse.held"]:
                await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("fault", request_id=trace_id, path=scope["path"])
            if not status:
                body = JsonResponse(ErrorBody.of(internal_error(trace_id)), status_code=500)
                await body(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.metrics.http_requests.labels(method, route, str(status)).inc()


def _trace_id(scope: Scope) -> str:
    """The caller's x-request-id where it is a plain word, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and TRACE_ID.fullmatch(text := value.decode("latin-1")):
            return cast(str, text)
    return uuid.uuid4().hex


def http_api(edge: Edge) -> FastAPI:
    """The application. It starts nothing: what stands behind the edge is the composition root's."""
    api = Api(
        title="Glimpse",
        version="0.1.0",
        summary="Answers questions about images, and looks again where the question needs it.",
    )
    api.state.edge = edge
    api.include_router(router)
    api.add_exception_handler(GlimpseError, respond_to_error)
    api.add_exception_handler(HTTPException, respond_to_no_route)
    api.add_middleware(RequestScope, metrics=edge.metrics)
    return api
