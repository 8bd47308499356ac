"""Define the options that several commands share."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from service.core.viewport import FAR_FROM_SQUARE, AskedFit
from service.system.environment import with_platform

Url = Annotated[
    str | None,
    typer.Option(
        envvar="GLIMPSE_URL",
        help="Where the service answers [default: http://127.0.0.1:8080, or the address that GLIMPSE_HTTP_HOST and "
        "GLIMPSE_HTTP_PORT say].",
    ),
]

Detail = Literal["low", "high", "auto"]
Fit = Annotated[
    AskedFit | None,
    typer.Option(
        help="How an image that is not square is seen: squash changes its proportions, pad keeps them, tiles looks at "
        f"the whole and then at the part that matters, auto tiles what is longer than {FAR_FROM_SQUARE:g} to 1 and "
        "squashes the rest [default: the model's own]."
    ),
]


def url_of(given: str | None) -> str:
    """The given address, else the one that `glimpse serve` listens on with the same environment."""
    if given:
        return given
    host = os.environ.get("GLIMPSE_HTTP_HOST") or "127.0.0.1"
    if host in ("0.0.0.0", "::"):  # every address of the machine, this one too
        host = "127.0.0.1"
    port = with_platform(os.environ).get("GLIMPSE_HTTP_PORT") or "8080"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def budget(
    vision_tokens: tuple[int, int] | None, visual_tokens: tuple[int, int] | None
) -> dict[str, tuple[int, int]] | None:
    given = {"vision_tokens": vision_tokens, "visual_tokens": visual_tokens}
    return {name: tokens for name, tokens in given.items() if tokens} or None
