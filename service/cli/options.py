"""Define the options that several commands share."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import typer

from service.cli.terminal import fail
from service.core.viewport import FAR_FROM_SQUARE, AskedFit
from service.system.environment import SecretFileError, with_platform, with_secrets

REDIS_URL = "GLIMPSE_REDIS_URL"


def utf8(given: Any) -> Any:
    """Check a text that is kept or sent: JSON holds no other. Raises typer.BadParameter."""
    for text in given if isinstance(given, list) else [given]:
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):  # bytes of another kind
            raise typer.BadParameter(f"{text!a} is not UTF-8 text")
    return given


RedisUrl = Annotated[
    str | None,
    typer.Option(
        envvar=REDIS_URL,
        callback=utf8,
        help=f"redis://[[user]:password@]host:port/db of the gateways [default: what the file of {REDIS_URL}_FILE "
        "says].",
        show_default=False,
    ),
]
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


def redis_url_of(given: str | None) -> str | None:
    """Return the given address, or else the environment's: GLIMPSE_REDIS_URL, or the file that GLIMPSE_REDIS_URL_FILE
    names. Ends the command if the file cannot be read.
    """
    if given and given != os.environ.get(REDIS_URL):
        return given
    try:
        return with_secrets(os.environ, [REDIS_URL]).get(REDIS_URL) or None
    except SecretFileError as exc:
        fail(str(exc))


def budget(
    vision_tokens: tuple[int, int] | None, visual_tokens: tuple[int, int] | None
) -> dict[str, tuple[int, int]] | None:
    given = {"vision_tokens": vision_tokens, "visual_tokens": visual_tokens}
    return {name: tokens for name, tokens in given.items() if tokens} or None
