"""GET /docs and GET /redoc: the API to try and to read, from files of the package, so that they need no internet."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

STATIC = Path(__file__).parent / "static"  # README.md in it names source and licence

# Relative addresses, so that it works behind a path too. Swagger UI asks swagger.io to check what is not on localhost;
# "none" stops that.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Glimpse: API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui">This page needs JavaScript. The same is in <a href="openapi.json">openapi.json</a>.</div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>
SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: "none"})
</script>
</body>
</html>
"""

REDOC = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Glimpse: API reference</title>
<link rel="icon" href="data:,">
</head>
<body>
<redoc spec-url="openapi.json" disable-search="true"></redoc>
<script src="docs/redoc.standalone.js"></script>
</body>
</html>
"""
# ReDoc writes its styles into the page, and asks its maker's host for a logo, which is not allowed here.
REDOC_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter(include_in_schema=False)


@router.get("/docs")
async def docs() -> Response:
    return HTMLResponse(PAGE)


@router.get("/redoc")
async def redoc() -> Response:
    return HTMLResponse(REDOC, headers={"content-security-policy": REDOC_POLICY})


@router.get("/docs/redoc.standalone.js")
async def redoc_script(request: Request) -> Response:
    return packed("redoc.standalone.js.gz", "text/javascript", request)


@router.get("/docs/swagger-ui-bundle.js")
async def script(request: Request) -> Response:
    return packed("swagger-ui-bundle.js.gz", "text/javascript", request)


@router.get("/docs/swagger-ui.css")
async def style(request: Request) -> Response:
    return packed("swagger-ui.css.gz", "text/css", request)


def packed(name: str, media_type: str, request: Request) -> Response:
    """The file as it is kept, with gzip; unpacked for a caller that does not take that."""
    headers = {"cache-control": "max-age=86400", "vary": "accept-encoding"}
    if "gzip" in request.headers.get("accept-encoding", ""):
        content = (STATIC / name).read_bytes()
        headers["content-encoding"] = "gzip"
    else:
        content = unpacked(name)
    return Response(content, media_type=media_type, headers=headers)


@functools.cache
def unpacked(name: str) -> bytes:
    """Unpacking takes 10 ms."""
    return gzip.decompress((STATIC / name).read_bytes())
