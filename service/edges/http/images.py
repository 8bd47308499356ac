"""Serve POST /v1/images: take an image or a video once, so that questions can name it by its id."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.core.answer import KeptImage
from service.core.errors import InvalidRequest, naming_field
from service.edges.http.body import FORM, parse_form, read_body
from service.edges.http.edge import caller_of, edge_of, present, reserved
from service.edges.http.respond import JsonResponse
from service.edges.http.schema import DeletedImage, UploadedImage
from service.edges.slices import joined
from service.pipeline import Reservation

FORM_BYTES = 64 * 1024  # room for a form's own text

router = APIRouter()


@router.post("/v1/images")
async def keep_image(request: Request) -> Response:
    """Take an image, a document or a video once, so that questions can name its id until it expires.

    The body is the file, or a form.
    """
    body, reservation = await read_upload(request)
    if not is_form(request):
        return JsonResponse(UploadedImage.of(await kept(body, request, reservation)))
    field, image = await image_of(body, request.headers["content-type"])
    with naming_field(field):
        return JsonResponse(UploadedImage.of(await kept(image, request, reservation)))


@router.delete("/v1/images/{image_id}")
async def delete_image(request: Request) -> Response:
    """Delete an image. Every gateway forgets it within a second; features that were made of it stay in the caches."""
    return JsonResponse(DeletedImage(id=await deleted(request, request.path_params["image_id"])))


async def deleted(request: Request, image_id: str) -> str:
    """Delete the caller's image -> its id. Raises NotFound, Unavailable."""
    await edge_of(request).pipeline.images.delete(image_id, caller_of(request).tenant)
    return image_id


async def read_upload(request: Request) -> tuple[Sequence[bytes], Reservation]:
    """Reserve and read a body that holds one image, in pieces. Raises what `read_body` does."""
    edge = edge_of(request)
    reservation = reserved(request, caller_of(request).tenant)
    max_bytes = edge.bodies.max_image_bytes + (FORM_BYTES if is_form(request) else 0)
    return await read_body(request, max_bytes, edge.bodies, reservation), reservation


def is_form(request: Request) -> bool:
    return request.headers.get("content-type", "").lower().startswith(FORM)


async def kept(image: Sequence[bytes], request: Request, reservation: Reservation) -> KeptImage:
    """Check and keep an image, which comes in pieces, while the caller is there.

    Raises what `Pipeline.keep_image` and `present` do.
    """
    edge, data = edge_of(request), await joined(image)
    async with present(request.receive, edge.questions.default_timeout_s, reservation):
        return await edge.pipeline.keep_image(data, reservation)


async def image_of(body: Sequence[bytes], content_type: str) -> tuple[str, Sequence[bytes]]:
    """Return the name and the file of a form's one field, in pieces. Raises InvalidRequest."""
    parts = await parse_form(body, content_type)
    if [part.name for part in parts] not in (["image"], ["video"]):
        names = ", ".join(part.name for part in parts) or "none"
        raise InvalidRequest(
            f"the form must have one field, image or video, and it has {names}: use curl -F image=@FILE", param="image"
        )
    return parts[0].name, parts[0].content.all()
