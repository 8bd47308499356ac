"""Export a checkpoint to ONNX graphs and a card, as Triton's model repository.

    python -m build_engines.export reference --out model_repository
    python -m build_engines.export Salesforce/instructblip-vicuna-7b --out vicuna_repository

The batch is dynamic in every graph, as are the Q-Former's vision tokens and the decoder's lengths.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import get_args

import onnx
import onnx_ir
import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection

from build_engines.model.allocation import CELL_COUNT, PATCH_COUNT
from build_engines.model.checkpoint import QUERIES, Checkpoint
from build_engines.model.clip import CARD
from build_engines.replacing import why_not
from build_engines.repository import (
    CLIP_GRAPH,
    CLIP_LLM,
    GRAPHS,
    LARGE_BYTES,
    MOST_INLINE_BYTES,
    TEXT_ENCODER,
    Dimensions,
    weights_file,
    write_repository,
)
from service.core.card import ClipResampler, ModelCard
from service.core.confidence import Calibration
from service.core.tensors import DETAIL, FLOAT, MODELS, QUESTION, VISION
from service.core.tensors import Tensor as Described
from service.core.viewport import AskedFit, Colour
from service.core.vision import MAX_VISUAL_TOKENS

OPSET = 18
TYPES = {FLOAT: torch.float32, "FP32": torch.float32, "INT32": torch.int32}  # of the contract's tensors in a graph


@dataclasses.dataclass(frozen=True)
class Graph:
    """One graph to export.

    Inputs are in the order of the module's arguments. `dynamic` has the dynamic axes of each input.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    outputs: Sequence[str]


def names(tensors: Sequence[Described]) -> list[str]:
    return [tensor.name for tensor in tensors]


def examples(tensors: Sequence[Described], sizes: Mapping[str, int] = MappingProxyType({})) -> dict[str, Tensor]:
    """Zeros at batch 2, by name."""
    return {tensor.name: torch.zeros(2, *tensor.shape(sizes), dtype=TYPES[tensor.datatype]) for tensor in tensors}


def graphs(checkpoint: Checkpoint) -> list[Graph]:
    """The four graphs, with example inputs at batch 2.

    And `relevance_allocator_448` if there is a closer view, `attend_clip` if there is a clip resampler, `llm_encoder`
    if the LLM has a prompt reader, `llm_clips` if it has other weights for clips and several images.
    """
    vision = checkpoint.model.config.vision_config
    batch = {0: "batch"}
    question = examples(QUESTION)
    question["question_mask"] += 1
    return [
        Graph(
            "vision_encoder",
            checkpoint.vision_encoder(),
            {"image": torch.zeros(2, 3, vision.image_size, vision.image_size, dtype=torch.uint8)},
            {"image": batch},
            names(VISION),
        ),
        *_allocators(checkpoint, question),
        *_clip(checkpoint),
        Graph(
            "qformer",
            checkpoint.qformer(),
            {"vision_tokens": torch.zeros(2, 80, vision.hidden_size), "attend": torch.ones(2, 80, dtype=torch.int32)}
            | (question if checkpoint.reads_question else {}),
            dict.fromkeys(["vision_tokens", "attend"], batch | {1: "vision_tokens"})
            | (dict.fromkeys(question, batch) if checkpoint.reads_question else {}),
            ["visual_tokens"],
        ),
        *_language_model(checkpoint),
    ]


