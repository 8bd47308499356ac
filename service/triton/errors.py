"""Translate Triton's errors to GlimpseError, from a gRPC status or from an error's text."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

import grpc  # type: ignore[import-untyped]

from service.core.errors import (
    DeadlineExceeded,
    GlimpseError,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from service.core.guide import GUIDE, Guide

# The text decides first, whatever the code is; then the code. Any other error is an InternalError.
ERROR_TEXTS: tuple[tuple[str, type[GlimpseError]], ...] = (
    ("Exceeds maximum queue size", Overloaded),
    ("Maximum queue size of", Overloaded),  # "... 64 has been reached": the executor's queue in TensorRT-LLM
    ("is not healthy", Unavailable),  # "Stub process 'llm_0_0' is not healthy.": the model's process died
    ("unknown model", Unavailable),  # not loaded now
    ("Server not ready", Unavailable),  # starting or stopping
    ("Shutdown called", Unavailable),  # TensorRT-LLM's executor is stopping
    ("message larger than max", InternalError),
)
ERROR_CODES: Mapping[grpc.StatusCode, type[GlimpseError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,  # no connection, the model is loading, the server is stopping
    grpc.StatusCode.NOT_FOUND: Unavailable,  # the model is not loaded
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Unavailable,  # by the server: our own cancels raise CancelledError
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
}
# A step of an ensemble gave no outputs, as its model's process has just ended, so that the next step lacks inputs. If
# the gateway sent too few, the text does not speak of a step.
_STEP_WITHOUT_OUTPUTS = re.compile(
    r"in ensemble '[^']*', .*expected \d+ inputs but got \d+ inputs for model", re.DOTALL
)
_UNHEALTHY = re.compile(r"Stub process '(?P<model>.+)_\d+_\d+' is not healthy")
_CODED = re.compile(r"(?:\[request id: [^]]*\] )?(?P<code>[A-Z_]+): (?P<text>.*)", re.DOTALL)
MESSAGES: Mapping[type[GlimpseError], str] = {
    Unavailable: "the model {model} does not answer: try again in a few seconds",
    Overloaded: "the model {model} has no room for another request: try again",
    DeadlineExceeded: "the model {model} did not finish in time: raise timeout_s or try again",
    InternalError: "the model {model} failed",
}


def unhealthy_model(cause: str) -> str | None:
    """Return the model whose process does not report, if Triton's text says so of one."""
    found = _UNHEALTHY.search(cause)
    return found["model"] if found else None


@contextlib.contextmanager
def translated(model: str) -> Iterator[None]:
    """Translate gRPC's errors. This is the only place that does."""
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        raise translate(model, exc.code(), exc.details() or "") from exc
    except grpc.aio.BaseError as exc:  # the channel was closed under the call
        raise Unavailable(MESSAGES[Unavailable].format(model=model)) from exc


@contextlib.contextmanager
def naming_constraint(guide: Guide | None) -> Iterator[None]:
    """Turn the LLM's error about GUIDE into one about the request's field."""
    try:
        yield
    except InvalidRequest as error:
        if guide is not None and guide.field and error.message.startswith(GUIDE):
            error.message = guide.field + error.message.removeprefix(GUIDE)
            error.args = (error.message,)
            error.param = guide.field
        raise


def translate(model: str, code: grpc.StatusCode | None, text: str) -> GlimpseError:
    """Translate Triton's code and text.

    A stream carries only the text, so the LLM's text begins with the code. A client could ask for a gRPC status instead
    (triton_grpc_error), but that may kill Triton 2.51.
    """
    if code is None and (coded := _CODED.fullmatch(text)) and coded["code"] in grpc.StatusCode.__members__:
        code, text = grpc.StatusCode[coded["code"]], coded["text"]
    if code is grpc.StatusCode.INVALID_ARGUMENT and text.startswith(GUIDE):
        return InvalidRequest(text)  # the rest may quote the caller
    by_text = (error for part, error in ERROR_TEXTS if part in text)
    by_code = ERROR_CODES.get(code, InternalError) if code else InternalError
    kind = Unavailable if _STEP_WITHOUT_OUTPUTS.search(text) else next(by_text, by_code)
    if kind is InvalidRequest:
        # Only the LLM checks a caller's values (lengths, sampling). A wrong tensor elsewhere is a fault of the gateway.
        if model == "llm" and "unexpected" not in text and "expected number of inputs" not in text:
            return InvalidRequest(text.split("] ", 1)[-1] if text.startswith("[request id") else text)
        kind = InternalError
    return kind(MESSAGES[kind].format(model=model), cause=f"{code.name}: {text}" if code else text)
