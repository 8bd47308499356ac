"""ONNX Runtime sessions: on the CPU for processes that share a few cores, or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

Array = npt.NDArray[Any]


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TYPES: dict[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def open_session(graph: Path, intra_op_threads: int = 1, provider: str = "cpu") -> onnxruntime.InferenceSession:
    """A session whose threads sleep between runs: a spinning pool would take the core from the next model of the chain.

    Raises ValueError where the provider is not there: ONNX Runtime itself would go on on the CPU without a word."""
    if provider not in PROVIDERS:
        raise ValueError(f"provider {provider}: there are {', '.join(PROVIDERS)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = intra_op_threads or len(os.sched_getaffinity(0))
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    wanted = PROVIDERS[provider]
    if wanted not in onnxruntime.get_available_providers():
        raise ValueError(f"this ONNX Runtime has no {wanted}: install onnxruntime-gpu in place of onnxruntime")
    if provider == "cuda":
        onnxruntime.preload_dlls()  # CUDA's libraries, where they are Python packages
    session = onnxruntime.InferenceSession(str(graph), options, providers=[wanted])
    if session.get_providers()[0] != wanted:
        raise ValueError(f"{wanted} does not start: is there a GPU, and a CUDA that fits ONNX Runtime's?")
    return session


class Graph:
    """One ONNX graph: arrays in by name, arrays out by name. Contiguous inputs of the graph's dtype are not copied."""

    def __init__(self, graph: Path, intra_op_threads: int = 1, provider: str = "cpu") -> None:
        self._session = open_session(graph, intra_op_threads, provider)
        self.inputs: dict[str, list[int | str]] = {spec.name: spec.shape for spec in self._session.get_inputs()}
        self.outputs: dict[str, list[int | str]] = {spec.name: spec.shape for spec in self._session.get_outputs()}

    def float_type(self, output: str) -> type[np.floating]:
        """NumPy's type of one output, FP32 or FP16."""
        return TYPES[next(spec.type for spec in self._session.get_outputs() if spec.name == output)]

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
