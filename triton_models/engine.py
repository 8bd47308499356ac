"""The interface between the models' runners and the libraries that compute ONNX graphs.

ONNX Runtime (`session.py`) computes in FP32, FP16 and integers, OpenVINO (`openvino_graph.py`) in BF16. OpenVINO is
imported only if it computes: it takes time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from triton_models.session import Graph

Array = npt.NDArray[Any]


class Engine(Protocol):
    """One opened graph, with inputs and outputs by name. One thread uses it."""

    inputs: dict[str, list[int | str]]  # shapes; a dimension that varies is a name
    outputs: dict[str, list[int | str]]

    def float_type(self, name: str) -> type[np.floating]:
        """Return the NumPy type of one input or output, FP32 or FP16."""

    def require(self, inputs: Iterable[str], outputs: Iterable[str]) -> None:
        """Raise ValueError unless the graph reads exactly these inputs and has at least these outputs."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run the graph -> the named outputs, in that order, in memory of their own."""

    def bind(self, feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> Callable[[], None]:
        """Bind contiguous arrays -> a function that runs the graph on what they hold then.

        The function may hold addresses, so the arrays must live and stay where they are. Every input must be bound.
        """


def open_engine(
    graph: Path, intra_op_threads: int = 1, *, library: str = "onnxruntime", provider: str = "cpu", device_id: int = 0
) -> Engine:
    """Open a graph with ONNX Runtime, or with openvino in BF16. Raises ValueError for another library."""
    match library:
        case "onnxruntime":
            return Graph(graph, intra_op_threads, provider, device_id)
        case "openvino":
            from triton_models.openvino_graph import OpenVinoGraph  # noqa: PLC0415  (not installed everywhere)

            return OpenVinoGraph(graph, intra_op_threads)
    raise ValueError(f"engine {library} is unknown: choose onnxruntime or openvino")
