"""Open ONNX Runtime sessions on a few shared CPU cores or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    "use_tf32": "0",  # FP32 must be exact; use FP16 for speed
    "cudnn_conv_algo_search": "HEURISTIC",  # an exhaustive search would delay the first request of each batch size
}


def open_session(
    graph: Path, intra_op_threads: int = 1, provider: str = "cpu", device_id: int = 0
) -> onnxruntime.InferenceSession:
    """Open a session whose threads sleep between runs.

    A spinning thread pool would take the core from the next model of the chain. `device_id` is the GPU's number for
    the provider cuda. Raises ValueError if the provider is not available: ONNX Runtime itself would silently use the
    CPU.
    """
    if provider not in PROVIDERS:
        raise ValueError(f"provider {provider} is unknown: choose {' or '.join(PROVIDERS)}")
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
        onnxruntime.preload_dlls()  # CUDA's libraries, if they are Python packages
    settings = CUDA | {"device_id": str(device_id)} if provider == "cuda" else {}
    session = onnxruntime.InferenceSession(str(graph), options, providers=[(wanted, settings)])
    if session.get_providers()[0] != wanted:
        raise ValueError(
            f"{wanted} does not start: check that there is a GPU and that CUDA's version fits ONNX Runtime"
        )
    return session


def mismatch(
    inputs: Iterable[str], outputs: Iterable[str], found_inputs: Iterable[str], found_outputs: Iterable[str]
) -> str:
    """Say how a model's configuration differs from its graph; empty if it does not."""
    if set(inputs) == set(found_inputs) and set(outputs) <= set(found_outputs):
        return ""
    return (
        f"config.pbtxt has {sorted(inputs)} -> {sorted(outputs)}, but the graph has "
        f"{sorted(found_inputs)} -> {sorted(found_outputs)}: use the graph's names in config.pbtxt"
    )


class Graph:
    """Run one ONNX graph with inputs and outputs by name.

    `run` takes and returns arrays on the host, `run_bound` tensors on the device. Contiguous inputs of the graph's
    dtype are not copied.
    """

    def __init__(self, graph: Path, intra_op_threads: int = 1, provider: str = "cpu", device_id: int = 0) -> None:
        self._session = open_session(graph, intra_op_threads, provider, device_id)
        self._device = (provider, device_id)
        self.inputs: dict[str, list[int | str]] = {spec.name: spec.shape for spec in self._session.get_inputs()}
        self.outputs: dict[str, list[int | str]] = {spec.name: spec.shape for spec in self._session.get_outputs()}
        ends = (*self._session.get_inputs(), *self._session.get_outputs())
        self._types = {spec.name: TYPES[spec.type] for spec in ends if spec.type in TYPES}

    def float_type(self, name: str) -> type[np.floating]:
        """Return the NumPy type of one input or output, FP32 or FP16."""
        return self._types[name]

    def require(self, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Raise ValueError unless the graph reads exactly these inputs and has at least these outputs."""
        if wrong := mismatch(inputs, outputs, self.inputs, self.outputs):
            raise ValueError(wrong)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run the graph on the host -> the named outputs, in that order."""
        arrays: list[Array] = self._session.run(list(outputs), dict(feeds))
        return arrays

    def bind(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """Bind contiguous arrays on the host -> a function that runs the graph on what they hold then.

        On the CPU they are bound once and used in place. The binding holds addresses only, so the arrays must not be
        reallocated. For a GPU they are bound anew at each run: ONNX Runtime copies inputs to the device when they are
        bound, not when the graph runs.
        """

        def bound() -> Any:
            binding = self._session.io_binding()
            for name, array in feeds.items():
                binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            for name, array in outputs.items():
                binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
            return binding

        if self._device[0] == "cpu":
            binding = bound()
            return lambda: self._session.run_with_iobinding(binding)
        return lambda: self._session.run_with_iobinding(bound())

    def run_bound(self, feeds: Mapping[str, OrtValue], outputs: Sequence[str]) -> list[OrtValue]:
        """Run the graph -> the named outputs, in that order, in the memory of the computing device.

        Feeds on that device are read in place; others, such as the host's, are copied to it once.
        """
        binding = self._session.io_binding()  # a new one each time: reusing one would overwrite returned outputs
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, *self._device)
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        values: list[OrtValue] = binding.get_outputs()
        return values
