"""Serve GET /v1/models and /v1/models/{model}: what a request's `model` may name, with our fields beside OpenAI's."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.core.card import ModelCard
from service.core.errors import InvalidRequest
from service.core.variant import Route
from service.edges.http.edge import edge_of
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import Model, ModelList

router = APIRouter()


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """Describe what can be asked, in short; with `?detail=full` as `GET /v1/models/{model}` does.

    Without variants this is the served model. With variants, the first name leaves the choice to their weights, and
    each further one is a variant's.
    """
    detail = request.query_params.get("detail", "short")
    if detail not in ("short", "full"):
        raise InvalidRequest("detail must be short or full", param="detail")
    offered = [described(request, name, card) for name, card in edge_of(request).pipeline.offers()]
    if detail == "short":
        offered = [each.model_copy(update={"metadata": None}) for each in offered]
    return JsonResponse(ModelList(data=offered))


@router.get("/v1/models/{model}")
async def model(request: Request) -> Response:
    """Describe one model, by its name: also its licence, training and accuracy."""
    name = request.path_params["model"]
    return JsonResponse(described(request, name, edge_of(request).pipeline.card_for(Route(model=name))))


def described(request: Request, name: str, card: ModelCard) -> Model:
    edge = edge_of(request)
    told = Model.of(card, edge.started_at, edge.pipeline.images.are_shared)
    return told.model_copy(update={"id": name, "card": card.name if card.name != name else None})
