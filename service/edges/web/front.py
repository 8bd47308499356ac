"""Serve the page at /: files of this package, which need no build and no other host."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

STATIC = Path(__file__).parent / "static"  # README.md in it says what each file is for
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
# Nothing is allowed but this service's own files and calls: no inline script or style, no other host, no frame.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",  # a GIF or a WebP that the visitor chose, to show it moving
        "media-src blob:",  # a video that the visitor chose, to show its frames
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "cache-control": "no-cache",  # kept, but compared by its ETag each time: an upgrade shows at once
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
# For programs. Relative to /, so that they hold behind a path too.
LINKS = {
    "ask": "v1/vqa",
    "images": "v1/images",
    "models": "v1/models",
    "docs": "docs",
    "openapi": "openapi.json",
    "health": "health/ready",
    "metrics": "metrics",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """Hold one file of the page, read once when the service starts."""

    content: bytes
    media_type: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> StaticFile:
        content = path.read_bytes()
        return cls(content, MEDIA_TYPES[path.suffix], f'"{blake2b(content, digest_size=12).hexdigest()}"')

    def response(self, if_none_match: str, **headers: str) -> Response:
        """Answer 200 with the file, or 304 if the caller has it already."""
        headers |= HEADERS | {"etag": self.etag}
        known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
        if self.etag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


FILES = {path.name: StaticFile.read(path) for path in STATIC.iterdir() if path.suffix in MEDIA_TYPES}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def front(request: Request) -> Response:
    """The page; for a program that asks for JSON the addresses of the service."""
    if wants_json(request.headers.get("accept", "")):
        return JSONResponse({"service": "glimpse", "links": LINKS}, headers={"vary": "accept"})
    return FILES["index.html"].response(request.headers.get("if-none-match", ""), vary="accept")


@router.get("/page/{name}")
async def file(name: str, request: Request) -> Response:
    """One file that the page loads."""
    if name not in FILES:
        raise HTTPException(404)
    return FILES[name].response(request.headers.get("if-none-match", ""))


def wants_json(accept: str) -> bool:
    """Whether a caller names JSON and not HTML. A browser names HTML, curl names neither."""
    types = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    return "application/json" in types and "text/html" not in types
