"""The vision models' graphs follow the rules of TensorRT 10 and 11.

Sources: onnx-tensorrt's docs/operators.md; TensorRT's DataType reference for UINT8, which only a cast may read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper, shape_inference

from build_engines.convert.tensorrt_rules import MAY_VARY, faults


@pytest.mark.parametrize("name", MAY_VARY)
def test_the_committed_graph_is_one_that_tensorrt_builds(repository: Path, name: str) -> None:
    assert faults(onnx.load(repository / name / "1" / "model.onnx"), MAY_VARY[name]) == []


def small(op: str, kinds: Sequence[int], out: int, *, batch: str = "batch", **attributes: object) -> onnx.ModelProto:
    """One node on inputs [batch, 4] a, b, ..., with inferred shapes."""
    names = "abc"[: len(kinds)]
    inputs = [
        helper.make_tensor_value_info(name, kind, [batch, 4] if kind != TensorProto.INT64 else [1])
        for name, kind in zip(names, kinds, strict=True)
    ]
    node = helper.make_node(op, list(names), ["out"], **attributes)
    graph = helper.make_graph([node], "small", inputs, [helper.make_tensor_value_info("out", out, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return shape_inference.infer_shapes(model)


F, B, U, N = TensorProto.FLOAT, TensorProto.BOOL, TensorProto.UINT8, TensorProto.INT64


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (small("NonZero", [F], N), "NonZero: not on the allow-list"),
        (small("BitwiseAnd", [U, U], U), "BitwiseAnd: not on the allow-list"),
        (small("Add", [U, U], U), "Add: of UINT8: cast it first"),
        (small("Add", [F, F], F, batch="length"), "a: dimension 0 is length"),
        (small("ReduceSum", [F, N], F), "ReduceSum: input 1 is computed"),
        (small("Equal", [B, B], B), "Equal: of BOOL"),
        (small("CumSum", [N, N], N), "CumSum: of INT64"),
        (small("Cast", [F], TensorProto.DOUBLE, to=TensorProto.DOUBLE), "out is DOUBLE"),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_what_tensorrt_refuses_is_found(model: onnx.ModelProto, told: str) -> None:
    assert told in faults(model, {"batch"})


def test_bytes_may_come_in_where_they_are_cast() -> None:
    assert faults(small("Cast", [U], F, to=F), {"batch"}) == []
