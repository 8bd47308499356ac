"""Multiply an ONNX graph's constant matrices as integers: INT8 for any graph, 4-bit weights for the LLM.

**INT8**: each row of the input (one token) is scaled by its own greatest value and rounded to 8 bits while it runs, so
nothing is calibrated and a row's result does not depend on its batch. Each column of the weights has its own scale and
7 bits: on CPUs without VNNI the kernels add two products in 16 bits, which 8-bit weights would overflow. Everything
that is not a product with a constant matrix stays FP32, as do the nodes of `not_int8`.

**4 bits**: `MatMulNBits` of ONNX Runtime. Blocks of BLOCK weights along the input share a scale.

Weights are read, rounded and written one matrix at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

CONTRIB = "com.microsoft"
GREATEST_WEIGHT = 64  # of 7 bits: 2 * 255 * 64 fits in 16 bits
GREATEST_INPUT, ZERO_INPUT = 127, 128  # of a row, as uint8
LEAST_SCALE = 1e-30  # of a row of zeros
BLOCK = 32  # weights with one scale, of 4 bits
LEAST_WEIGHTS = 4096  # of a matrix: rounding a smaller one saves nothing

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Product:
    """A node that multiplies by a constant matrix [inputs, outputs]."""

    node: onnx.NodeProto
    weights: TensorProto
    transposed: bool  # stored as [outputs, inputs]


def to_int8(name: str, model: onnx.ModelProto, folder: Path) -> dict[str, str]:
    """Convert in place -> the products kept in FP32 with the reason, by node. `folder` holds external weights."""
    kept = not_int8(name, model)
    _Conversion(model, folder).run(_Int8(), kept)
    return kept


def to_int4(model: onnx.ModelProto, folder: Path) -> dict[str, str]:
    """Convert the LLM's graph in place -> the products kept in FP32 with the reason, by node."""
    kept = {
        product.node.name: f"its inputs are not a multiple of {BLOCK}"
        for product in products(model)
        if _inputs(product) % BLOCK
    }
    _Conversion(model, folder).run(_Int4(), kept)
    return kept


def not_int8(name: str, model: onnx.ModelProto) -> dict[str, str]:
    """The products of a graph that an INT8 build keeps in FP32, by node, each with its reason."""
    if name.startswith("relevance_allocator"):
        return {product.node.name: "the allocator decides by comparing" for product in products(model)}
    return {}


def products(model: onnx.ModelProto) -> Iterator[Product]:
    """The products with a constant matrix, in order."""
    constants = {each.name: each for each in model.graph.initializer}
    for node in model.graph.node:
        weights = constants.get(node.input[1]) if node.op_type in ("MatMul", "Gemm") else None
        if weights is None or len(weights.dims) != 2 or np.prod(weights.dims) < LEAST_WEIGHTS:
            continue
        told = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        plain = len(node.input) == 2 and told.get("alpha", 1.0) == 1.0 and not told.get("transA", 0)
        if node.op_type == "MatMul" or plain:
            yield Product(node, weights, bool(told.get("transB", 0)))


