"""Serve GET /v1/models and /v1/models/{model}: the served model in OpenAI's shape, with our fields beside it."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.edges.http.edge import edge_of
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import Model, ModelList
from service.edges.openai.chat import require_model

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """Describe the served model: its training and the budgets that it offers."""
    return JsonResponse(ModelList(data=[served_model(request)]))


@router.get("/v1/models/{model}")
async def model(request: Request) -> Response:
    """Describe the served model, by its name."""
    require_model(request.path_params["model"], edge_of(request).pipeline.card)
    return JsonResponse(served_model(request))


def served_model(request: Request) -> Model:
    edge = edge_of(request)
    return Model.of(edge.pipeline.card, edge.started_at, edge.pipeline.images.are_shared)
