"""Compute an ONNX graph with OpenVINO on the CPU, in BF16 where the CPU has it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from triton_models.session import mismatch

Array = npt.NDArray[Any]

FLOATS: dict[str, type[np.floating]] = {"f32": np.float32, "f16": np.float16}


class OpenVinoGraph:
    """One compiled graph. Inputs and outputs keep the file's types; products are computed in `precision`."""

    def __init__(self, graph: Path, intra_op_threads: int = 1, precision: str = "bf16") -> None:
        core = openvino.Core()
        self._compiled = core.compile_model(
            str(graph),
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": precision,
                "INFERENCE_NUM_THREADS": intra_op_threads or len(os.sched_getaffinity(0)),
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,  # the models share the cores
            },
        )
        self._request = self._compiled.create_infer_request()
        self.inputs = {port.any_name: _shape(port) for port in self._compiled.inputs}
        self.outputs = {port.any_name: _shape(port) for port in self._compiled.outputs}
        self._types = {
            port.any_name: port.element_type.get_type_name()
            for port in (*self._compiled.inputs, *self._compiled.outputs)
        }

    def float_type(self, name: str) -> type[np.floating]:
        """Return the NumPy type of one input or output, FP32 or FP16."""
        return FLOATS[self._types[name]]

    def require(self, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Raise ValueError unless the graph reads exactly these inputs and has at least these outputs."""
        if wrong := mismatch(inputs, outputs, self.inputs, self.outputs):
            raise ValueError(wrong)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run the graph -> copies of the named outputs, in that order."""
        # OpenVINO refuses arrays that cannot be written, as Triton's are. The copies live until the run has ended.
        usable = {name: np.require(array, requirements=("C", "W")) for name, array in feeds.items()}
        _bound(self._request, usable)
        self._request.infer()
        return [np.array(self._request.get_tensor(name).data) for name in outputs]

    def bind(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """Bind contiguous arrays -> a function that runs the graph on them in place."""
        request = self._compiled.create_infer_request()
        _bound(request, {**feeds, **outputs})
        infer: Callable[[], object] = request.infer

        def run() -> None:
            infer()

        return run


def _bound(request: Any, arrays: Mapping[str, Array]) -> None:
    for name, array in arrays.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))


def _shape(port: Any) -> list[int | str]:
    """Dimensions; one that varies is `?`."""
    return [each.get_length() if each.is_static else "?" for each in port.partial_shape]
