"""Describe the routes in /openapi.json. FastAPI cannot, because they read their bodies themselves."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.core.errors import STATUS
from service.edges.http import docs
from service.edges.http.access import is_open
from service.edges.http.batch import LINES
from service.edges.http.batch_schema import BatchLine, BatchQuestion
from service.edges.http.body import FORM, JSON
from service.edges.http.docs import STATIC
from service.edges.http.estimate import VqaEstimate
from service.edges.http.schema import (
    DeletedImage,
    ErrorBody,
    Health,
    UploadedImage,
    VqaAnswer,
    VqaEvent,
    VqaForm,
    VqaRequest,
)
from service.edges.http.variants import VariantList, VariantsUpdate


@dataclass(frozen=True, slots=True)
class Description:
    """What an edge's routes take and give."""

    models: Sequence[type[BaseModel]]  # whose schemas the operations name
    operations: Sequence[tuple[str, str, dict[str, Any]]]  # path, method, what the document says of it


class Api(FastAPI):
    """FastAPI whose routes read their bodies themselves, so their schemas are said in `descriptions`.

    `state.edge` has the limits that its settings give.
    """

    def __init__(self, descriptions: Sequence[Description], **said: Any) -> None:
        super().__init__(docs_url=None, redoc_url=None, **said)
        self.descriptions = descriptions
        self.include_router(docs.router)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            spec = get_openapi(title=self.title, version=self.version, summary=self.summary, routes=self.routes)
            described = [(model, "validation") for each in self.descriptions for model in each.models]
            _, schemas = models_json_schema(described, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            spec["components"] = {"schemas": schemas["$defs"]}
            limits = self.state.edge.questions
            for schema in schemas["$defs"].values():
                fields = schema.get("properties", {})
                if "question" in fields and "timeout_s" in fields:
                    fields["question"]["maxLength"] = limits.max_question_chars
                if "timeout_s" in fields:
                    fields["timeout_s"]["anyOf"][0]["maximum"] = limits.max_timeout_s
            for each in self.descriptions:
                for path, method, operation in each.operations:
                    spec["paths"][path][method] |= operation
            if not self.state.edge.pipeline.has_variants:
                leave_out(spec, VARIANT, SESSION)
            if self.state.edge.access.has_keys:
                self._need_keys(spec)
            self.openapi_schema = spec
        return self.openapi_schema

    def _need_keys(self, spec: dict[str, Any]) -> None:
        """Say which operations need a key. Its tenant is the caller's, so no header names one."""
        spec["components"]["securitySchemes"] = KEYS
        for path, operations in spec["paths"].items():
            if is_open(path, self.state.edge.metrics_are_open):
                continue
            for operation in operations.values():
                operation["security"] = [{name: []} for name in KEYS]
                operation["responses"] = operation["responses"] | errors(401, 403)
        leave_out(spec, TENANT)


def leave_out(spec: dict[str, Any], *parameters: dict[str, Any]) -> None:
    """Take parameters out of all operations."""
    for operation in (operation for operations in spec["paths"].values() for operation in operations.values()):
        if "parameters" in operation:
            operation["parameters"] = [each for each in operation["parameters"] if each not in parameters]


def schema_of(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


def errors(*statuses: int) -> dict[str, Any]:
    meaning = {status: kind.__name__ for kind, (status, _) in STATUS.items()}
    return {
        str(status): {"description": meaning[status], "content": {JSON: schema_of("ErrorBody")}} for status in statuses
    }


def answering(content: dict[str, Any], answer: str, events: dict[str, Any]) -> dict[str, Any]:
    """A route that takes a question as `content`, and answers with the schema named `answer` or with `events`."""
    answers = {"description": "The answer", "content": {JSON: schema_of(answer), "text/event-stream": events}}
    return {
        "parameters": [TENANT, VARIANT, SESSION],
        "requestBody": {"required": True, "content": content},
        "responses": {"200": answers} | errors(400, 404, 408, 413, 415, 429, 500, 503, 504),
    }


def events_of(name: str) -> dict[str, Any]:
    """Server-sent events, whose data is of the schema `name`. OpenAPI 3.2 has itemSchema, and FastAPI writes it into
    3.1 too."""
    return {
        "itemSchema": {
            "type": "object",
            "description": f"Each event's data is a {name} as JSON; the last one's is `[DONE]`.",
            "properties": {
                "data": {
                    "type": "string",
                    "anyOf": [
                        {"const": "[DONE]"},
                        {
                            "contentMediaType": JSON,
                            "contentSchema": {"$ref": f"#/components/schemas/{name}"},
                        },
                    ],
                }
            },
            "required": ["data"],
        },
    }


def _image(name: str) -> str:
    return base64.b64encode((STATIC / name).read_bytes()).decode()


def _example(summary: str, answer: str, /, **changes: Any) -> dict[str, Any]:
    """A question that can be sent as it stands."""
    asked = {"image": SCENE, "question": "what character is on the pink square?"} | changes
    return {
        "summary": summary,
        "description": f"The reference model answers: {answer}",
        "value": {name: value for name, value in asked.items() if value is not None},
    }


SCENE, OTHER_SCENE = _image("scene.webp"), _image("other_scene.webp")
LONG_ANSWER = (
    "a large blue ring, a large pink square with 8, a large cyan triangle with 5 and a medium blue square with x"
)
EXAMPLES = {
    "short": _example("A question", "8"),
    "stream": _example("Streamed", LONG_ANSWER, question="describe the image.", stream=True),
    "several images": _example(
        "About several images",
        "first",
        image=None,
        images=[SCENE, OTHER_SCENE],
        question="which image has a blue square?",
    ),
    "turns": _example(
        "With what was said before",
        "yes",
        question="is the pink square below the blue square?",
        turns=[{"question": "is there a pink square?", "answer": "yes"}],
        max_tokens=8,
    ),
    "all": _example(
        "Every knob",
        "8",
        max_tokens=64,
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        seed=7,
        repetition_penalty=1.1,
        stop=["."],
        budget={"vision_tokens": [64, 128]},
        detail="auto",
        fit="pad",
        timeout_s=10,
        priority="low",
        explain=True,
    ),
}
EVENTS = events_of("VqaEvent") | {
    "example": (
        'data: {"id":"vqa_1","delta":"red"}\n\n'
        'data: {"id":"vqa_1","model":"glimpse-reference","finish_reason":"stop","image_ids":["img_1"],'
        '"usage":{"prompt_tokens":13,"completion_tokens":1,"image_tokens":32},'
        '"vision":{"cache":"miss","vision_tokens":133,"visual_tokens":32,"detail":"low","reduced":false,"fit":"squash",'
        '"familiar":0.997},'
        '"timing_ms":{"queue":0.1,"load":1.6,"vision":24.9,"first_token":35.2,"total":35.6}}\n\n'
        "data: [DONE]\n\n"
    ),
}
# What an answer leads to: a question about the image that was sent.
LINKS = {
    "ask": {
        "operationId": "ask_v1_vqa_post",
        "requestBody": {"image": "$response.body#/id", "question": "how many objects are there?"},
        "description": "Ask about the image by its id.",
    }
}
# An item that is wrong is a result with an error, and not a refusal of the batch. So its schema is only named.
BATCH = {
    "anyOf": [
        {
            "type": "array",
            "minItems": 1,
            "items": {"description": "Each a BatchQuestion. One that is not gets a result with an error."},
        },
        {"type": "object", "description": "One question alone, as a line of its own would be."},
    ]
}
BATCH_EXAMPLES = {
    "two": {
        "summary": "Two questions about one image",
        "description": "The reference model answers: 8, cyan",
        "value": [
            {"image": SCENE, "question": "what character is on the pink square?"},
            {"image": SCENE, "question": "what color is the triangle?"},
        ],
    }
}
FILE = {"type": "string", "format": "binary", "minLength": 1}
# Where a caller sends its key: either place will do.
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
PATH_ID = {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
TENANT = {
    "name": "x-tenant-id",
    "in": "header",
    "description": "The tenant's name. Tenants with a name share the service fairly and leave room for each other. "
    "An empty name is none.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]*$", "maxLength": 64},
}
VARIANT = {
    "name": "x-glimpse-variant",
    "in": "header",
    "description": "The variant that must answer, for testers. Without it the weights decide. An empty name is none.",
    "schema": {"type": "string", "maxLength": 64},
}
SESSION = {
    "name": "x-session-id",
    "in": "header",
    "description": "Questions of one session stay with one variant. Without it those about one image id do.",
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]*$", "maxLength": 128},
}
OPERATIONS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "/v1/vqa",
        "post",
        answering(
            {JSON: schema_of("VqaRequest") | {"examples": EXAMPLES}, FORM: schema_of("VqaForm")},
            "VqaAnswer",
            EVENTS,
        ),
    ),
    (
        "/v1/vqa/batch",
        "post",
        {
            "parameters": [TENANT],
            "requestBody": {
                "required": True,
                "content": {JSON: {"schema": BATCH, "examples": BATCH_EXAMPLES}}
                | {kind: {"schema": {"type": "string", "minLength": 1}} for kind in LINES},
            },
            "responses": {
                "200": {
                    "description": "Each result as a line, in the order in which they are ready",
                    "content": {LINES[0]: {"itemSchema": {"$ref": "#/components/schemas/BatchLine"}}},
                }
            }
            | errors(400, 408, 413, 415, 429, 500, 503),
        },
    ),
    (
        "/v1/vqa/estimate",
        "post",
        {
            "parameters": [TENANT],
            "requestBody": {
                "required": True,
                "content": {JSON: schema_of("VqaRequest"), FORM: schema_of("VqaForm")},
            },
            "responses": {"200": {"description": "The estimate", "content": {JSON: schema_of("VqaEstimate")}}}
            | errors(400, 404, 408, 413, 415, 429, 500, 503, 504),
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
                    "image/*": {"schema": FILE},
                    "video/*": {"schema": FILE},
                    "application/pdf": {"schema": FILE},
                    FORM: {
                        "schema": {
                            "type": "object",
                            "properties": {"image": FILE, "video": FILE},
                            "oneOf": [{"required": ["image"]}, {"required": ["video"]}],
                            "additionalProperties": False,
                        }
                    },
                },
            },
            "responses": {
                "200": {"description": "Kept", "content": {JSON: schema_of("UploadedImage")}, "links": LINKS},
            }
            | errors(400, 408, 413, 415, 429, 500, 503, 504),
        },
    ),
    (
        "/v1/images/{image_id}",
        "delete",
        {
            "parameters": [PATH_ID | {"name": "image_id"}, TENANT],
            "responses": {"200": {"description": "Deleted", "content": {JSON: schema_of("DeletedImage")}}}
            | errors(400, 404, 500, 503),
        },
    ),
    (
        "/v1/variants",
        "get",
        {
            "responses": {"200": {"description": "The variants", "content": {JSON: schema_of("VariantList")}}}
            | errors(403)
        },
    ),
    (
        "/v1/variants",
        "patch",
        {
            "requestBody": {
                "required": True,
                "content": {
                    JSON: schema_of("VariantsUpdate")
                    | {
                        "example": {"weights": {"stable": 95, "next": 5}, "draining": {"next": False}},
                    }
                },
            },
            "responses": {"200": {"description": "Changed", "content": {JSON: schema_of("VariantList")}}}
            | errors(400, 403, 404, 408, 413, 415, 503),
        },
    ),
    ("/health/live", "get", {"responses": {"200": {"description": "Alive", "content": {JSON: schema_of("Health")}}}}),
    (
        "/health/ready",
        "get",
        {
            "responses": {
                "200": {"description": "Ready", "content": {JSON: schema_of("Health")}},
                "503": {"description": "Not ready, and why", "content": {JSON: schema_of("Health")}},
            }
        },
    ),
]

MODELS = (
    *(VqaRequest, VqaForm, VqaAnswer, VqaEvent, VqaEstimate),
    *(BatchQuestion, BatchLine, UploadedImage, DeletedImage, Health, ErrorBody),
    *(VariantList, VariantsUpdate),
)
DESCRIPTION = Description(MODELS, OPERATIONS)
