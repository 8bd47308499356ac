"""Serve POST /v1/files: take a file once, for clients of OpenAI's API. Another name of POST /v1/images."""

from __future__ import annotations

import time
from typing import Literal

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.core.errors import InvalidRequest, naming_field
from service.edges.asking import naming
from service.edges.http.body import FormPart, parse_form
from service.edges.http.faults import UNSUPPORTED
from service.edges.http.images import deleted, is_form, kept, read_upload
from service.edges.http.respond import JsonResponse
from service.edges.openai.schema import DeletedFile, KeptFile

PURPOSES: dict[bytes, Literal["vision", "user_data"]] = {b"vision": "vision", b"user_data": "user_data"}

router = APIRouter()


@router.post("/v1/files")
async def keep_file(request: Request) -> Response:
    """Take an image, a document or a video once, so that messages can name its id until it expires.

    The form has `file` and `purpose`.
    """
    with naming_field("file"):
        body, reservation = await read_upload(request)
        if not is_form(request):
            raise InvalidRequest(
                "the body is not a form: send the fields file and purpose as multipart/form-data",
                code="unsupported_content_type",
            )
        file, purpose = file_of(await parse_form(body, request.headers["content-type"]))
        image = await kept(file.content.all(), request, reservation)
    return JsonResponse(
        KeptFile(
            id=image.id,
            bytes=image.nbytes,
            created_at=int(time.time()),
            expires_at=int(image.expires_at),
            filename=file.options.get(b"filename", b"").decode(errors="replace"),
            purpose=purpose,
            width=image.width,
            height=image.height,
            pages=image.pages,
        )
    )


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request) -> Response:
    """Delete an image. Another name of DELETE /v1/images/{image_id}."""
    with naming({"image": "file_id"}):
        return JsonResponse(DeletedFile(id=await deleted(request, request.path_params["file_id"])))


def file_of(parts: list[FormPart]) -> tuple[FormPart, Literal["vision", "user_data"]]:
    """Return the form's file and its purpose. Raises InvalidRequest."""
    fields: dict[str, FormPart] = {}
    for part in parts:
        name = part.name
        if name.startswith("expires_after"):
            raise InvalidRequest(
                "expires_after is not supported: leave it out, expires_at in the answer says how long the file is kept",
                param="expires_after",
                code=UNSUPPORTED,
            )
        if name not in ("file", "purpose"):
            raise InvalidRequest(
                f"there is no field {name!r}: the fields are file, purpose", param=name, code="unknown_field"
            )
        if name in fields:
            raise InvalidRequest(f"{name} is given twice: send it once", param=name)
        fields[name] = part
    for name in ("file", "purpose"):
        if name not in fields:
            raise InvalidRequest(f"the field {name} is missing", param=name, code="missing_field")
    if fields["purpose"].data not in PURPOSES:
        raise InvalidRequest("purpose is not supported: send vision or user_data", param="purpose", code=UNSUPPORTED)
    return fields["file"], PURPOSES[fields["purpose"].data]
