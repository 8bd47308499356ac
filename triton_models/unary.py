"""Answer unary models: one run over the rows of all requests, one response per request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from onnxruntime import OrtValue

from service.core.errors import GlimpseError, status_of
from triton_models.tensors import Array, borrow, lend, read, write

Infer = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # inputs and outputs by name, rows first
InferBound = Callable[[Mapping[str, OrtValue]], Mapping[str, OrtValue]]  # the same, on any device


def answer(requests: Sequence[Any], infer: Infer) -> list[Any]:
    """Run all rows at once.

    A failed run is repeated request by request, so that only the faulty requests fail.
    """
    if len(requests) == 1:
        return [_answer_one(requests[0], infer, read, write)]
    each = [_inputs(request, read) for request in requests]
    try:
        together = {name: np.concatenate([inputs[name] for inputs in each]) for name in each[0]}
        outputs = infer(together)
    except Exception:  # different lengths or a faulty request: run each alone for its own answer or error
        return [_answer_one(request, infer, read, write) for request in requests]
    ends = np.cumsum([len(next(iter(inputs.values()))) for inputs in each]).tolist()
    return [
        _response(request, {name: rows[start:end] for name, rows in outputs.items()}, write)
        for request, start, end in zip(requests, [0, *ends], ends, strict=False)
    ]


def answer_bound(requests: Sequence[Any], infer: InferBound) -> list[Any]:
    """Run once per request, with inputs and outputs in place on their device."""
    return [_answer_one(request, infer, borrow, lend) for request in requests]


def _answer_one(
    request: Any,
    infer: Callable[[dict[str, Any]], Mapping[str, Any]],
    taken: Callable[[Any], Any],
    given: Callable[[str, Any], Any],
) -> Any:
    try:
        return _response(request, infer(_inputs(request, taken)), given)
    except GlimpseError as error:
        invalid = status_of(error)[0] < 500
        code = pb_utils.TritonError.INVALID_ARG if invalid else pb_utils.TritonError.INTERNAL
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(error.message, code))
    except Exception as error:  # the model's process must outlive any request
        pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
        return pb_utils.InferenceResponse(
            error=pb_utils.TritonError(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
        )


def _inputs(request: Any, taken: Callable[[Any], Any]) -> dict[str, Any]:
    return {tensor.name(): taken(tensor) for tensor in request.inputs()}


def _response(request: Any, outputs: Mapping[str, Any], given: Callable[[str, Any], Any]) -> Any:
    asked = request.requested_output_names()
    return pb_utils.InferenceResponse([given(name, rows) for name, rows in outputs.items() if name in asked])
