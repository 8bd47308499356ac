"""Any ONNX graph whose inputs and outputs are named as the model's in Triton, rows first.

Parameters in config.pbtxt: `graph` (default model.onnx), `intra_op_threads` (default 1), `provider` (default cpu).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from triton_models.parameters import Parameters
from triton_models.session import Array, Graph
from triton_models.unary import answer


class TritonPythonModel:
    """One session, one run for all rows of all requests that Triton hands over at once."""

    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = Parameters(args)
        self._outputs = parameters.outputs
        self._graph = Graph(parameters.graph, parameters.intra_op_threads, parameters.text("provider", "cpu"))
        self._graph.require(parameters.inputs, parameters.outputs)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return answer(requests, self._infer)

    def _infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(self._outputs, self._graph.run(inputs, self._outputs), strict=True))
