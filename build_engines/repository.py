"""Writes Triton's model repository for one checkpoint: a `config.pbtxt` a model, the runners and the weights.

    repository/
    ├── card.json  tokenizer.json  (and qformer_tokenizer.json where the Q-Former has its own)
    ├── vision_encoder/  relevance_allocator/  qformer/  llm/     config.pbtxt  1/model.py  1/model.onnx
    ├── prepare/  compose/  finish/                               config.pbtxt  1/model.py
    ├── see/  attend/  vqa/                                       config.pbtxt  1/.gitkeep
    └── relevance_allocator_448/  attend_448/                     as theirs, where the checkpoint has a closer view

Shapes in the comments leave the batch dimension out; D is the vision width, H the LLM's hidden size. All but
`write_repository` and `write_configs` are pure functions.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

LLM_MAX_BATCH = 64  # TensorRT-LLM's habit; a request of ours is a batch of 1 and the runner batches in flight
GRAPHS = ("vision_encoder", "relevance_allocator", "qformer", "llm")  # models with a model.onnx
PATCH_SLOTS, VISION_SLOTS = 257, 401  # CLS and the most vision tokens, of the 224-pixel view and with the closer one
LARGE_BYTES = 100_000_000  # of a graph's weights: from here on its runs take more than one core
MOST_INLINE_BYTES = 1_900_000_000  # of weights in the ONNX file itself: protobuf ends at 2 GiB
CLOSER_GRAPHS = (*GRAPHS, "relevance_allocator_448")  # and of a checkpoint with a closer view


@dataclass(frozen=True, slots=True)
class Dimensions:
    """What differs between checkpoints in the configurations."""

    vision_width: int  # D
    hidden_size: int  # H
    float_type: str = "FP32"  # of features, vision tokens, visual tokens and the prompt embedding table
    vision_max_batch: int = 8  # images of one request
    # Graphs whose runs take more than one core. Of a small one a second core gains little alone (2 ms of 13 of the
    # reference's encoder) and costs as much under load.
    large: frozenset[str] = frozenset()
    llm_max_rows: int = 32  # requests decoded at once
    llm_max_queue: int = 64  # requests that wait for a row; more are refused
    closer_view: bool = False  # whether cells can be seen at level 2
    static: bool = False  # whether the Q-Former reads one number of rows, all that there can be: a plan's graph


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a configuration; `dims` without the batch dimension, -1 where it varies."""

    name: str
    data_type: str  # FP32, INT32, ... as Triton's clients write it
    dims: tuple[int, ...]
    why: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Parameter:
    """A knob that the runner reads at load."""

    name: str
    value: str
    why: str


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an ensemble. Both maps go from the model's name of a tensor to the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Model:
    """One model of the repository."""

    name: str
    title: str
    runner: str  # the module of triton_models with its TritonPythonModel; empty for an ensemble
    max_batch: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    decoupled: bool = False
    steps: tuple[Step, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    instances: int = 1  # processes


def graphs_of(dimensions: Dimensions) -> tuple[str, ...]:
    """The models with a model.onnx."""
    return CLOSER_GRAPHS if dimensions.closer_view else GRAPHS


def models(dimensions: Dimensions) -> list[Model]:
    """Every model of the repository, in the order of a request's life."""
    real, width, hidden = dimensions.float_type, dimensions.vision_width, dimensions.hidden_size
    image = Tensor("image", "UINT8", (3, 224, 224), "RGB; the graph normalises")
    vision = (
        Tensor("features", real, (257, width), "CLS first, then the 16x16 patches row by row"),
        Tensor("saliency", "FP32", (256,), "CLS-to-patch attention of the last layer"),
        Tensor("entropy", "FP32", (256,), "of each patch's luminance histogram, over 4 bits"),
        Tensor("texture", real, (13, 16, 16), "colour, edges, place, contrast"),
    )
    detail = Tensor("detail_features", real, (1024, width), "of the 448-pixel view's four crops, 32x32 row by row")
    question = (
        Tensor("question_ids", "INT32", (32,), "the question's tokens, cut or padded"),
        Tensor("question_mask", "INT32", (32,), "1 where a token stands"),
    )
    budget = Tensor("budget", "INT32", (4,), "least and most vision tokens, least and most visual tokens")
    any_chosen = _chosen(real, VISION_SLOTS if dimensions.static else -1, width)
    chosen = _chosen(real, VISION_SLOTS if dimensions.static else PATCH_SLOTS, width)
    chosen_closer = _chosen(real, VISION_SLOTS, width)
    relevance = (
        Tensor("relevance", "FP32", (256,), "in [0, 1], where the question makes us look"),
        Tensor("scores", "FP32", (3, 256), "propositional, perspectival, participatory"),
        Tensor("levels", "INT32", (64,), "level of detail of each of the 8x8 cells"),
        Tensor("tensions", "FP32", (3,), "particularize, explore, diversify"),
    )
    visual = (
        Tensor("visual_tokens", real, (128, hidden), "rows past the count are 0"),
        Tensor("visual_count", "INT32", (1,), "32, 64, 96 or 128"),
    )
    prompt_ids = Tensor("prompt_ids", "INT32", (-1,), "BOS and the prompt's text, without the visual ids")
    sampling = (
        Tensor("max_tokens", "INT32", (1,), "most tokens of the answer", optional=True),
        Tensor("temperature", "FP32", (1,), "0 is greedy", optional=True),
        Tensor("top_k", "INT32", (1,), "0 is off", optional=True),
        Tensor("top_p", "FP32", (1,), "1 is off", optional=True),
        Tensor("seed", "UINT64", (1,), "the same seed draws the same answer", optional=True),
    )
    # TensorRT-LLM's names, so that its backend can stand here unchanged.
    llm_prompt = (
        Tensor("input_ids", "INT32", (-1,), "visual tokens are ids V, V+1, ..., V the vocabulary's size"),
        Tensor("input_lengths", "INT32", (1,)),
        Tensor("request_output_len", "INT32", (1,), "most tokens to generate"),
        Tensor("prompt_embedding_table", real, (-1, hidden), "row i stands for id V+i"),
        Tensor("prompt_vocab_size", "INT32", (1,), "rows of the table"),
        Tensor("prompt_table_extra_ids", "UINT64", (-1,), "one an input token: 0 for text, equal for equal embeddings"),
        Tensor("end_id", "INT32", (1,), "sent as the last token when generated"),
        Tensor("pad_id", "INT32", (1,)),
        Tensor("streaming", "BOOL", (1,), "one response a token"),
    )
    llm_sampling = (
        Tensor("temperature", "FP32", (1,), "0 is greedy", optional=True),
        Tensor("runtime_top_k", "INT32", (1,), "0 is off", optional=True),
        Tensor("runtime_top_p", "FP32", (1,), "1 is off", optional=True),
        Tensor("seed", "UINT64", (1,), "the same seed draws the same answer", optional=True),
        Tensor("repetition_penalty", "FP32", (1,), "1 is off", optional=True),
    )
    llm_stop = Tensor("stop", "BOOL", (1,), "true ends the request with the same id", optional=True)
    llm_outputs = (
        Tensor("output_ids", "INT32", (-1, -1), "[1 beam, new tokens]"),
        Tensor("sequence_length", "INT32", (-1,), "of each beam, so far"),
        Tensor("cum_log_probs", "FP32", (-1,), "of each beam, so far"),
        Tensor("output_log_probs", "FP32", (-1, -1), "[1 beam, new tokens]"),
    )
    texts = (
        Tensor("image_bytes", "UINT8", (-1,), "the file: JPEG, PNG, WebP or GIF"),
        Tensor("question", "UINT8", (-1,), "UTF-8"),
    )
    answer = Tensor("answer", "UINT8", (-1,), "the responses' concatenation is UTF-8")
    # The ensemble's own inputs are called temperature and seed too: what compose hands on needs other names.
    to_llm = same([*llm_prompt, *llm_sampling]) | {"temperature": "llm_temperature", "seed": "llm_seed"}
    encode = step("vision_encoder", [image], vision)
    allocate = step("relevance_allocator", [*vision, *question, budget], [*chosen, *relevance])
    query = step("qformer", [*any_chosen, *question], visual)
    vision_batch = dimensions.vision_max_batch
    closer = (*vision, detail, *question, budget)
    closer_view = [
        Model(
            "relevance_allocator_448",
            "As relevance_allocator, and what matters most is seen in the closer view.",
            "onnx_model",
            vision_batch,
            closer,
            (*chosen_closer, *relevance),
        ),
        Model(
            "attend_448",
            "Cached features of both views and a question to visual tokens.",
            "",
            vision_batch,
            closer,
            (*visual, *relevance),
            steps=(step("relevance_allocator_448", closer, [*chosen_closer, *relevance]), query),
        ),
    ]
    return [
        Model(
            "vision_encoder",
            "An image to its features.",
            "onnx_model",
            vision_batch,
            (image,),
            vision,
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
        Model(
            "relevance_allocator",
            "Chooses which parts of an image are seen closely for one question.",
            "onnx_model",
            vision_batch,
            (*vision, *question, budget),
            (*chosen, *relevance),
        ),
        Model(
            "qformer",
            "Vision tokens to the visual tokens that the LLM reads.",
            "qformer",
            vision_batch,
            (*any_chosen, *question),
            visual,
        ),
        Model(
            "llm",
            "The language model: one response a token, requests batched in flight.",
            "llm",
            LLM_MAX_BATCH,
            (*llm_prompt, *llm_sampling, llm_stop),
            llm_outputs,
            decoupled=True,
            parameters=(
                Parameter("max_rows", str(dimensions.llm_max_rows), "requests decoded at once"),
                Parameter("max_queue", str(dimensions.llm_max_queue), "requests that wait for a row; more are refused"),
                Parameter("max_prefill_tokens", "160", "prompt tokens read between two steps of those decoding"),
                Parameter(
                    "prefix_cache_bytes", str(64 << 20), "of recent prompts' keys and values, for reuse; 0 is off"
                ),
                cores(dimensions, "llm", "step"),
                nice("5", "who waits for cores decodes more rows at once, which costs less a row"),
            ),
        ),
        Model(
            "see",
            "An image and a question to visual tokens, and the features for the gateway's cache.",
            "",
            vision_batch,
            (image, *question, budget),
            (*visual, *relevance, *vision),
            steps=(encode, allocate, query),
        ),
        Model(
            "attend",
            "Cached features and a question to visual tokens.",
            "",
            vision_batch,
            (*vision, *question, budget),
            (*visual, *relevance),
            steps=(allocate, query),
        ),
        *(closer_view if dimensions.closer_view else []),
        Model(
            "prepare",
            "Image bytes and a question's text to the chain's inputs.",
            "prepare",
            vision_batch,
            texts,
            (image, *question, budget, prompt_ids),
        ),
        Model(
            "compose",
            "Visual tokens and the prompt's text to the LLM's inputs, now that the count is known.",
            "compose",
            vision_batch,
            (*visual, prompt_ids, *sampling),
            (*llm_prompt, *(replace(tensor, optional=False) for tensor in llm_sampling)),
        ),
        Model(
            "finish",
            "Token ids to text, response by response.",
            "finish",
            vision_batch,
            (llm_outputs[0],),
            (answer,),
        ),
        Model(
            "vqa",
            "The whole chain for plain Triton clients: the answer comes response by response.",
            "",
            vision_batch,
            (*texts, *sampling),
            (answer,),
            decoupled=True,
            steps=(
                step("prepare", texts, [image, *question, budget, prompt_ids]),
                encode,
                # Triton refuses an ensemble tensor that no step reads: here nobody asks for the relevance map.
                step("relevance_allocator", [*vision, *question, budget], chosen),
                query,
                Step("compose", same([*visual, prompt_ids, *sampling]), to_llm),
                Step("llm", to_llm, same(llm_outputs[:1])),
                step("finish", llm_outputs[:1], [answer]),
            ),
        ),
    ]


def _chosen(real: str, rows: int, width: int) -> tuple[Tensor, ...]:
    """What an allocator hands to the Q-Former: as many rows as it can ever choose, so that no more are copied."""
    return (
        Tensor("vision_tokens", real, (rows, width), "row 0 is CLS; real tokens come first"),
        Tensor("vision_mask", "INT32", (rows,), "0 is padding, g >= 1 the group that reads the token"),
        Tensor("query_groups", "INT32", (1,), "1 to 4 groups of 32 queries"),
    )


def cores(dimensions: Dimensions, graph: str, run: str = "run") -> Parameter:
    if graph in dimensions.large:
        return Parameter("intra_op_threads", "0", f"cores of one {run}; 0 is every core, divided among the instances")
    return Parameter("intra_op_threads", "1", f"cores of one {run}")


def nice(by: str, why: str) -> Parameter:
    return Parameter("nice", by, f"of its threads: {why}")


def same(tensors: Sequence[Tensor]) -> dict[str, str]:
    return {tensor.name: tensor.name for tensor in tensors}


def step(model: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Step:
    return Step(model, same(inputs), same(outputs))


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
            blocks.append("# A response for each token, and the call returns before the last one is sent.")
            blocks.append("model_transaction_policy { decoupled: true }")
    return "\n".join(blocks) + "\n"


def tensor_lines(tensors: Sequence[Tensor]) -> str:
    """One line a tensor, with its comment above."""
    lines = []
    for index, tensor in enumerate(tensors):
        if tensor.why:
            lines.append(f"  # {tensor.why}")
        optional = ", optional: true" if tensor.optional else ""
        comma = "," if index < len(tensors) - 1 else ""
        dims = ", ".join(str(size) for size in tensor.dims)
        lines.append(
            f'  {{ name: "{tensor.name}", data_type: TYPE_{tensor.data_type}, dims: [ {dims} ]{optional} }}{comma}'
        )
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
    """Writes the whole repository. `graphs` holds `<model>.onnx` for each of `graphs_of`, and its weights where they
    are in a file of their own; `beside` is what lies beside the models, card and tokenizers, by name.

    Raises FileNotFoundError, before anything is written, that names every missing file.
    """
    names, kept = graphs_of(dimensions), {model.name for model in models(dimensions)}
    sources = [*beside.values(), *(graphs / f"{name}.onnx" for name in names)]
    if missing := [str(path) for path in sources if not path.is_file()]:
        raise FileNotFoundError(f"missing: {', '.join(missing)}")
    for model in models(replace(dimensions, closer_view=True)):
        if model.name not in kept and (repository / model.name).exists():
            shutil.rmtree(repository / model.name)  # of a checkpoint before, whose tokens it would choose
    write_configs(repository, dimensions)
    for name in names:
        version = repository / name / "1"
        shutil.copyfile(graphs / f"{name}.onnx", version / "model.onnx")
        (version / weights_file(name)).unlink(missing_ok=True)
        if (graphs / weights_file(name)).exists():
            shutil.copyfile(graphs / weights_file(name), version / weights_file(name))
    for name, path in beside.items():
        shutil.copyfile(path, repository / name)


def weights_file(model: str) -> str:
    """Where a graph of more than 2 GB, the most that protobuf holds, keeps its weights: the graph names the file."""
    return f"{model}.onnx.data"


def write_configs(repository: Path, dimensions: Dimensions) -> None:
    """Everything of the repository that is text and not a checkpoint's own."""
    for model in models(dimensions):
        version = repository / model.name / "1"
        version.mkdir(parents=True, exist_ok=True)
        (repository / model.name / "config.pbtxt").write_text(config(model))
        if model.steps:
            (version / ".gitkeep").touch()
        else:
            (version / "model.py").write_text(runner(model))
