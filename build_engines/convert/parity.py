"""Compare two versions of a graph, output by output, on the same inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from build_engines.convert.options import Refused
from build_engines.export import Graph as Exported
from service.core.card import ImageMarks, ModelCard
from triton_models.session import Array

BATCH = 4
DECODED = 4  # tokens after each prompt, as chosen in FP32
# Least cosine of an output with FP32's, or of FP32's with PyTorch's, for a build to go on; for integers, least share of
# equal values. Measured with the reference model: .9999 in FP32, .99 or more in the others.
FLOORS = {"fp32": 0.99, "fp16": 0.98, "bf16": 0.98, "fp8": 0.9, "int8": 0.9, "int4": 0.9}


@dataclass(frozen=True)
class Nearness:
    """Differences of one output.

    Cosine of the whole output, the least cosine of one sample, and the greatest difference. For integers, the share of
    equal values instead of the cosines.
    """

    cosine: float
    least_cosine: float
    greatest_difference: float

    def as_json(self) -> dict[str, float]:
        return {name: float(f"{value:.7g}") for name, value in vars(self).items()}


def nearness(ours: Array, theirs: Array) -> Nearness:
    """Compare two outputs, samples first. Raises ValueError if a value is not finite."""
    a, b = (np.asarray(array, np.float64).reshape(len(array), -1) for array in (ours, theirs))
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("an output has values that are not finite: check the graph's precision")
    if not np.issubdtype(theirs.dtype, np.floating):
        same = (a == b).mean(1)
        return Nearness(float(same.mean()), float(same.min()), float(np.abs(a - b).max()))
    rows = [_cosine(x, y) for x, y in zip(a, b, strict=True)]
    return Nearness(_cosine(a.ravel(), b.ravel()), min(rows), float(np.abs(a - b).max()))


def check(report: Mapping[str, Mapping[str, Nearness]], precision: str) -> None:
    """Raises Refused if an output of a graph is further from the reference than FLOORS allows."""
    for graph, outputs in report.items():
        for output, near in outputs.items():
            if near.cosine < FLOORS[precision]:
                raise Refused(
                    f"{output} of {graph} in {precision} has a cosine of {near.cosine:.4f} with the reference, and "
                    f"{FLOORS[precision]} is expected at least: the graph computes something else. See parity.json in "
                    "the build folder, and build in another precision"
                )


def _cosine(a: Array, b: Array) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else float(np.array_equal(a, b))


def session(graph: Path) -> onnxruntime.InferenceSession:
    """A CPU session that computes FP8 Q/DQ exactly as written, which is slow."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def outputs(graph: Path | Run, feeds: Mapping[str, Array], batched: bool = True) -> dict[str, Array]:
    """Every output for all samples, or for the only one if it has no batch dimension.

    Inputs are cast to the graph's types.
    """
    run = opened(graph)
    takes = {spec.name: _numpy_type(spec.type) for spec in run.get_inputs()}
    names = [spec.name for spec in run.get_outputs()]
    parts = [run.run(names, {name: array.astype(takes[name], copy=False) for name, array in part.items()})
             for part in _batches({name: feeds[name] for name in takes}, batched)]  # fmt: skip
    return {name: np.concatenate(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}


def outputs_of_module(graph: Exported, feeds: Mapping[str, Array], batched: bool = True) -> dict[str, Array]:
    """As `outputs`, of the PyTorch module."""
    parts = []
    for part in _batches({name: feeds[name] for name in graph.inputs}, batched):
        with torch.inference_mode():
            found = graph.module(*(torch.from_numpy(array) for array in part.values()))
        parts.append(found if isinstance(found, tuple) else (found,))
    return {
        name: torch.cat(column).numpy() for name, column in zip(graph.outputs, zip(*parts, strict=True), strict=True)
    }


def _batches(feeds: Mapping[str, Array], batched: bool) -> Iterator[dict[str, Array]]:
    if not batched:
        yield dict(feeds)
        return
    count = len(next(iter(feeds.values())))
    for start in range(0, count, BATCH):
        yield {name: array[start : start + BATCH] for name, array in feeds.items()}


def _numpy_type(onnx_type: str) -> type[np.generic]:
    return {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32,
            "tensor(int64)": np.int64, "tensor(uint8)": np.uint8}[onnx_type]  # fmt: skip


class Module:
    """A PyTorch module in the place of an ONNX graph's session: its inputs, its outputs, and a run."""

    def __init__(self, graph: Exported, vocab_size: int) -> None:
        self._module = graph.module
        self._inputs = [Spec(name, ONNX_TYPES[given.dtype], tuple(given.shape)) for name, given in graph.inputs.items()]
        self._outputs = [Spec(name, "tensor(float)", (-1, vocab_size)) for name in graph.outputs]

    def get_inputs(self) -> list[Spec]:
        return self._inputs

    def get_outputs(self) -> list[Spec]:
        """The vocabulary is the size of the logits; nobody asks for the others' sizes."""
        return self._outputs

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> list[Array]:
        with torch.inference_mode():
            found = self._module(*(torch.from_numpy(feeds[spec.name]) for spec in self._inputs))
        by_name = dict(zip((spec.name for spec in self._outputs), found, strict=True))
        return [by_name[name].numpy() for name in names]


@dataclass(frozen=True)
class Spec:
    """An input or an output."""

    name: str
    type: str  # as ONNX Runtime names it
    shape: tuple[int, ...]


ONNX_TYPES = {torch.float32: "tensor(float)", torch.int32: "tensor(int32)", torch.int64: "tensor(int64)"}
Run = onnxruntime.InferenceSession | Module


def opened(graph: Path | Run) -> Run:
    return session(graph) if isinstance(graph, Path) else graph


@dataclass(frozen=True)
class Encoder:
    """The encoder's graph of an encoder-decoder, and the token with which the decoder begins."""

    run: Run
    start_id: int

    def read(self, ids: Array, visual: Array) -> dict[str, Array]:
        """What the decoder reads of a prompt: its length, and keys and values for each layer."""
        feeds = {"input_ids": ids[np.newaxis], "prompt_embedding_table": visual[np.newaxis]}
        feeds |= {"input_lengths": np.array([len(ids)])}
        takes = {spec.name: _numpy_type(spec.type) for spec in self.run.get_inputs()}
        names = [spec.name for spec in self.run.get_outputs()]
        given = {name: np.asarray(array, takes[name]) for name, array in feeds.items()}
        return {"cross_lengths": np.array([len(ids)])} | dict(zip(names, self.run.run(names, given), strict=True))


@dataclass(frozen=True)
class Images:
    """The graph that makes keys and values of IDEFICS's images, and the words that tell where an image is."""

    run: Run
    marks: ImageMarks

    def read(self, ids: Array, visual: Array) -> dict[str, Array]:
        """What the decoder reads of a prompt with one image: keys and values, and what each column sees of them."""
        names = [spec.name for spec in self.run.get_outputs()]
        found = self.run.run(names, {"prompt_embedding_table": np.asarray(visual[np.newaxis], np.float32)})
        return self.seen(np.arange(len(ids)) >= ids.tolist().index(self.marks.image), len(visual)) | dict(
            zip(names, found, strict=True)
        )

    def seen(self, sees: Array, count: int) -> dict[str, Array]:
        ends = np.where(sees, count, 0)[np.newaxis]
        return {"image_starts": np.zeros_like(ends), "image_ends": ends}


def reader_of(card: ModelCard, graph: Path | Run) -> Encoder | Images | None:
    """Open the graph that reads a prompt before the LLM's decoder; None if the LLM has none."""
    if card.image_marks is not None:
        return Images(opened(graph), card.image_marks)
    return None if card.decoder_start_id is None else Encoder(opened(graph), card.decoder_start_id)


def logits(
    graph: Path | Run, feeds: Mapping[str, Array], forced: Array | None = None, encoder: Encoder | Images | None = None
) -> Array:
    """[B, 1 + DECODED, V]: logits after each prompt and each following token.

    The following tokens are `forced` [B, DECODED], or the likeliest ones.
    """
    run = opened(graph)
    rows = zip(feeds["visual_tokens"], feeds["text_ids"], feeds["text_lengths"], strict=True)
    found = []
    for row, (visual, text, length) in enumerate(rows):
        wanted = None if forced is None else forced[row]
        found.append(np.stack(list(decode(run, visual, text[: int(length)], 1 + DECODED, wanted, encoder))))
    return np.stack(found)


def greedy(
    run: Run,
    visual: Array,
    text: Array,
    most: int,
    end_id: int,
    encoder: Encoder | Images | None = None,
) -> list[int]:
    """The answer's tokens, up to and without the end id."""
    found = []
    for row in decode(run, visual, text, most, encoder=encoder):
        token = int(row.argmax())
        if token == end_id:
            break
        found.append(token)
    return found


def decode(
    run: Run,
    visual: Array,
    text: Array,
    most: int,
    forced: Array | None = None,
    encoder: Encoder | Images | None = None,
) -> Iterator[Array]:
    """Decode one sequence token by token, as the LLM's graph does: `most` rows of logits [V].

    An encoder-decoder or an IDEFICS needs its `encoder`, which reads the prompt, or its image, once.
    """
    takes = {spec.name: spec for spec in run.get_inputs()}
    vocab_size = run.get_outputs()[0].shape[1]
    past = {name: np.zeros([1, spec.shape[1], 0, spec.shape[3]]) for name, spec in takes.items() if _is_past(name)}
    ids, crossed = np.concatenate([np.arange(vocab_size, vocab_size + len(visual)), text]), {}
    if isinstance(encoder, Images):
        ids, crossed = text, encoder.read(text, visual)
    elif encoder is not None:
        ids, crossed = np.array([encoder.start_id]), encoder.read(ids, visual)
    for turn in range(most):
        feeds = {
            "input_ids": ids[np.newaxis],
            "prompt_embedding_table": visual[np.newaxis],
            "past_lengths": np.array([next(iter(past.values())).shape[2]]),
            "input_lengths": np.array([len(ids)]),
            **past,
            **crossed,
        }
        given = {name: np.asarray(feeds[name], _numpy_type(spec.type)) for name, spec in takes.items()}
        last, *new = run.run(["logits", *(name.replace("past", "new", 1) for name in past)], given)
        yield last[0]
        past = {name: np.concatenate([past[name], more], axis=2) for name, more in zip(past, new, strict=True)}
        if isinstance(encoder, Images):
            crossed |= encoder.seen(np.array([True]), len(visual))
        if turn + 1 < most:
            ids = np.array([last[0].argmax() if forced is None else forced[turn]])


def _is_past(name: str) -> bool:
    return name.startswith(("past_key_", "past_value_"))


def residuals(graph: Path) -> list[str]:
    """The tensors that a norm reads, in order: what each layer passes to the next."""
    model = onnx.load(graph, load_external_data=False)
    read = [node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"]
    ends = {value.name for value in model.graph.input} | {constant.name for constant in model.graph.initializer}
    return [name for name in dict.fromkeys(read) if name not in ends]


def inner(graph: Path, names: Sequence[str], feeds: Mapping[str, Array], scratch: Path) -> dict[str, Array]:
    """Inner tensors of a graph that fits in one file."""
    model = onnx.load(graph)
    known = {value.name: value for value in model.graph.value_info}
    model.graph.output.extend(known[name] for name in names)
    onnx.save(model, scratch)
    found = outputs(scratch, feeds)
    return {name: found[name] for name in names}
