"""Make the HTTP application: every route, the error handlers and the middleware."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from service.core.access import QUOTA_HEADERS
from service.core.errors import GlimpseError
from service.edges.caller import KEY_HEADERS, SESSION_KEY, TENANT_KEY, TRACE_ID_KEY, VARIANT_KEY
from service.edges.http import batch, estimate, images, openapi, operations, variants, vqa
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
    for routes in (vqa, batch, estimate, images, chat, files, models, variants, operations, front):
        api.include_router(routes.router)
    if predict.PREDICT in edge.aliases.values():
        api.include_router(predict.router)
    api.add_exception_handler(GlimpseError, respond_to_error)
    api.add_exception_handler(HTTPException, respond_to_no_route)
    api.add_middleware(RequestScope, edge=edge)
    if edge.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=edge.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=(
                *KEY_HEADERS,
                "content-encoding",
                "content-type",
                SESSION_KEY,
                TENANT_KEY,
                TRACE_ID_KEY,
                VARIANT_KEY,
            ),
            expose_headers=(TRACE_ID_KEY, VARIANT_KEY, "retry-after", *QUOTA_HEADERS),
        )
    return api
