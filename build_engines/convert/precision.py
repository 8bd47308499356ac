"""Convert an ONNX graph to FP16, except the nodes that need FP32.

The file is strongly typed, as TensorRT 11 requires: it sets the type of every tensor. A node kept in FP32 gets FP32
inputs, with casts if needed. Two neighbouring nodes that are kept exchange FP32. What is kept, and why:

- norms and their parts (means, powers, roots): sums of squares overflow 65504;
- softmax and the addition of its mask: the mask is -1e9, and small weights vanish below 6e-8;
- rotary positions: their angles need more than FP16's 11 bits;
- pixels before the patch embedding, the texture channels and the luminance entropy: differences of near numbers;
- the whole allocator: it decides by comparing, and is a thousandth of the work;
- every node with a constant beyond FP16's range.

FP8 is used only in the vision encoder, around the matrix products that `not_fp8` does not name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from service.core.tensors import MODELS

GREATEST = 65504.0  # of FP16
NORMS = {"LayerNormalization", "RMSNormalization", "ReduceMean", "ReduceL2", "ReduceSum", "Pow", "Sqrt", "Reciprocal"}
ANGLES = {"Cos", "Sin"}
PRODUCTS = {"Conv", "Gemm", "MatMul"}
LAYER = ("queries, keys and values", "projection", "up", "down")  # products in a ViT layer that have weights
CACHED = ("past_key_", "past_value_", "new_key_", "new_value_")  # of the LLM, one pair a layer
SMALL_BYTES = 4096  # constants up to this size may define a shape


@dataclass(frozen=True)
class Converted:
    """A graph in FP16, and the nodes kept in FP32 with the reason, by name."""

    model: onnx.ModelProto
    kept: Mapping[str, str]


def fp16_io(name: str, model: onnx.ModelProto) -> set[str]:
    """The FP16 inputs and outputs of a graph. The LLM has keys and values for every layer."""
    told = MODELS[name].floats()
    ends = {value.name for value in (*model.graph.input, *model.graph.output)}
    return {end for end in ends if end in told or (name == "llm" and end.startswith(CACHED))}


def to_fp16(name: str, model: onnx.ModelProto) -> Converted:
    """Convert `model` in place. It is a graph in FP32, with or without FP8 Q/DQ."""
    constants_to_initializers(model)
    kept = kept_nodes(name, model)
    _Conversion(model, kept, fp16_io(name, model)).run()
    return Converted(model, kept)


def kept_nodes(name: str, model: onnx.ModelProto) -> dict[str, str]:
    """The nodes that stay in FP32, by name, each with its reason."""
    nodes = list(model.graph.node)
    if name.startswith("relevance_allocator"):
        return {node.name: "the allocator decides by comparing" for node in nodes}
    makers = {out: node for node in nodes for out in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node)
    kept: dict[str, str] = {}
    for node in nodes:
        next_ops = {reader.op_type for out in node.output for reader in readers.get(out, [])}
        if node.op_type in NORMS:
            kept[node.name] = "norm"
        elif node.op_type == "Softmax":
            kept[node.name] = "softmax"
        elif node.op_type == "Add" and next_ops and next_ops <= {"Softmax", "Sqrt"}:
            kept[node.name] = "the mask before softmax" if "Softmax" in next_ops else "norm"
    angles = [out for node in nodes if node.op_type in ANGLES for out in node.output]
    kept |= dict.fromkeys(_before(angles, makers), "rotary positions")
    if name == "vision_encoder":
        texture = _before(("texture", "entropy"), makers)
        kept |= dict.fromkeys(texture, "texture and entropy")
        embedding = [node for node in nodes if node.op_type in PRODUCTS and node.name not in texture]
        first = embedding[0]
        kept |= dict.fromkeys(_before([first.input[0]], makers), "pixels before the patch embedding")
    constants = {constant.name: constant for constant in model.graph.initializer}
    for node in nodes:
        if node.name not in kept and any(_beyond(constants.get(tensor)) for tensor in node.input):
            kept[node.name] = "a constant beyond FP16"
    return kept


def not_fp8(model: onnx.ModelProto) -> dict[str, str]:
    """The vision encoder's matrix products that an FP8 build keeps in FP16, with reasons.

    E4M3 has four significant bits, so each factor is off by 2.6 % (rms). The products that lose the most accuracy are
    excluded, as measured by `python -m benchmarks.precision`. Raises ValueError for an encoder whose layers are not
    those of a ViT.
    """
    kept, constants = kept_nodes("vision_encoder", model), {each.name: each for each in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    found = {node.name: kept[node.name] for node in products if node.name in kept}
    weighted = [node for node in products if node.op_type != "Conv" and node.input[1] in constants]
    found |= {node.name: "attention: both factors are computed" for node in products if node.input[1] not in constants}
    layers = [weighted[start : start + len(LAYER)] for start in range(0, len(weighted), len(LAYER))]
    for number, layer in enumerate(layers):
        widths = [tuple(constants[node.input[1]].dims) for node in layer]
        width, wide = widths[0][0], widths[-1][0]
        if widths != [(width, 3 * width), (width, width), (width, wide), (wide, width)]:
            raise ValueError(
                f"layer {number} of the vision encoder multiplies by {widths}, not by {', '.join(LAYER)}: "
                "use fp16 for this encoder"
            )
        found[layer[0].name] = "queries, keys and values: softmax raises their errors to its power"
        if number in (0, len(layers) - 1):
            found |= {node.name: "the first and the last layer" for node in layer}
    return found


def _before(tensors: Iterable[str], makers: Mapping[str, onnx.NodeProto]) -> set[str]:
    """Names of all nodes that these tensors are computed from."""
    found: set[str] = set()
    waiting = list(tensors)
    while waiting:
        node = makers.get(waiting.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            waiting.extend(node.input)
    return found


def _beyond(constant: TensorProto | None) -> bool:
    if constant is None or constant.data_type != TensorProto.FLOAT:
        return False
    values = numpy_helper.to_array(constant)
    return bool(values.size and np.abs(values).max() > GREATEST)


def constants_to_initializers(model: onnx.ModelProto) -> None:
    """Turn Constant nodes into initializers, so that there is one kind. Name every node."""
    graph, staying = model.graph, []
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensor = TensorProto()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            continue
        node.name = node.name or f"{node.op_type}_{index}"
        staying.append(node)
    del graph.node[:]
    graph.node.extend(staying)


class _Conversion:
    """Convert in one pass over the nodes. `types` holds the new type of each float tensor."""

    def __init__(self, model: onnx.ModelProto, kept: Mapping[str, str], fp16_ends: set[str]) -> None:
        self.model, self.graph, self.kept, self.fp16_ends = model, model.graph, kept, fp16_ends
        self.floats = _float_tensors(model)
        self.constants = {constant.name: constant for constant in self.graph.initializer}
        self.types: dict[str, int] = {}
        self.casts: dict[tuple[str, int], str] = {}
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        for value in self.graph.input:
            if value.name in self.floats:
                self.types[value.name] = self._end_type(value.name)
                value.type.tensor_type.elem_type = self.types[value.name]
        for node in list(self.graph.node):
            self._convert(node)
        self._ends()
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self._drop_unread_constants()
        for value in self.graph.value_info:
            if value.name in self.types:
                value.type.tensor_type.elem_type = self.types[value.name]
        self._shape_casts()

    def _end_type(self, name: str) -> int:
        return TensorProto.FLOAT16 if name in self.fp16_ends else TensorProto.FLOAT

    def _convert(self, node: onnx.NodeProto) -> None:
        wanted = TensorProto.FLOAT if node.name in self.kept else TensorProto.FLOAT16
        for place, tensor in enumerate(node.input):
            if tensor in self.floats:
                node.input[place] = self._as(tensor, wanted)
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = wanted
            if attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:  # ConstantOfShape
                attribute.t.CopyFrom(_cast(attribute.t, attribute.t.name, wanted))
        self.types |= {out: wanted for out in node.output if out in self.floats}
        self.nodes.append(node)

    def _as(self, tensor: str, wanted: int) -> str:
        """The tensor, or a copy of it, in the wanted type."""
        if tensor in self.constants:
            return self._constant(tensor, wanted)
        if self.types[tensor] == wanted:
            return tensor
        if (tensor, wanted) not in self.casts:
            copy = f"{tensor}_{TensorProto.DataType.Name(wanted).lower()}"
            self.nodes.append(helper.make_node("Cast", [tensor], [copy], name=f"{copy}_cast", to=wanted))
            self.casts[tensor, wanted] = copy
            self.types[copy] = wanted
        return self.casts[tensor, wanted]

    def _constant(self, name: str, wanted: int) -> str:
        if wanted == TensorProto.FLOAT:
            return name
        if (name, wanted) not in self.casts:
            copy = f"{name}_float16"
            self.graph.initializer.append(_cast(self.constants[name], copy, wanted))
            self.casts[name, wanted] = copy
        return self.casts[name, wanted]

    def _ends(self) -> None:
        """Keep the outputs' names, and cast an output if its type differs from the contract."""
        makers = {out: node for node in self.nodes for out in node.output}
        for value in self.graph.output:
            if value.name not in self.floats:
                continue
            wanted, inner = self._end_type(value.name), f"{value.name}_inner"
            value.type.tensor_type.elem_type = wanted
            if self.types[value.name] == wanted:
                continue
            maker = makers[value.name]
            maker.output[list(maker.output).index(value.name)] = inner
            for node in self.nodes:
                for place, tensor in enumerate(node.input):
                    if tensor == value.name:
                        node.input[place] = inner
            self.nodes.append(helper.make_node("Cast", [inner], [value.name], name=f"{inner}_cast", to=wanted))
            self.types[inner], self.types[value.name] = self.types[value.name], wanted

    def _shape_casts(self) -> None:
        """Give a cast's output the shape of its input: inference would lose the dimension names."""
        known = {value.name: value for value in (*self.graph.input, *self.graph.value_info, *self.graph.output)}
        for node in self.nodes:
            if node.op_type != "Cast" or (node.input[0] in known) == (node.output[0] in known):
                continue
            shaped, other = node.input[0], node.output[0]
            if shaped not in known:
                shaped, other = other, shaped
            value = onnx.ValueInfoProto()
            value.CopyFrom(known[shaped])
            value.name = other
            value.type.tensor_type.elem_type = self.types[other]
            self.graph.value_info.append(value)

    def _drop_unread_constants(self) -> None:
        read = {tensor for node in self.nodes for tensor in node.input} | {value.name for value in self.graph.output}
        staying = [constant for constant in self.graph.initializer if constant.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(staying)


def _cast(constant: TensorProto, name: str, wanted: int) -> TensorProto:
    values = numpy_helper.to_array(constant).astype(helper.tensor_dtype_to_np_dtype(wanted))
    return numpy_helper.from_array(values, name)


def _float_tensors(model: onnx.ModelProto) -> set[str]:
    """Names of all FP32 tensors, including inputs, outputs and constants."""
    _infer_shapes(model)
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    found = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    found |= {constant.name for constant in graph.initializer if constant.data_type == TensorProto.FLOAT}
    known = {value.name for value in values}
    unknown = [out for node in graph.node for out in node.output if out and out not in known]
    if unknown:
        raise ValueError(
            f"the types of {len(unknown)} tensors cannot be inferred, for example {unknown[0]}: "
            "export the graph with static shapes"
        )
    return found


def _infer_shapes(model: onnx.ModelProto) -> None:
    """Fill in `value_info`, using a copy without large weights.

    ONNX cannot infer shapes of models beyond 2 GB.
    """
    light = onnx.ModelProto()
    light.CopyFrom(onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import))
    graph = model.graph
    light.graph.name = graph.name
    light.graph.node.extend(graph.node)
    light.graph.input.extend(graph.input)
    light.graph.output.extend(graph.output)
    for constant in graph.initializer:
        if constant.ByteSize() <= SMALL_BYTES:
            light.graph.initializer.append(constant)
        else:
            light.graph.input.append(helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims))
    inferred = onnx.shape_inference.infer_shapes(light, strict_mode=True, data_prop=True).graph.value_info
    known = {value.name: value for value in graph.value_info}
    for value in inferred:
        if value.name not in known:
            graph.value_info.append(value)
    made = {out for node in graph.node for out in node.output}
    staying = [value for value in graph.value_info if value.name in made]
    del graph.value_info[:]
    graph.value_info.extend(staying)
