"""Check a graph against the rules of TensorRT 10 and 11, without TensorRT. Pure.

Sources: onnx-tensorrt's docs/operators.md; TensorRT's DataType reference for UINT8, which only a cast may read.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ARITHMETIC = {"Abs", "Add", "Ceil", "Clip", "Cos", "Div", "Erf", "Exp", "Floor", "Log", "Max", "Min", "Mul", "Neg",
              "Pow", "Reciprocal", "Relu", "Sigmoid", "Sin", "Sqrt", "Sub", "Tanh"}  # fmt: skip
CHOICE = {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Where"}
PRODUCTS = {"AveragePool", "Conv", "Gemm", "LayerNormalization", "MatMul", "Softmax"}
REDUCTIONS = {"ArgMax", "CumSum", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "TopK"}
SHAPES = {"Cast", "Concat", "Constant", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape",
          "Shape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}  # fmt: skip
FP8 = {"DequantizeLinear", "QuantizeLinear"}
ALLOWED_OPS = ARITHMETIC | CHOICE | PRODUCTS | REDUCTIONS | SHAPES | FP8
# Inputs, by index, that the parser requires as constants.
CONSTANT_INPUTS = {
    "ReduceL2": [1], "ReduceMax": [1], "ReduceMean": [1], "ReduceMin": [1], "ReduceSum": [1], "CumSum": [1],
    "TopK": [1], "Slice": [3], "Squeeze": [1], "Unsqueeze": [1], "Conv": [1], "Pad": [1], "Split": [1],
}  # fmt: skip
FLOAT_ONLY = {
    "ArgMax",
    "AveragePool",
    "Conv",
    "CumSum",
    "LayerNormalization",
    "ReduceL2",
    "ReduceMean",
    "Softmax",
    "TopK",
}
NOT_BOOL = {"Add", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Mul", "ReduceMax",
            "ReduceSum", "Sub"}  # fmt: skip
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
TYPES = {*FLOATS, TensorProto.FLOAT8E4M3FN, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL}
MOST_RANKED = 3840  # limit of TopK's k (exclusive)

MAY_VARY = {
    "vision_encoder": {"batch"},
    "relevance_allocator": {"batch"},
    "relevance_allocator_448": {"batch"},
    "qformer": {"batch", "vision_tokens"},
}


def faults(model: onnx.ModelProto, may_vary: set[str]) -> list[str]:
    """Find what TensorRT would not build, or would build with varying shapes; one line each."""
    graph = model.graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    types = {name: tensor.elem_type for name, tensor in values.items()}
    types |= {constant.name: constant.data_type for constant in graph.initializer}
    constants = {
        constant.name: np.empty(0) if constant.external_data else numpy_helper.to_array(constant)
        for constant in graph.initializer
    }
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = np.asarray(helper.get_attribute_value(node.attribute[0]))
    bytes_in = {value.name for value in graph.input if types[value.name] == TensorProto.UINT8}
    found = [
        f"{name} is {TensorProto.DataType.Name(kind)}"
        for name, kind in types.items()
        if kind not in TYPES and name not in bytes_in
    ]
    ends = (*graph.input, *graph.output)
    found += [f"{end.name} is FP8" for end in ends if types[end.name] == TensorProto.FLOAT8E4M3FN]
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
    if op in FLOAT_ONLY and first not in FLOATS:
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
