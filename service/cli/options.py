"""Define the options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

URL = "http://127.0.0.1:8080"

Url = Annotated[str, typer.Option(help="Address of the service.")]

Detail = Literal["low", "high", "auto"]


def budget(
    vision_tokens: tuple[int, int] | None, visual_tokens: tuple[int, int] | None
) -> dict[str, tuple[int, int]] | None:
    given = {"vision_tokens": vision_tokens, "visual_tokens": visual_tokens}
    return {name: tokens for name, tokens in given.items() if tokens} or None
