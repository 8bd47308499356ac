"""Make the HTTP application: every route, the error handlers and the middleware."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from service.core.errors import GlimpseError
from service.edges.http import batch, cors, estimate, images, openapi, operations, variants, vqa
from service.edges.http.edge import Edge
from service.edges.http.openapi import Api
from service.edges.http.respond import RequestScope, respond_to_error, respond_to_no_route
from service.edges.openai import chat, described, files, models
from service.edges.vertex import predict
from service.edges.web import front


def http_api(edge: Edge) -> FastAPI:
    """Make the application, but start nothing: the composition root starts the parts behind the edge."""
    api = Api(
        (openapi.DESCRIPTION, described.DESCRIPTION),
        title="Glimpse",
        version="0.1.0",
        summary="Answers questions about images, and looks more closely at the parts that a question needs.",
    )
    api.state.edge = edge
    routers = [each.router for each in (vqa, batch, estimate, images, chat, files, models, variants, operations, front)]
    if predict.PREDICT in edge.aliases.values():
        routers.append(predict.router)
    for router in routers:
        api.include_router(router)
    api.add_exception_handler(GlimpseError, respond_to_error)
    api.add_exception_handler(HTTPException, respond_to_no_route)
    api.add_middleware(RequestScope, edge=edge, direct=direct_routes(routers))
    if edge.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=edge.cors_origins,
            allow_methods=cors.METHODS,
            allow_headers=cors.SENT,
            expose_headers=cors.READ,
        )
    return api


def direct_routes(routers: Sequence[APIRouter]) -> dict[tuple[str, str], APIRoute]:
    """Return the routes that take a body, by method and path. Each reads it itself, from the request alone."""
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    return {("POST", route.path): route for route in routes if "POST" in (route.methods or ())}
