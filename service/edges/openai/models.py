"""Serve GET /v1/models and /v1/models/{model}: the served model in OpenAI's shape, with our fields beside it."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.core.errors import InvalidRequest
from service.edges.http.edge import edge_of
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import Model, ModelList
from service.edges.openai.chat import require_model

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """Describe the served model in short; with `?detail=full` as `GET /v1/models/{model}` does."""
    match request.query_params.get("detail", "short"):
        case "full":
            return JsonResponse(ModelList(data=[served_model(request)]))
        case "short":
            return JsonResponse(ModelList(data=[served_model(request).model_copy(update={"metadata": None})]))
    raise InvalidRequest("detail must be short or full", param="detail")


@router.get("/v1/models/{model}")
async def model(request: Request) -> Response:
    """Describe the served model, by its name: also its licence, training and accuracy."""
    require_model(request.path_params["model"], edge_of(request).pipeline.card)
    return JsonResponse(served_model(request))


def served_model(request: Request) -> Model:
    edge = edge_of(request)
    return Model.of(edge.pipeline.card, edge.started_at, edge.pipeline.images.are_shared)
