"""Write Triton's model repository for one checkpoint: a `config.pbtxt` for each model, the runners and the weights.

    repository/
    ├── card.json  tokenizer.json  (and qformer_tokenizer.json where the Q-Former has its own)
    ├── vision_encoder/  relevance_allocator/  qformer/  llm/     config.pbtxt  1/model.py  1/model.onnx
    │                                                             (llm/1/encoder.onnx if the LLM has a prompt reader,
    │                                                             llm/1/clips.onnx if it has other weights for clips)
    ├── prepare/  compose/  finish/                               config.pbtxt  1/model.py
    ├── see/  attend/  vqa/                                       config.pbtxt  1/.gitkeep
    ├── relevance_allocator_448/  attend_448/                     the same files, if the checkpoint has a closer view
    └── attend_clip/                                              the same, if the checkpoint has a clip resampler

Shapes in the comments leave the batch dimension out; D is the vision width, H the LLM's hidden size. All but
`write_repository` and `write_configs` are pure functions.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from build_engines.replacing import replacing
from service.core.card import LLM_CLIPS, LLM_ENCODER
from service.core.tensors import CLIP_WEIGHTS, LIKELIEST, MODELS, PATCH_SLOTS, VISION_SLOTS, Step, Tensor

LLM_MAX_BATCH = 64  # TensorRT-LLM's habit; a request of ours is a batch of 1 and the runner batches in flight
TEXT_ENCODER = "llm_encoder"  # the graph that reads a prompt (FlanT5) or its images (IDEFICS), served beside the LLM's
GRAPHS = ("vision_encoder", "relevance_allocator", "qformer", "llm")  # models with a model.onnx
LARGE_BYTES = 100_000_000  # of a graph's weights: from here on its runs take more than one core
MOST_INLINE_BYTES = 1_900_000_000  # of weights in the ONNX file itself: protobuf ends at 2 GiB
CONFIG_TYPES = {"BYTES": "STRING"}  # a data type's name in config.pbtxt, if it has another one there
CLOSER_GRAPHS = (*GRAPHS, "relevance_allocator_448")  # and of a checkpoint with a closer view
CLIP_GRAPH = "attend_clip"  # of a checkpoint with a clip resampler
CLIP_LLM = "llm_clips"  # the LLM's graph with its weights for clips and several images, served beside the LLM's own
BESIDE_LLM = {TEXT_ENCODER: LLM_ENCODER, CLIP_LLM: LLM_CLIPS}  # files beside the LLM's model.onnx, by graph


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What differs between checkpoints in the configurations."""

    vision_width: int  # D
    hidden_size: int  # H
    float_type: str = "FP32"  # of features, vision tokens, visual tokens and the prompt embedding table
    text_type: str = "UINT8"  # of texts for the LLM; TensorRT-LLM takes BYTES
    top_log_probs: bool = True  # whether the LLM tells the likeliest tokens; TensorRT-LLM does not
    vision_max_batch: int = 8  # images of one request
    # Graphs whose runs take more than one core. For a small graph a second core saves little (2 of 13 ms for the
    # reference's encoder) and costs as much under load.
    large: frozenset[str] = frozenset()
    llm_max_rows: int = 32  # requests decoded at once
    llm_max_queue: int = 64  # requests that wait for a row; more are refused
    closer_view: bool = False  # whether cells can be seen at level 2
    text_encoder: bool = False  # whether the LLM is an encoder-decoder, with a graph of its own for the encoder
    image_reader: bool = False  # whether the LLM attends to images, with a graph of its own for their keys and values
    clip: bool = False  # whether a clip's frames are attended to together
    clip_weights: bool = False  # whether the LLM has weights of its own for clips and several images
    static: bool = False  # whether the Q-Former always reads all rows that there can be: the graph of a plan

    @property
    def prompt_reader(self) -> bool:
        """Whether a graph of its own reads a prompt, or its images, before the LLM's decoder."""
        return self.text_encoder or self.image_reader

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the letters in the shapes of core.tensors."""
        return {
            "D": self.vision_width,
            "H": self.hidden_size,
            "K": VISION_SLOTS if self.static else PATCH_SLOTS,
            "R": VISION_SLOTS if self.static else -1,
        }

    def sized(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            tensor.sized(self.float_type, self.sizes, self.text_type)
            for tensor in tensors
            if offered(tensor, top_log_probs=self.top_log_probs, clip_weights=self.clip_weights)
        )

    @property
    def beside_llm(self) -> tuple[str, ...]:
        """Graphs that are served beside the LLM's own."""
        return (*([TEXT_ENCODER] if self.prompt_reader else []), *([CLIP_LLM] if self.clip_weights else []))


