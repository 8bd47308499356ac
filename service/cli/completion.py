"""`glimpse completion`: print what a shell needs to complete the command's words."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer
from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]

NAME = "glimpse"
VARIABLE = "_GLIMPSE_COMPLETE"  # with it, the script asks the command itself what may come next


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell that reads it.")],
) -> None:
    """Print a script that completes this command's words in a shell.

    \b
      source <(glimpse completion bash)                                          # in ~/.bashrc
      source <(glimpse completion zsh)                                           # in ~/.zshrc, after compinit
      glimpse completion fish > ~/.config/fish/completions/glimpse.fish
    """
    typer.echo(get_completion_script(prog_name=NAME, complete_var=VARIABLE, shell=shell))


def prepare() -> None:
    """Make the command able to answer the script."""
    if VARIABLE in os.environ:
        completion_init()