def _language_model(checkpoint: Checkpoint) -> list[Graph]:
    """The graphs of a decoder-only LLM, by its sets of weights, or what reads a prompt first and the decoder."""
    text, encoder = checkpoint.text_config, checkpoint.prompt_reader()
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layers = text.num_decoder_layers if checkpoint.is_encoder_decoder else text.num_hidden_layers
    cached = [f"{part}_{layer}" for layer in range(layers) for part in ("key", "value")]
    batch = {0: "batch"}
    prompt = {
        "input_ids": torch.zeros(2, 5, dtype=torch.long),
        "prompt_embedding_table": torch.zeros(2, 3, checkpoint.visual_width),
        "past_lengths": torch.tensor([7, 4]),
        "input_lengths": torch.tensor([5, 3]),
    }
    axes = {
        "input_ids": batch | {1: "length"},
        "prompt_embedding_table": batch | {1: "visual_tokens"},
        "past_lengths": batch,
        "input_lengths": batch,
    }
    past = {f"past_{name}": torch.zeros(2, heads, 7, head_dim) for name in cached}
    past_axes = {name: batch | {2: "past_length"} for name in past}
    outputs = ["logits", *(f"new_{name}" for name in cached)]
    if encoder is None:
        decoders = {"llm": checkpoint.decoder(), CLIP_LLM: checkpoint.clip_decoder()}
        inputs, moving = prompt | past, axes | past_axes
        return [Graph(name, decoder, inputs, moving, outputs) for name, decoder in decoders.items() if decoder]
    if checkpoint.is_idefics:
        table = {"prompt_embedding_table": prompt.pop("prompt_embedding_table")}
        seen = {"image_starts": torch.zeros(2, 5, dtype=torch.long), "image_ends": torch.full((2, 5), 6)}
        axes |= dict.fromkeys(seen, axes["input_ids"])
        looks = text.num_hidden_layers // text.cross_layer_interval
        cross = {f"cross_{name}": torch.zeros(2, heads, 6, head_dim) for name in cached[: 2 * looks]}
        cross_axes = {name: batch | {2: "visual_tokens"} for name in cross}
        return [
            Graph(TEXT_ENCODER, encoder, table, {name: axes[name] for name in table}, list(cross)),
            Graph("llm", checkpoint.decoder(), prompt | seen | past | cross,
                  {name: axes[name] for name in (*prompt, *seen)} | past_axes | cross_axes, outputs),
        ]  # fmt: skip
    past_lengths = prompt.pop("past_lengths")
    cross = {f"cross_{name}": torch.zeros(2, heads, 6, head_dim) for name in cached}
    cross_axes = {name: batch | {2: "prompt_length"} for name in cross}
    token = {
        "input_ids": torch.zeros(2, 1, dtype=torch.long),
        "past_lengths": past_lengths,
        "cross_lengths": torch.tensor([6, 2]),
    }
    token_axes = dict.fromkeys(token, batch)
    return [
        Graph(TEXT_ENCODER, encoder, prompt, {name: axes[name] for name in prompt}, list(cross)),
        Graph("llm", checkpoint.decoder(), token | past | cross, token_axes | past_axes | cross_axes, outputs),
    ]


def _allocators(checkpoint: Checkpoint, question: dict[str, Tensor]) -> list[Graph]:
    """The allocator's graphs. Their shapes are static, so the closer view needs a graph of its own."""
    width = checkpoint.model.config.vision_config.hidden_size
    sizes = {"D": width}
    budget = torch.tensor([[64, 256, 32, 32]] * 2, dtype=torch.int32)
    inputs = examples(MODELS["relevance_allocator"].inputs, sizes) | question | {"budget": budget}
    views = {"relevance_allocator": inputs}
    if checkpoint.closer is not None:
        views["relevance_allocator_448"] = inputs | examples([DETAIL], sizes)
    batch = {0: "batch"}
    return [
        Graph(name, checkpoint.allocator(), given, dict.fromkeys(given, batch), names(MODELS[name].outputs))
        for name, given in views.items()
    ]


def _clip(checkpoint: Checkpoint) -> list[Graph]:
    """The graph that attends to all frames of a clip, if there is a clip resampler. The number of frames is dynamic."""
    attention = checkpoint.clip_attention()
    if attention is None:
        return []
    frames, sizes = 4, {"D": checkpoint.model.config.vision_config.hidden_size}
    inputs = {}
    for tensor in MODELS[CLIP_GRAPH].inputs:
        dims = [frames if size == -1 else size for size in tensor.shape(sizes)]
        inputs[tensor.name] = torch.zeros(dims, dtype=TYPES[tensor.datatype])
    inputs |= {"times": torch.linspace(0, 1, frames), "clip_budget": torch.tensor([64, 256], dtype=torch.int32)}
    of_frames = {name: {0: "frames"} for name in (*names(VISION), "times")}
    return [Graph(CLIP_GRAPH, attention, inputs, of_frames, names(MODELS[CLIP_GRAPH].outputs))]


