"""The vision models' graphs hold to what TensorRT 10 and 11 build, so that the same file becomes an engine.

Sources: onnx-tensorrt's docs/operators.md; TensorRT's DataType reference for UINT8, which only a cast may read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

ARITHMETIC = {"Abs", "Add", "Ceil", "Clip", "Cos", "Div", "Erf", "Exp", "Floor", "Log", "Max", "Min", "Mul", "Neg",
              "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin", "Sqrt", "Sub", "Tanh"}  # fmt: skip
CHOICE = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Where"}
PRODUCTS = {"AveragePool", "Conv", "Gemm", "LayerNormalization", "MatMul", "Softmax"}
REDUCTIONS = {"CumSum", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "TopK"}
SHAPES = {"Cast", "Concat", "Constant", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape",
          "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}  # fmt: skip
ALLOWED_OPS = ARITHMETIC | CHOICE | PRODUCTS | REDUCTIONS | SHAPES
# Inputs, by place, that the parser wants as constants.
CONSTANT_INPUTS = {
    "ReduceL2": [1], "ReduceMax": [1], "ReduceMean": [1], "ReduceMin": [1], "ReduceSum": [1], "CumSum": [1],
    "TopK": [1], "Slice": [3], "Squeeze": [1], "Unsqueeze": [1], "Conv": [1], "Pad": [1], "Split": [1],
}  # fmt: skip
FLOAT_ONLY = {"AveragePool", "Conv", "CumSum", "LayerNormalization", "ReduceL2", "ReduceMean", "Softmax", "TopK"}
NOT_BOOL = {"Add", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "ReduceMax",
            "ReduceSum", "Sub"}  # fmt: skip
TYPES = {TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
MOST_RANKED = 3840  # TopK's k stays below

MAY_VARY = {
    "vision_encoder": {"batch"},
    "relevance_allocator": {"batch"},
    "relevance_allocator_448": {"batch"},
    "qformer": {"batch", "vision_tokens"},
}


def faults(model: onnx.ModelProto, may_vary: set[str]) -> list[str]:
    """What TensorRT would not build, or would build with a shape that varies; one line each."""
    graph = model.graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types = {name: tensor.elem_type for name, tensor in values.items()}
    types |= {constant.name: constant.data_type for constant in graph.initializer}
    constants = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = np.asarray(helper.get_attribute_value(node.attribute[0]))
    bytes_in = {value.name for value in graph.input if types[value.name] == TensorProto.UINT8}
    found = [
        f"{name} is {TensorProto.DataType.Name(kind)}"
        for name, kind in types.items()
        if kind not in TYPES and name not in bytes_in
    ]
    found += shape_faults(values, may_vary)
    for node in graph.node:
        unshaped = [name for name in node.output if name and name not in values]
        found += [f"{node.op_type}: the shape of {name} is not known" for name in unshaped]
        found += [f"{node.op_type}: {fault}" for fault in node_faults(node, types, constants, bytes_in)]
    return found


def shape_faults(values: dict[str, onnx.TypeProto.Tensor], may_vary: set[str]) -> Iterator[str]:
    for name, tensor in values.items():
        if not tensor.HasField("shape"):
            yield f"{name} has no shape"
        for axis, dim in enumerate(tensor.shape.dim):
            if not dim.HasField("dim_value") and dim.dim_param not in may_vary:
                yield f"{name}: dimension {axis} is {dim.dim_param or 'not known'}"


def node_faults(
    node: onnx.NodeProto, types: dict[str, int], constants: dict[str, np.ndarray], bytes_in: set[str]
) -> Iterator[str]:
    op, first = node.op_type, types.get(node.input[0]) if node.input else None
    if node.domain not in ("", "ai.onnx") or op not in ALLOWED_OPS:
        yield "not on the allow-list"
    if op in FLOAT_ONLY and first != TensorProto.FLOAT:
        yield f"of {TensorProto.DataType.Name(first or 0)}"
    if op in NOT_BOOL and first == TensorProto.BOOL:
        yield "of BOOL"
    if op != "Cast" and bytes_in & set(node.input):
        yield "of UINT8: cast it first"
    for place in CONSTANT_INPUTS.get(op, []):
        if place < len(node.input) and node.input[place] and node.input[place] not in constants:
            yield f"input {place} is computed"
    if op == "TopK" and node.input[1] in constants and not 0 < int(constants[node.input[1]].item()) < MOST_RANKED:
        yield f"k is {constants[node.input[1]].item()}"


@pytest.mark.parametrize("name", MAY_VARY)
def test_the_committed_graph_is_one_that_tensorrt_builds(repository: Path, name: str) -> None:
    path = repository / name / "1" / "model.onnx"
    if name == "relevance_allocator_448" and not path.exists():
        pytest.skip("the committed checkpoint has no closer view")
    assert faults(onnx.load(path), MAY_VARY[name]) == []


def small(op: str, kinds: Sequence[int], out: int, *, batch: str = "batch", **attributes: object) -> onnx.ModelProto:
    """One node on inputs [batch, 4] a, b, ..., its shapes inferred."""
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
