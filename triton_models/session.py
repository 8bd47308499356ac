"""ONNX Runtime sessions: on the CPU for processes that share a few cores, or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime import OrtValue

Array = npt.NDArray[Any]


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TYPES: dict[str, type[np.floating]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


CUDA = {
    "use_tf32": "0",  # FP32 is FP32; who wants it faster takes FP16
    "cudnn_conv_algo_search": "HEURISTIC",  # an exhaustive search would hold up the first request of each batch size
}


def open_session(
    graph: Path, intra_op_threads: int = 1, provider: str = "cpu", device_id: int = 0
) -> onnxruntime.InferenceSession:
    """A session whose threads sleep between runs: a spinning pool would take the core from the next model of the chain.

    `device_id` is the GPU's, of the provider cuda. Raises ValueError where the provider is not there: ONNX Runtime
    itself would go on on the CPU without a word."""
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
    settings = CUDA | {"device_id": str(device_id)} if provider == "cuda" else {}
    session = onnxruntime.InferenceSession(str(graph), options, providers=[(wanted, settings)])
    if session.get_providers()[0] != wanted:
        raise ValueError(f"{wanted} does not start: is there a GPU, and a CUDA that fits ONNX Runtime's?")
    return session


class Graph:
    """One ONNX graph: arrays in by name, arrays out by name. Contiguous inputs of the graph's dtype are not copied.

    `run` takes and gives the host's arrays, `run_bound` tensors of the device."""

    def __init__(self, graph: Path, intra_op_threads: int = 1, provider: str = "cpu", device_id: int = 0) -> None:
        self._session = open_session(graph, intra_op_threads, provider, device_id)
        self._device = (provider, device_id)
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

    def run_bound(self, feeds: Mapping[str, OrtValue], outputs: Sequence[str]) -> list[OrtValue]:
        """The named outputs, in that order, in the memory of the device that computes them.

        Feeds on that device are read where they lie; others, as from the host, are copied to it once."""
        binding = self._session.io_binding()  # a new one: another run of an old one would overwrite what was given out
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, *self._device)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        values: list[OrtValue] = binding.get_outputs()
        return values
