"""End a command: with one line that says what is wrong, or as another program."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar, cast

import typer

SET_UP = Path(__file__).resolve().parents[2] / "scripts" / "set_up.py"
DEBUG = "GLIMPSE_DEBUG"  # set to anything, an error shows its traceback
MAX_LINE_CHARS = 300
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
T = TypeVar("T")


def run(command: Callable[[], object]) -> int:
    """Run the command and return its exit status. Tell whatever ends it in one line: this is the last handler."""
    status: object = 0
    try:
        prepare_output()
        try:
            command()
        except SystemExit as ended:
            raise_silenced(ended)
            status = ended.code
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk is told here, not when Python ends
    except BaseException as exc:
        silence(sys.stdout)
        tell(exc)
        return INTERRUPTED if isinstance(exc, KeyboardInterrupt) else 1
    return status if isinstance(status, int) else int(status is not None)


def raise_silenced(ended: SystemExit) -> None:
    """Raise what Typer turned into an exit without a word: Ctrl-C, and output that nobody reads."""
    before = ended.__context__
    for exc in (before, before.__cause__ if before else None):
        if isinstance(exc, KeyboardInterrupt | BrokenPipeError):
            raise exc from None


def prepare_output() -> None:
    """Let no character that the terminal cannot show end the command. Raises OSError if output is closed."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    for output in (sys.stdout, sys.stderr):
        if output is not None and hasattr(output, "reconfigure"):
            output.reconfigure(errors="backslashreplace")


def silence(output: TextIO | None) -> None:
    """Drop what it still holds: Python would fail again when it writes that at its end."""
    if output is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, output.fileno())
        os.close(nowhere)


def tell(exc: BaseException) -> None:
    """Print one line on standard error; the traceback in front of it with GLIMPSE_DEBUG."""
    try:
        if os.environ.get(DEBUG):
            traceback.print_exception(exc)
        typer.echo(f"glimpse: {in_a_line(exc)}", err=True)
    except OSError:
        silence(sys.stderr)  # nowhere is left to say it


def in_a_line(exc: BaseException) -> str:
    """What went wrong, for the user."""
    if isinstance(exc, KeyboardInterrupt):
        return "interrupted"
    if isinstance(exc, BrokenPipeError):
        return "the program that reads the output has ended"
    if isinstance(exc, OSError):
        what = exc.strerror or str(exc)
        return f"{exc.filename}: {what}" if exc.filename else what
    words = " ".join(str(exc).split())[:MAX_LINE_CHARS]
    return f"this failed unexpectedly ({type(exc).__name__}: {words}); {DEBUG}=1 shows where"


def become(module: str, arguments: list[str], *, goal: str, needs: str) -> None:
    """Replace this process by `python -m module`, which gets the signals and sets the exit status.

    Its help needs nothing that only its work needs, and is shown in this process.
    """
    if {"-h", "--help"}.isdisjoint(arguments):
        require(needs, goal)
        os.execv(sys.executable, [sys.executable, "-m", module, *arguments])
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except ImportError as exc:
        missing(cast(str, exc.name), goal)


def require(module: str, goal: str) -> None:
    """End the command if a library is missing; `goal` is the argument of scripts/set_up.py that installs it."""
    if importlib.util.find_spec(module) is None:
        missing(module, goal)


def missing(module: str, goal: str) -> NoReturn:
    if SET_UP.exists():
        fail(f"this needs {module}, which is not installed: run `python3 {SET_UP} {goal}`")
    fail(f"this needs {module}, which an installed package or an image of Glimpse lacks: run it in Glimpse's folder")


def finished(work: Coroutine[Any, Any, T], fault: type[Exception]) -> T:
    """Run a coroutine to its end; a fault of this kind ends the command with one line."""

    async def run_it() -> T:
        return await work

    try:
        return asyncio.run(run_it())
    except fault as exc:
        fail(str(exc))


def fail(message: str) -> NoReturn:
    """End the command with status 1."""
    typer.echo(f"glimpse: {message}", err=True)
    raise typer.Exit(1)
