"""Serve the routes about the service itself: health, metrics and front page."""

from __future__ import annotations

import html

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from service.edges.http.edge import edge_of
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import Health

router = APIRouter()


@router.get("/health/live")
async def live() -> Response:
    """Answer 200 while the process runs."""
    return JsonResponse(Health(status="ok"))


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Answer 200 while every model answers a real inference, else 503 and the reasons."""
    faults = dict(edge_of(request).faults())
    if not faults:
        return JsonResponse(Health(status="ok"))
    return JsonResponse(Health(status="not ready", faults=faults), status_code=503)


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    text, media_type = edge_of(request).metrics()
    return Response(text, media_type=media_type)


@router.get("/", include_in_schema=False)
async def root(request: Request) -> Response:
    return HTMLResponse(
        "<!doctype html><title>Glimpse</title><h1>Glimpse</h1><p>Answers questions about images. Try</p>"
        "<pre>curl -F image=@photo.jpg -F question='how many objects are there?' "
        f"{html.escape(str(request.base_url))}v1/vqa</pre>"
        "<p><a href=docs>API</a> · <a href=openapi.json>OpenAPI</a> · <a href=v1/models>model</a> · "
        "<a href=health/ready>health</a> · <a href=metrics>metrics</a></p>"
    )
