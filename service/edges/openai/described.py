"""Describe this edge's routes in /openapi.json."""

from __future__ import annotations

from typing import Any

from service.edges.http.body import FORM, JSON
from service.edges.http.openapi import (
    FILE,
    PATH_ID,
    SCENE,
    TENANT,
    Description,
    answering,
    errors,
    events_of,
    schema_of,
)
from service.edges.http.schema import Model, ModelList
from service.edges.openai.schema import ChatCompletion, ChatEvent, ChatRequest, DeletedFile, KeptFile

MODEL = "glimpse-reference"


def _example(summary: str, answer: str, messages: list[dict[str, Any]], /, **fields: Any) -> dict[str, Any]:
    """A chat that can be sent as it stands."""
    return {
        "summary": summary,
        "description": f"The reference model answers: {answer}",
        "value": {"model": MODEL, "messages": messages, **fields},
    }


def _user(*parts: str) -> dict[str, Any]:
    """A message of text and images, which are `data:` URLs or ids."""
    content = [
        {"type": "image_url", "image_url": {"url": part}}
        if part.startswith(("data:", "img_"))
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


IMAGE = f"data:image/webp;base64,{SCENE}"
EXAMPLES = {
    "short": _example("A question", "8", [_user("what character is on the pink square?", IMAGE)]),
    "turns": _example(
        "With an earlier turn, about its image",
        "yes",
        [
            _user("is there a pink square?", IMAGE),
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "is the pink square below the blue square?"},
        ],
        max_completion_tokens=8,
    ),
    "stream": _example(
        "Streamed, with usage",
        "cyan",
        [_user("what color is the triangle?", IMAGE)],
        stream=True,
        stream_options={"include_usage": True},
    ),
}
EVENTS = events_of("ChatEvent")
OPERATIONS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        "post",
        answering({JSON: schema_of("ChatRequest") | {"examples": EXAMPLES}}, "ChatCompletion", EVENTS),
    ),
    (
        "/v1/files",
        "post",
        {
            "parameters": [TENANT],
            "requestBody": {
                "required": True,
                "content": {
                    FORM: {
                        "schema": {
                            "type": "object",
                            "properties": {"file": FILE, "purpose": {"enum": ["vision", "user_data"]}},
                            "required": ["file", "purpose"],
                            "additionalProperties": False,
                        }
                    },
                },
            },
            "responses": {"200": {"description": "Kept", "content": {JSON: schema_of("KeptFile")}}}
            | errors(400, 408, 413, 415, 429, 500, 504),
        },
    ),
    (
        "/v1/files/{file_id}",
        "delete",
        {
            "parameters": [PATH_ID | {"name": "file_id"}, TENANT],
            "responses": {"200": {"description": "Deleted", "content": {JSON: schema_of("DeletedFile")}}}
            | errors(400, 404, 500, 503),
        },
    ),
    (
        "/v1/models",
        "get",
        {
            "parameters": [
                {
                    "name": "detail",
                    "in": "query",
                    "description": "`full` adds the model's metadata.",
                    "schema": {"enum": ["short", "full"], "default": "short"},
                }
            ],
            "responses": {"200": {"description": "The model", "content": {JSON: schema_of("ModelList")}}} | errors(400),
        },
    ),
    (
        "/v1/models/{model}",
        "get",
        {
            "parameters": [
                {
                    "name": "model",
                    "in": "path",
                    "required": True,
                    "description": "A name from `GET /v1/models`.",
                    "schema": {"type": "string"},
                }
            ],
            "responses": {"200": {"description": "The model", "content": {JSON: schema_of("Model")}}} | errors(404),
        },
    ),
]
DESCRIPTION = Description((ChatRequest, ChatCompletion, ChatEvent, KeptFile, DeletedFile, Model, ModelList), OPERATIONS)