def offered(tensor: Tensor, *, top_log_probs: bool, clip_weights: bool) -> bool:
    """Whether these models have a tensor of the contract: some of the LLM's depend on the checkpoint."""
    return (top_log_probs or tensor.name not in LIKELIEST) and (clip_weights or tensor.name != CLIP_WEIGHTS)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A knob that the runner reads at load."""

    name: str
    value: str
    why: str


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the repository: its part of the tensor contract, and how Triton runs it."""

    name: str
    title: str
    runner: str  # the module of triton_models with its TritonPythonModel; empty for an ensemble
    max_batch: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: tuple[Step, ...] = ()
    decoupled: bool = False
    parameters: tuple[Parameter, ...] = ()
    instances: int = 1  # processes

    @classmethod
    def of(cls, dimensions: Dimensions, name: str, title: str, runner: str = "", **how: Any) -> Self:
        """The contract's model of that name, in one checkpoint's sizes."""
        model = MODELS[name]
        return cls(
            name,
            title,
            runner,
            max_batch=how.pop("max_batch", dimensions.vision_max_batch if model.batched else 0),
            inputs=dimensions.sized(model.inputs),
            outputs=dimensions.sized(model.outputs),
            steps=model.steps,
            decoupled=model.decoupled,
            **how,
        )


def graphs_of(dimensions: Dimensions) -> tuple[str, ...]:
    """The models with a model.onnx."""
    graphs = CLOSER_GRAPHS if dimensions.closer_view else GRAPHS
    return (*graphs, CLIP_GRAPH) if dimensions.clip else graphs


def models(dimensions: Dimensions) -> list[Model]:
    """Every model of the repository, in the order of a request's life."""
    of = partial(Model.of, dimensions)
    closer_view = [
        of(
            "relevance_allocator_448",
            "As relevance_allocator, and what matters most is seen in the closer view.",
            "onnx_model",
        ),
        of("attend_448", "Cached features of both views and a question to visual tokens."),
    ]
    clip = [
        of(CLIP_GRAPH, "Cached features of all frames of a clip and a question to visual tokens.", "onnx_model"),
    ]
    return [
        of(
            "vision_encoder",
            "An image to its features.",
            "onnx_model",
            parameters=(
                cores(dimensions, "vision_encoder"),
                # 5, as the LLM's, and two vision slots: first tokens of follow-ups come in half the time (p95 of the
                # benchmark's `house`), and new images alone give a fifth fewer answers.
                nice("0", "5 is as much as the LLM's: follow-ups sooner, fewer new images a second"),
            ),
            # Two runs side by side waste less than one on all cores, whose threads wait for each other while the LLM
            # has a core: ViT-B on two cores, 470 against 545 ms of CPU time an image under load.
            instances=2 if "vision_encoder" in dimensions.large else 1,
        ),
        of("relevance_allocator", "Chooses which parts of an image are seen closely for one question.", "onnx_model"),
        of("qformer", "Vision tokens to the visual tokens that the LLM reads.", "qformer"),
        of(
            "llm",
            "The language model: requests are batched in flight, and their tokens streamed.",
            "llm",
            max_batch=LLM_MAX_BATCH,
            parameters=(
                Parameter("max_rows", str(dimensions.llm_max_rows), "requests decoded at once"),
                Parameter("max_queue", str(dimensions.llm_max_queue), "requests that wait for a row; more are refused"),
                Parameter("max_prefill_tokens", "160", "prompt tokens read between two steps of those decoding"),
                Parameter(
                    "stream_interval_ms",
                    "20",
                    "a token that comes so soon after a response waits for the next token; 0 is off",
                ),
                *prefix_cache(dimensions),
                cores(dimensions, "llm", "step"),
                nice("5", "while it waits for cores it decodes more rows at once, at less cost a row"),
            ),
        ),
        of("see", "An image and a question to visual tokens, and the features for the gateway's cache."),
        of("attend", "Cached features and a question to visual tokens."),
        *(closer_view if dimensions.closer_view else []),
        *(clip if dimensions.clip else []),
        of("prepare", "Image bytes and a question's text to the chain's inputs.", "prepare"),
        of(
            "compose",
            "Visual tokens and the prompt's text to the LLM's inputs, now that the count is known.",
            "compose",
        ),
        of("finish", "Token ids to text, response by response.", "finish"),
        of("vqa", "The whole chain for plain Triton clients: the answer comes response by response."),
    ]


def prefix_cache(dimensions: Dimensions) -> tuple[Parameter, ...]:
    """The prefix cache's size. An encoder-decoder has none: it reads a prompt in both directions."""
    if dimensions.text_encoder:
        return ()
    return (Parameter("prefix_cache_bytes", str(64 << 20), "of recent prompts' keys and values, for reuse; 0 is off"),)


def cores(dimensions: Dimensions, graph: str, run: str = "run") -> Parameter:
    if graph in dimensions.large:
        return Parameter("intra_op_threads", "0", f"cores of one {run}; 0 is every core, divided among the instances")
    return Parameter("intra_op_threads", "1", f"cores of one {run}")


