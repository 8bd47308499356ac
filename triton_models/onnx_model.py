"""Serve any ONNX graph whose inputs and outputs have the names of Triton's model, rows first.

Parameters in config.pbtxt: `graph` (default model.onnx), `intra_op_threads` (default 1), `nice` (default 0), `provider`
(default cpu), `io_binding` (default no). With `io_binding` yes, tensors stay on the device that computes them, if
Triton's `FORCE_CPU_ONLY_INPUT_TENSORS` is also `no`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onnxruntime import OrtValue

from service.core.errors import InvalidRequest
from service.core.tensors import MODELS
from triton_models import spans
from triton_models.costs import Costs, ServerCpu
from triton_models.engine import Array, Engine, open_engine
from triton_models.parameters import Parameters
from triton_models.session import Graph
from triton_models.unary import answer, answer_bound

CALLED_FOR_EACH = ("relevance_allocator", "relevance_allocator_448")  # each question asks one of them about each image

CLIP = "attend_clip"  # its memory grows with the square of the frames
OF_FRAMES = tuple(tensor.name for tensor in MODELS[CLIP].inputs if tensor.dims[0] == -1)


class TritonPythonModel:
    """Run one session once for all rows of a batch of requests.

    With io_binding it runs once per request.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = Parameters(args)
        os.nice(parameters.nice)  # applies to this thread, which runs the model, and to those that it starts later
        self._name = parameters.folder.name
        self._outputs = parameters.outputs
        self._bound = parameters.yes("io_binding")
        threads, provider = parameters.intra_op_threads, parameters.text("provider", "cpu")
        self._graph: Engine
        if self._bound:
            self._on_device = self._graph = Graph(parameters.graph, threads, provider, parameters.device_id)
        else:
            self._graph = open_engine(
                parameters.graph, threads, library=parameters.library, provider=provider,
                device_id=parameters.device_id,
            )  # fmt: skip
        self._graph.require(parameters.inputs, parameters.outputs)
        server = ServerCpu() if self._name in CALLED_FOR_EACH else None
        self._most_frames = parameters.card().most_frames if self._name == CLIP else None
        self._costs = Costs(self._name, on_gpu=provider != "cpu", server=server)
        self._costs.start()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        with self._costs.of(requests):
            return spans.recorded(self._name, requests, lambda: self._answer(requests))

    def finalize(self) -> None:
        self._costs.close()
        spans.close(self._name)

    def _answer(self, requests: Sequence[Any]) -> list[Any]:
        return answer_bound(requests, self._infer_bound) if self._bound else answer(requests, self._infer)

    def _infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self._require_few(inputs[name].shape[0] for name in OF_FRAMES if name in inputs)
        return dict(zip(self._outputs, self._graph.run(inputs, self._outputs), strict=True))

    def _infer_bound(self, inputs: Mapping[str, OrtValue]) -> dict[str, OrtValue]:
        self._require_few(inputs[name].shape()[0] for name in OF_FRAMES if name in inputs)
        return dict(zip(self._outputs, self._on_device.run_bound(inputs, self._outputs), strict=True))

    def _require_few(self, counts: Iterable[int]) -> None:
        """Raise InvalidRequest if a clip has more frames than the card says; other models have one row an image."""
        if self._most_frames is not None and (frames := max(counts)) > self._most_frames:
            raise InvalidRequest(f"the clip has {frames} frames: send at most {self._most_frames}", param="features")