def rounded_columns(weights: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """[K, N] -> integers [K, N] within +-GREATEST_WEIGHT and the scale of each column [N]."""
    scale = np.maximum(np.abs(weights).max(0), LEAST_SCALE).astype(np.float32) / np.float32(GREATEST_WEIGHT)
    return np.rint(weights / scale).astype(np.int8), scale


def packed_blocks(weights: FloatArray) -> tuple[npt.NDArray[np.uint8], FloatArray]:
    """[K, N] -> two weights a byte [N, K / BLOCK, BLOCK / 2], the first in the low bits, and scales [N, K / BLOCK].

    A weight is (its 4 bits - 8) * scale. K is a multiple of BLOCK.
    """
    blocks = np.ascontiguousarray(weights.T).reshape(weights.shape[1], -1, BLOCK)
    furthest = np.take_along_axis(blocks, np.abs(blocks).argmax(2, keepdims=True), 2)
    scale = np.where(furthest == 0, np.float32(1), furthest / np.float32(-8))  # the furthest weight becomes -8 exactly
    levels = np.clip(np.rint(blocks / scale) + 8, 0, 15).astype(np.uint8)
    return levels[..., 0::2] | (levels[..., 1::2] << 4), scale[..., 0].astype(np.float32)


def round_to_bf16(model: onnx.ModelProto) -> None:
    """Round both factors of every product to BF16, in place, and compute on in FP32.

    A CPU with BF16 does the same and adds up in FP32. So any CPU can measure how that changes the answers.
    """
    graph, made, nodes = model.graph, set[str](), []
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            for place, tensor in enumerate(node.input[:2]):
                rounded = f"{tensor}_bf16"
                if rounded not in made:
                    nodes.append(helper.make_node("Cast", [tensor], [f"{rounded}_half"], to=TensorProto.BFLOAT16))
                    nodes.append(helper.make_node("Cast", [f"{rounded}_half"], [rounded], to=TensorProto.FLOAT))
                    made.add(rounded)
                node.input[place] = rounded
        nodes.append(node)
    _replace(graph.node, nodes)


def _inputs(product: Product) -> int:
    return int(product.weights.dims[1 if product.transposed else 0])


class _Int8:
    """Nodes of one INT8 product. Products of the same input share its rounding."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[str, str]] = {}  # by input: its integers and its rows' scales
        self._began = False

    def constants(self) -> Iterator[TensorProto]:
        yield numpy_helper.from_array(np.float32(1 / GREATEST_INPUT), "int8_input_scale")
        yield numpy_helper.from_array(np.uint8(ZERO_INPUT), "int8_input_zero")
        yield numpy_helper.from_array(np.float32(LEAST_SCALE), "int8_least_scale")
        yield numpy_helper.from_array(np.array([-1], np.int64), "int8_last_axis")

    def converted(self, node: onnx.NodeProto, weights: FloatArray) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        source, end = node.input[0], node.output[0]
        nodes = []
        if source not in self._rows:
            own = f"{source}_int8"
            nodes = [
                helper.make_node("Abs", [source], [f"{own}_abs"]),
                helper.make_node("ReduceMax", [f"{own}_abs", "int8_last_axis"], [f"{own}_max"], keepdims=1),
                helper.make_node("Max", [f"{own}_max", "int8_least_scale"], [f"{own}_rows"]),
                helper.make_node("Div", [source, f"{own}_rows"], [f"{own}_one"]),
                helper.make_node("QuantizeLinear", [f"{own}_one", "int8_input_scale", "int8_input_zero"], [own]),
            ]
            self._rows[source] = (own, f"{own}_rows")
        integers, rows = self._rows[source]
        levels, scale = rounded_columns(weights)
        own = f"{end}_int8_weights"
        nodes += [
            helper.make_node(
                "MatMulIntegerToFloat",
                [integers, own, "int8_input_scale", f"{own}_scale", "int8_input_zero"],
                [f"{end}_unscaled"],
                domain=CONTRIB,
            ),
            helper.make_node("Mul", [f"{end}_unscaled", rows], [end]),
        ]
        return nodes, [numpy_helper.from_array(levels, own), numpy_helper.from_array(scale, f"{own}_scale")]


class _Int4:
    """Nodes of one product with 4-bit weights."""

    def constants(self) -> Iterator[TensorProto]:
        return iter(())

    def converted(self, node: onnx.NodeProto, weights: FloatArray) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        levels, scale = packed_blocks(weights)
        own = f"{node.output[0]}_int4_weights"
        product = helper.make_node(
            "MatMulNBits",
            [node.input[0], own, f"{own}_scale"],
            [node.output[0]],
            domain=CONTRIB,
            K=weights.shape[0],
            N=weights.shape[1],
            bits=4,
            block_size=BLOCK,
            accuracy_level=4,  # the input is rounded to 8 bits too, by block and row
        )
        return [product], [numpy_helper.from_array(levels, own), numpy_helper.from_array(scale, f"{own}_scale")]


class _Conversion:
    """Replace the products of one graph, in place."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        self._model, self._folder = model, folder

    def run(self, way: Any, kept: Mapping[str, str]) -> None:
        graph = self._model.graph
        wanted = {id(each.node): each for each in products(self._model) if each.node.name not in kept}
        nodes: list[onnx.NodeProto] = []
        constants = list(way.constants()) if wanted else []
        found = {each.node.output[0]: each for each in wanted.values()}
        for node in graph.node:
            product = found.get(node.output[0])
            if product is None:
                nodes.append(node)
                continue
            made, added = way.converted(node, self._matrix(product))
            nodes += made
            constants += added
        _replace(graph.node, nodes)
        read = {tensor for node in nodes for tensor in node.input} | {value.name for value in graph.output}
        staying = [each for each in graph.initializer if each.name in read]
        for each in staying:
            if each.data_location == TensorProto.EXTERNAL:
                load_external_data_for_tensor(each, str(self._folder))
                each.data_location = TensorProto.DEFAULT
        _replace(graph.initializer, [*staying, *constants])
        made_names = {out for node in nodes for out in node.output}
        _replace(graph.value_info, [value for value in graph.value_info if value.name in made_names])
        if wanted and all(each.domain != CONTRIB for each in self._model.opset_import):
            self._model.opset_import.append(helper.make_opsetid(CONTRIB, 1))

    def _matrix(self, product: Product) -> FloatArray:
        stored = numpy_helper.to_array(product.weights, str(self._folder))
        return stored.T if product.transposed else stored


def _replace(field: Any, values: list[Any]) -> None:
    del field[:]
    field.extend(values)
