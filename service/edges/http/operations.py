"""Serve the routes about the service itself: health and metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

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
        return JsonResponse(Health(status="ok", degraded=dict(edge_of(request).degraded()) or None))
    return JsonResponse(Health(status="not ready", faults=faults), status_code=503)


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    text, media_type = await edge_of(request).metrics(request.headers.get("accept", ""))
    return Response(text, media_type=media_type)
