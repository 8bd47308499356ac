"""What /openapi.json says of routes that read their bodies themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from service.core.errors import STATUS
from service.edges.http.body import FORM, JSON
from service.edges.http.schema import (
    ErrorBody,
    Health,
    ModelList,
    UploadedImage,
    VqaAnswer,
    VqaEnd,
    VqaForm,
    VqaRequest,
)


class Api(FastAPI):
    """FastAPI whose routes read their bodies themselves, so their schemas are said here."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            spec = get_openapi(title=self.title, version=self.version, summary=self.summary, routes=self.routes)
            described = (VqaRequest, VqaForm, VqaAnswer, VqaEnd, UploadedImage, ModelList, Health, ErrorBody)
            _, schemas = models_json_schema(
                [(model, "validation") for model in described], ref_template="#/components/schemas/{model}"
            )
            spec["components"] = {"schemas": schemas["$defs"]}
            for path, method, operation in OPERATIONS:
                spec["paths"][path][method] |= operation
            self.openapi_schema = spec
        return self.openapi_schema


def _schema(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


def _errors(*statuses: int) -> dict[str, Any]:
    meaning = {status: kind.__name__ for kind, (status, _) in STATUS.items()}
    return {
        str(status): {"description": meaning[status], "content": {JSON: _schema("ErrorBody")}} for status in statuses
    }


EXAMPLE_IMAGE = (  # 1x1 PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
EXAMPLE_QUESTION = {"image": EXAMPLE_IMAGE, "question": "what colour is the circle?"}
EXAMPLES = {
    "short": {"summary": "A question", "value": EXAMPLE_QUESTION},
    "stream": {"summary": "Streamed, at most 8 tokens", "value": EXAMPLE_QUESTION | {"stream": True, "max_tokens": 8}},
    "by id": {
        "summary": "About an image that was sent before",
        "value": {"image": "img_6d0f1c0a4f5b2e3c9a8b7c6d5e4f3a2b", "question": "how many circles are there?"},
    },
    "several images": {
        "summary": "About several images",
        "value": {"images": [EXAMPLE_IMAGE, EXAMPLE_IMAGE], "question": "which of them is red?"},
    },
    "turns": {
        "summary": "With what was said before",
        "value": EXAMPLE_QUESTION
        | {"question": "and how large is it?", "turns": [{"question": "what colour is the circle?", "answer": "red"}]},
    },
    "all": {
        "summary": "Every knob",
        "value": EXAMPLE_QUESTION
        | {"max_tokens": 64, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.1}
        | {"stop": ["."], "budget": {"vision_tokens": [64, 128]}, "detail": "auto", "timeout_s": 10}
        | {"explain": True},
    },
}
EVENTS = {
    "schema": {"type": "string"},
    "example": (
        'data: {"id":"vqa_1","delta":"red"}\n\n'
        'data: {"id":"vqa_1","finish_reason":"stop", ... as in JSON, without the text}\n\n'
        "data: [DONE]\n\n"
    ),
}
TENANT = {
    "name": "x-tenant-id",
    "in": "header",
    "description": "Who asks: tenants that give a name share the service fairly and leave room for each other.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"},
}
OPERATIONS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "/v1/vqa",
        "post",
        {
            "parameters": [TENANT],
            "requestBody": {
                "required": True,
                "content": {JSON: _schema("VqaRequest") | {"examples": EXAMPLES}, FORM: _schema("VqaForm")},
            },
            "responses": {
                "200": {
                    "description": "The answer",
                    "content": {JSON: _schema("VqaAnswer"), "text/event-stream": EVENTS},
                }
            }
            | _errors(400, 404, 408, 413, 415, 429, 500, 503, 504),
        },
    ),
    (
        "/v1/images",
        "post",
        {
            "parameters": [TENANT],
            "requestBody": {
                "required": True,
                "content": {
                    "image/*": {"schema": {"type": "string", "format": "binary"}},
                    FORM: {
                        "schema": {
                            "type": "object",
                            "properties": {"image": {"type": "string", "format": "binary"}},
                            "required": ["image"],
                            "additionalProperties": False,
                        }
                    },
                },
            },
            "responses": {"200": {"description": "Kept", "content": {JSON: _schema("UploadedImage")}}}
            | _errors(400, 408, 413, 415, 429, 500, 504),
        },
    ),
    (
        "/v1/models",
        "get",
        {"responses": {"200": {"description": "The model", "content": {JSON: _schema("ModelList")}}}},
    ),
    ("/health/live", "get", {"responses": {"200": {"description": "Alive", "content": {JSON: _schema("Health")}}}}),
    (
        "/health/ready",
        "get",
        {
            "responses": {
                "200": {"description": "Ready", "content": {JSON: _schema("Health")}},
                "503": {"description": "Not ready, and why", "content": {JSON: _schema("Health")}},
            }
        },
    ),
]
