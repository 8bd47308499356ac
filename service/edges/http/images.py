"""Serve POST /v1/images: take an image once, so that questions can name it by its id."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.core.errors import InvalidRequest
from service.edges.http.body import FORM, INLINE_PARSE_BYTES, parse_form, read_body
from service.edges.http.edge import caller_of, edge_of, present, reserved
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import UploadedImage

FORM_BYTES = 64 * 1024  # room for a form's own text

router = APIRouter()


@router.post("/v1/images")
async def keep_image(request: Request) -> Response:
    """Take an image once, so that questions can name its id until it expires. The body is the file, or a form."""
    edge = edge_of(request)
    reservation = reserved(request, caller_of(request).tenant)
    content_type = request.headers.get("content-type", "")
    is_form = content_type.lower().startswith(FORM)
    max_bytes = edge.bodies.max_image_bytes + (FORM_BYTES if is_form else 0)
    body = await read_body(request, max_bytes, edge.bodies, reservation)
    if is_form and len(body) > INLINE_PARSE_BYTES:
        image = await asyncio.to_thread(image_of, body, content_type)
    else:
        image = image_of(body, content_type) if is_form else body
    async with present(request.receive, edge.questions.default_timeout_s):
        return JsonResponse(UploadedImage.of(await edge.pipeline.keep_image(image, reservation)))


def image_of(body: bytes, content_type: str) -> bytes:
    """Return the one file of a form. Raises InvalidRequest."""
    parts = parse_form(body, content_type)
    if [part.name for part in parts] != ["image"]:
        names = ", ".join(part.name for part in parts) or "none"
        raise InvalidRequest(
            f"the form must have the one field image, it has {names}: use curl -F image=@FILE", param="image"
        )
    return bytes(parts[0].data)