def nice(by: str, why: str) -> Parameter:
    return Parameter("nice", by, f"of its threads: {why}")


def config(model: Model) -> str:
    """The text of one model's `config.pbtxt`."""
    blocks = [
        f"# {model.title}\n# Written by build_engines/repository.py; the batch dimension is left out of every shape.",
        f'name: "{model.name}"',
        'platform: "ensemble"' if model.steps else 'backend: "python"',
        f"max_batch_size: {model.max_batch}",
        f"input [\n{tensor_lines(model.inputs)}\n]",
        f"output [\n{tensor_lines(model.outputs)}\n]",
    ]
    if model.steps:
        steps = ",\n".join(step_lines(part) for part in model.steps)
        blocks.append(f"ensemble_scheduling {{\n  step [\n{steps}\n  ]\n}}")
    else:
        blocks.append(f"instance_group [ {{ count: {model.instances}, kind: KIND_CPU }} ]")
        for knob in model.parameters:
            blocks.append(f"# {knob.why}")
            blocks.append(f'parameters {{ key: "{knob.name}", value: {{ string_value: "{knob.value}" }} }}')
        if model.decoupled:
            blocks.append("# A response has one token or more, and the call returns before the last one is sent.")
            blocks.append("model_transaction_policy { decoupled: true }")
    return "\n".join(blocks) + "\n"


def tensor_lines(tensors: Sequence[Tensor]) -> str:
    """One line a tensor, with its comment above."""
    lines = []
    for index, tensor in enumerate(tensors):
        if tensor.note:
            lines.append(f"  # {tensor.note}")
        optional = ", optional: true" if tensor.optional else ""
        comma = "," if index < len(tensors) - 1 else ""
        dims = ", ".join(str(size) for size in tensor.dims)
        datatype = CONFIG_TYPES.get(tensor.datatype, tensor.datatype)
        lines.append(f'  {{ name: "{tensor.name}", data_type: TYPE_{datatype}, dims: [ {dims} ]{optional} }}{comma}')
    return "\n".join(lines)


def step_lines(part: Step) -> str:
    inputs = "\n".join(f'      input_map {{ key: "{key}", value: "{value}" }}' for key, value in part.inputs.items())
    outputs = "\n".join(f'      output_map {{ key: "{key}", value: "{value}" }}' for key, value in part.outputs.items())
    return f'    {{\n      model_name: "{part.model}"\n      model_version: -1\n{inputs}\n{outputs}\n    }}'


def runner(model: Model) -> str:
    """The text of `1/model.py`: Triton's python backend looks for the class in this file."""
    return (
        f'"""Triton\'s python backend starts here; the work is in triton_models/{model.runner}.py."""\n\n'
        f'from triton_models.{model.runner} import TritonPythonModel\n\n__all__ = ["TritonPythonModel"]\n'
    )


def write_repository(repository: Path, dimensions: Dimensions, graphs: Path, beside: Mapping[str, Path]) -> None:
    """Write the whole repository, in place of an earlier one.

    `graphs` is a folder with `<model>.onnx` for each of `graphs_of` and of `beside_llm`, and its file of weights if it
    has one. `beside` are the files beside the models, card and tokenizers, by
    name. Raises FileNotFoundError, which names every missing file, before anything is written.
    """
    names = (*graphs_of(dimensions), *dimensions.beside_llm)
    sources = [*beside.values(), *(graphs / f"{name}.onnx" for name in names)]
    if missing := [str(path) for path in sources if not path.is_file()]:
        raise FileNotFoundError(f"missing: {', '.join(missing)}")
    with replacing(repository) as fresh:
        write_configs(fresh, dimensions)
        for name in names:
            file = file_beside_llm(fresh, name) if name in BESIDE_LLM else fresh / name / "1" / "model.onnx"
            shutil.copyfile(graphs / f"{name}.onnx", file)
            if (graphs / weights_file(name)).exists():
                shutil.copyfile(graphs / weights_file(name), file.parent / weights_file(name))
        for name, path in beside.items():
            shutil.copyfile(path, fresh / name)


def file_beside_llm(repository: Path, graph: str) -> Path:
    """The file of a graph of BESIDE_LLM."""
    return repository / "llm" / "1" / BESIDE_LLM[graph]


def weights_file(model: str) -> str:
    """The file of weights of a graph of more than 2 GB, which is protobuf's limit. The graph names it."""
    return f"{model}.onnx.data"


def write_configs(repository: Path, dimensions: Dimensions) -> None:
    """Write every file of the repository that is text and not the checkpoint's."""
    for model in models(dimensions):
        version = repository / model.name / "1"
        version.mkdir(parents=True, exist_ok=True)
        (repository / model.name / "config.pbtxt").write_text(config(model))
        if model.steps:
            (version / ".gitkeep").touch()
        else:
            (version / "model.py").write_text(runner(model))
