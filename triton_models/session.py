"""ONNX Runtime sessions for processes that share a few cores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[Any]


def open_session(graph: Path, intra_op_threads: int = 1) -> onnxruntime.InferenceSession:
    """A CPU session that sleeps between runs: a spinning pool would take the core from the next model of the chain."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


class Graph:
    """One ONNX graph: arrays in by name, arrays out by name. Contiguous inputs of the graph's dtype are not copied."""

    def __init__(self, graph: Path, intra_op_threads: int = 1) -> None:
        self._session = open_session(graph, intra_op_threads)
        self.inputs: dict[str, list[int | str]] = {spec.name: spec.shape for spec in self._session.get_inputs()}
        self.outputs: dict[str, list[int | str]] = {spec.name: spec.shape for spec in self._session.get_outputs()}

    def require(self, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Raises ValueError unless the graph reads exactly these inputs and has at least these outputs."""
        if set(inputs) != set(self.inputs) or not set(outputs) <= set(self.outputs):
            raise ValueError(
                f"the model is configured with {sorted(inputs)} -> {sorted(outputs)}, "
                f"its graph has {sorted(self.inputs)} -> {sorted(self.outputs)}"
            )

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs, in that order."""
        arrays: list[Array] = self._session.run(list(outputs), dict(feeds))
        return arrays
