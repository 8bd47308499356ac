"""Serve the `qformer` model on the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from triton_models import spans
from triton_models.costs import Costs
from triton_models.parameters import Parameters
from triton_models.query_groups import GroupRunner
from triton_models.unary import answer


class TritonPythonModel:
    """Run the Q-Former on the CPU; a GPU's Q-Former is one graph that contains the groups.

    Parameters in config.pbtxt: `graph` (default model.onnx), `intra_op_threads` (default 1).
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = Parameters(args)
        self._runner = GroupRunner(parameters.graph, parameters.intra_op_threads, parameters.library)
        self._costs = Costs("qformer")
        self._costs.start()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        with self._costs.of(requests):
            return spans.recorded("qformer", requests, lambda: answer(requests, self._runner.run))

    def finalize(self) -> None:
        self._costs.close()
        spans.close("qformer")
