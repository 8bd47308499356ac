"""End a command: with one line that says what is wrong, or as another program."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

import typer

SET_UP = Path(__file__).resolve().parents[2] / "scripts" / "set_up.py"


def become(module: str, arguments: list[str], *, goal: str, needs: str) -> None:
    """Replace this process by `python -m module`, which gets the signals and sets the exit status."""
    require(needs, goal)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def require(module: str, goal: str) -> None:
    """End the command if a library is missing; `goal` is the argument of scripts/set_up.py that installs it."""
    if importlib.util.find_spec(module) is None:
        fail(f"this needs {module}, which is not installed: run `python3 {SET_UP} {goal}`")


def fail(message: str) -> NoReturn:
    """End the command with status 1."""
    typer.echo(f"glimpse: {message}", err=True)
    raise typer.Exit(1)