def export_graph(graph: Graph, path: Path, most_inline_bytes: int = MOST_INLINE_BYTES) -> None:
    """Write one ONNX file, with `weights_file` beside it if the weights are too large for one file.

    Every dimension except those named in `graph.dynamic` is static.
    """
    arguments, shapes = tuple(graph.inputs.values()), ShapesCollection()  # by tensor, because forward may take `*past`
    for name, axes in graph.dynamic.items():
        shapes[graph.inputs[name]] = dict.fromkeys(axes, Dim.DYNAMIC)
    # PyTorch's cache of traced shapes costs more than it saves if a shape is dynamic.
    with warnings.catch_warnings(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        warnings.simplefilter("ignore")  # deprecations inside the exporter
        program = torch.onnx.export(
            graph.module,
            arguments,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=shapes.dynamic_shapes(graph.module, arguments),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    large = sum(weights.nbytes for weights in graph.module.state_dict().values()) > most_inline_bytes
    if large:  # straight to disk: in memory there would be two more copies of the weights
        onnx_ir.save(program.model, path, external_data=weights_file(graph.name))
    model = onnx.load(path, load_external_data=False) if large else program.model_proto
    _name_dimensions(model, graph)
    _cast_bytes_first(model)
    _gather_rows(model)
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces of this machine
        node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        if hasattr(value, "metadata_props"):
            del value.metadata_props[:]
    path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(path, full_check=True)


def _name_dimensions(model: onnx.ModelProto, graph: Graph) -> None:
    """Name dynamic input dimensions as in `graph.dynamic` instead of the exporter's s0, s1, ..."""
    renamed: dict[str, str] = {}
    for value in model.graph.input:
        for axis, name in graph.dynamic.get(value.name, {}).items():
            renamed[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in renamed:
                dimension.dim_param = renamed[dimension.dim_param]


def _cast_bytes_first(model: onnx.ModelProto) -> None:
    """Read the shape of a uint8 input from its cast copy: TensorRT takes uint8 only in a cast."""
    for value in model.graph.input:
        if value.type.tensor_type.elem_type != onnx.TensorProto.UINT8:
            continue
        casts = (node for node in model.graph.node if node.op_type == "Cast" and value.name in node.input)
        cast_first = next(casts).output[0]
        for node in model.graph.node:
            if node.op_type == "Shape" and node.input[0] == value.name:
                node.input[0] = cast_first
        model.graph.node.sort(key=lambda node: node.output[0] != cast_first)


def _gather_rows(model: onnx.ModelProto) -> None:
    """Gather whole rows [B, n, D] instead of single elements.

    The exporter gathers elements by an index that is expanded to every element. Whole rows take a tenth of the time on
    a CPU.
    """
    made_by = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type != "GatherElements" or node.input[1] not in made_by:
            continue
        copied = made_by[node.input[1]]
        if copied.op_type != "Expand" or made_by[copied.input[0]].op_type != "Unsqueeze":
            continue
        index = copied.input[0]  # [B, m, 1]
        node.CopyFrom(onnx.helper.make_node("GatherND", [node.input[0], index], node.output, node.name, batch_dims=1))
        if not any(copied.output[0] in other.input for other in model.graph.node):
            model.graph.node.remove(copied)


def card(checkpoint: Checkpoint) -> ModelCard:
    """Describe the checkpoint for the service.

    Raises ValueError as `offered_visual_tokens`, `Checkpoint.end_id` and `Checkpoint.around_text` do, and if
    model_card.json has a default outside the offered range, of visual or of vision tokens.
    """
    vision, text = checkpoint.model.config.vision_config, checkpoint.text_config
    told, group, offered = dict(checkpoint.card), (checkpoint.queries,) * 2, offered_visual_tokens(checkpoint)
    told.pop("visual_tokens", None)
    unasked = _range(told.pop("default_visual_tokens", group))
    looked = _tokens(told.pop("default_vision_tokens", (CELL_COUNT, PATCH_COUNT)))
    if unasked[0] < offered[0] or unasked[1] > offered[1]:
        raise ValueError(
            f"model_card.json has default_visual_tokens {unasked} outside its visual_tokens {offered}: "
            "choose a default within them"
        )
    fingerprint = checkpoint.visual_fingerprint()
    clip_fingerprint = checkpoint.clip_fingerprint()
    language = checkpoint.language_fingerprint()
    weights = {"weights": fingerprint, "language": language}
    told.pop("end_id", None)
    bos_id, text_end_id = checkpoint.around_text
    confidence, why = _calibration(told.pop("confidence", None), vision.hidden_size, weights, clip_fingerprint)
    return ModelCard(
        name=str(told.pop("name")),
        fingerprint=checkpoint.vision_fingerprint(),
        visual_fingerprint=fingerprint,
        vocab_size=checkpoint.vocab_size,
        hidden_size=checkpoint.visual_width,
        vision_width=vision.hidden_size,
        bos_id=bos_id,
        end_id=checkpoint.end_id,
        pad_id=_padding(text.pad_token_id, checkpoint),
        max_positions=checkpoint.max_positions,
        prompt_template=str(told.pop("prompt", checkpoint.prompt)),
        allocator_trained=checkpoint.participatory is not None or checkpoint.zero_shot is not None,
        allocator=checkpoint.allocator_state,
        vision_tokens=(CELL_COUNT, PATCH_COUNT),
        visual_tokens=offered,
        default_visual_tokens=unasked,
        default_vision_tokens=looked,
        interleaved=bool(told.pop("interleaved", checkpoint.is_idefics)),
        system_template=str(told.pop("system_template", "")),
        decoder_start_id=checkpoint.decoder_start_id,
        image_marks=checkpoint.image_marks,
        text_end_id=text_end_id,
        closer_view=checkpoint.closer is not None,
        closer_view_at=float(told.pop("closer_view_at", 1.0)),
        fit=_fit(told.pop("fit", "squash")),
        pad_colour=_colour(checkpoint.image_mean),
        question_tokenizer=checkpoint.question_tokenizer,
        question_alone=checkpoint.image_text is not None,
        frames=int(told.pop("frames", checkpoint.frames)),
        top_log_probs=True,
        clip=None if checkpoint.clip is None else ClipResampler.from_json(CARD | {"fingerprint": clip_fingerprint}),
        clip_weights=checkpoint.clip_language is not None,
        language_fingerprint=language,
        confidence=confidence,
        metadata=told | {"confidence": why},
    )


def offered_visual_tokens(checkpoint: Checkpoint) -> tuple[int, int]:
    """Least and most visual tokens that a request may ask for.

    Raises ValueError if those of model_card.json are not groups of 32, or not IDEFICS's only group.
    """
    group = (checkpoint.queries,) * 2
    offered = _range(checkpoint.card.get("visual_tokens", group))
    if checkpoint.is_idefics and offered != group:
        raise ValueError(f"model_card.json gives {offered} visual_tokens: IDEFICS has {group[0]}. Leave them out")
    return offered


def _padding(told: int | None, checkpoint: Checkpoint) -> int:
    """Return the padding token; the end token if the configuration names none, or one outside the vocabulary."""
    return told if told is not None and 0 <= told < checkpoint.vocab_size else checkpoint.end_id


def _fit(told: object) -> AskedFit:
    """Read how images that are not square are fitted. Raises ValueError for an unknown way."""
    for fit in get_args(AskedFit):
        if told == fit:
            return fit  # type: ignore[no-any-return]
    raise ValueError(f"model_card.json gives the fit {told!r}: give one of {', '.join(get_args(AskedFit))}")


def _colour(mean: Sequence[float]) -> Colour:
    """Return the colour, 0 to 255, whose pixels are about 0 once the encoder has subtracted its mean."""
    red, green, blue = (round(255 * part) for part in mean)
    return red, green, blue


def _tokens(told: object) -> tuple[int, int]:
    """Read a default budget of vision tokens. Raises ValueError unless it lies within what a budget can ask for."""
    if isinstance(told, list | tuple) and len(told) == 2 and all(isinstance(one, int) for one in told):
        least, most = told
        if CELL_COUNT <= least <= most <= PATCH_COUNT:
            return least, most
    raise ValueError(
        f"model_card.json gives {told} default_vision_tokens: give [least, most] from {CELL_COUNT} to {PATCH_COUNT}"
    )


def _calibration(
    told: object, vision_width: int, weights: Mapping[str, str], clip_fingerprint: str
) -> tuple[Calibration | None, str]:
    """Read the checkpoint's calibration -> it, and what to say about it.

    weights: the fingerprints that it must have been fitted on. None if it was fitted on others, or does not tell them.
    If only the weights for clips are others, so is the part about clips.
    """
    if told is None:
        return None, "absent: this checkpoint is not calibrated; `glimpse calibrate` does it"
    calibration = Calibration.from_json(told, vision_width)
    if any(calibration.fitted_on.get(name) != value for name, value in weights.items()):
        return None, (
            "absent: the checkpoint's calibration is of other weights, or of another prompt or tokenizer; "
            "`glimpse calibrate` fits a new one"
        )
    if calibration.fitted_on.get("clip_weights") != clip_fingerprint:
        calibration = dataclasses.replace(calibration, several=None)
    return calibration, calibration.about()


def _range(told: object) -> tuple[int, int]:
    """Read the least and most visual tokens. Raises ValueError unless both are whole groups of 32."""
    if isinstance(told, list | tuple) and len(told) == 2 and all(isinstance(end, int) for end in told):
        least, most = told
        if QUERIES <= least <= most <= MAX_VISUAL_TOKENS and not (least % QUERIES or most % QUERIES):
            return least, most
    raise ValueError(
        f"model_card.json gives {told} visual tokens: give [least, most] in multiples of 32, such as [32, 128]"
    )


def export(source: Path | str, repository: Path, write: Callable[[Graph, Path], None] = export_graph) -> None:
    """Export the checkpoint in a directory or on the hub to a repository that Triton serves.

    `write` makes each graph's file. Raises as `Checkpoint.load` does, and ValueError if `repository` is a folder of
    something else. The repository is written after every graph is exported, and replaces an earlier one as a whole.
    """
    require_replaceable(repository)
    checkpoint = Checkpoint.load(source)
    told = card(checkpoint)
    for noisy in ("torch.onnx", "onnxscript"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for graph in graphs(checkpoint):
            path = scratch / f"{graph.name}.onnx"
            write(graph, path)
            print(f"{path.name:26} {weights_bytes(path) / 1e6:5.1f} MB")
        card_path = scratch / "card.json"
        card_path.write_text(told.to_json())
        large = frozenset(name for name in GRAPHS if weights_bytes(scratch / f"{name}.onnx") > LARGE_BYTES)
        dimensions = Dimensions(
            told.vision_width,
            told.hidden_size,
            closer_view=told.closer_view,
            text_encoder=checkpoint.is_encoder_decoder,
            image_reader=checkpoint.is_idefics,
            clip=checkpoint.clip is not None,
            clip_weights=told.clip_weights,
            large=large,
        )
        beside = {"card.json": card_path} | checkpoint.tokenizers(scratch)
        write_repository(repository, dimensions, scratch, beside)


def require_replaceable(repository: Path) -> None:
    """Raises ValueError if an export cannot replace the folder as a whole."""
    if why := why_not(repository):
        raise ValueError(why)


def weights_bytes(path: Path) -> int:
    """Size of a graph's file and of the weights file beside it, if any."""
    beside = path.with_name(weights_file(path.stem))
    return sum(file.stat().st_size for file in (path, beside) if file.exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", help="directory or Hugging Face hub name of a BLIP-2, InstructBLIP or IDEFICS checkpoint"
    )
    parser.add_argument("--out", type=Path, required=True, help="repository to write")
    arguments = parser.parse_args()
    try:
        require_replaceable(arguments.out)
    except ValueError as exc:
        parser.error(str(exc))
    export(arguments.checkpoint, arguments.out)


if __name__ == "__main__":
    main()
