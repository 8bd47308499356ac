"""Define the tensor contract: every model of a repository, its inputs and outputs, and the steps of an ensemble.

This is the only list of tensor names, types and shapes. `service.triton` sends and reads tensors by it, and
`build_engines.repository` writes every `config.pbtxt` from it. The tests compare it with the exported graphs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from service.core.vision import (
    CELLS,
    CLIP_VISUAL_TOKENS,
    CROPS,
    GRID,
    IMAGE_SIZE,
    MAX_VISION_TOKENS,
    MAX_VISUAL_TOKENS,
    QUESTION_TOKENS,
    TENSIONS,
    TEXTURE_CHANNELS,
)

Arrays = Mapping[str, npt.NDArray[Any]]

PATCHES = GRID * GRID
PATCH_SLOTS = PATCHES + 1  # CLS and every patch of the 224-pixel view
VISION_SLOTS = MAX_VISION_TOKENS + 1  # CLS and the most vision tokens, with the closer view

MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # of one request to Triton, and of one response
FLOAT = "F"  # the checkpoint's float: FP32, or FP16 on GPUs
LIKELIEST = frozenset(("num_top_log_probs", "top_ids", "top_log_probs"))  # tensors of `llm` without TensorRT-LLM
CLIP_WEIGHTS = "clip_weights"  # an input of an `llm` that has weights of its own for clips and several images
TEXT = "T"  # a text: UINT8 [-1], its UTF-8 bytes, or BYTES [1], a string, which TensorRT-LLM takes

DATATYPES: Mapping[np.dtype[Any], str] = {
    np.dtype(np.uint8): "UINT8",
    np.dtype(np.int32): "INT32",
    np.dtype(np.uint64): "UINT64",
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.float16): "FP16",
    np.dtype(np.float32): "FP32",
    np.dtype(np.object_): "BYTES",
}
DTYPES: Mapping[str, np.dtype[Any]] = {name: dtype for dtype, name in DATATYPES.items()}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor on the wire; the batch dimension is left out.

    A dimension is -1 if it varies, or one of these letters until `sized` replaces it:
        D  the vision width
        H  the LLM's hidden size
        K  rows that `relevance_allocator` gives: 257, or 401 if the Q-Former is static
        R  rows that `qformer` takes: any number, or 401 if it is static
    """

    name: str
    datatype: str  # FP32, INT32, ... as Triton's clients write it, or FLOAT or TEXT
    dims: tuple[int | str, ...]
    note: str = ""  # the comment above it in config.pbtxt
    optional: bool = False

    def sized(self, float_type: str, sizes: Mapping[str, int], text_type: str = "UINT8") -> Tensor:
        """Return the tensor with the types and the sizes of one checkpoint."""
        if self.datatype == TEXT:
            return replace(self, datatype=text_type, dims=(1,) if text_type == "BYTES" else (-1,))
        datatype = float_type if self.datatype == FLOAT else self.datatype
        return replace(self, datatype=datatype, dims=self.shape(sizes))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the dimensions as numbers. Raises KeyError for a letter without a size."""
        return tuple(sizes[size] if isinstance(size, str) else size for size in self.dims)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an ensemble. Both maps go from the model's name of a tensor to the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Model:
    """One model of a repository; with steps, an ensemble of others."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    steps: tuple[Step, ...] = ()
    decoupled: bool = False  # any number of responses to a request
    batched: bool = True  # whether tensors have a batch dimension

    @property
    def through(self) -> tuple[str, ...]:
        """List the models that must run so that this one can answer."""
        return tuple(step.model for step in self.steps) or (self.name,)

    def floats(self) -> set[str]:
        """Return the names of its tensors in the checkpoint's float type."""
        return {tensor.name for tensor in (*self.inputs, *self.outputs) if tensor.datatype == FLOAT}


def _same(tensors: Iterable[Tensor]) -> dict[str, str]:
    return {tensor.name: tensor.name for tensor in tensors}


def _step(model: Model, outputs: Iterable[Tensor] | None = None) -> Step:
    """Make a step with the model's own tensor names, for all of its outputs or the given ones."""
    return Step(model.name, _same(model.inputs), _same(model.outputs if outputs is None else outputs))


def _chosen(rows: str | int) -> tuple[Tensor, ...]:
    """Make an allocator's outputs for the Q-Former. They have only as many rows as it can choose, to copy little."""
    return (
        Tensor("vision_tokens", FLOAT, (rows, "D"), "row 0 is CLS; real tokens come first"),
        Tensor("vision_mask", "INT32", (rows,), "0 is padding, g >= 1 the group that reads the token"),
        Tensor("query_groups", "INT32", (1,), "1 to 4 groups of 32 queries"),
    )


_IMAGE = Tensor("image", "UINT8", (3, IMAGE_SIZE, IMAGE_SIZE), "RGB; the graph normalises")
VISION = (
    Tensor("features", FLOAT, (PATCH_SLOTS, "D"), "CLS first, then the 16x16 patches row by row"),
    Tensor("saliency", "FP32", (PATCHES,), "CLS-to-patch attention of the last layer"),
    Tensor("entropy", "FP32", (PATCHES,), "of each patch's luminance histogram, over 4 bits"),
    Tensor("texture", FLOAT, (TEXTURE_CHANNELS, GRID, GRID), "colour, edges, place, contrast"),
)
DETAIL = Tensor(
    "detail_features", FLOAT, (CROPS * PATCHES, "D"), "of the 448-pixel view's four crops, 32x32 row by row"
)
QUESTION = (
    Tensor("question_ids", "INT32", (QUESTION_TOKENS,), "the question's tokens, cut or padded"),
    Tensor("question_mask", "INT32", (QUESTION_TOKENS,), "1 where a token stands"),
)
_BUDGET = Tensor("budget", "INT32", (4,), "least and most vision tokens, least and most visual tokens")
_RELEVANCE = (
    Tensor("relevance", "FP32", (PATCHES,), "in [0, 1], how relevant each patch is to the question"),
    Tensor("scores", "FP32", (3, PATCHES), "propositional, perspectival, participatory"),
    Tensor("levels", "INT32", (CELLS * CELLS,), "level of detail of each of the 8x8 cells; -1: left out"),
    Tensor("tensions", "FP32", (len(TENSIONS),), ", ".join(TENSIONS)),
)
_VISUAL = (
    Tensor("visual_tokens", FLOAT, (MAX_VISUAL_TOKENS, "H"), "rows past the count are 0"),
    Tensor("visual_count", "INT32", (1,), "32, 64, 96 or 128"),
)
_PROMPT_IDS = Tensor("prompt_ids", "INT32", (-1,), "BOS and the prompt's text, without the visual ids")
_SAMPLING = (
    Tensor("max_tokens", "INT32", (1,), "most tokens of the answer", optional=True),
    Tensor("temperature", "FP32", (1,), "0 is greedy", optional=True),
    Tensor("top_k", "INT32", (1,), "0 is off", optional=True),
    Tensor("top_p", "FP32", (1,), "1 is off", optional=True),
    Tensor("seed", "UINT64", (1,), "the same seed draws the same answer", optional=True),
)
# TensorRT-LLM's names, so that its backend can stand here unchanged.
_LLM_PROMPT = (
    Tensor("input_ids", "INT32", (-1,), "visual tokens are ids V, V+1, ..., V the vocabulary's size"),
    Tensor("input_lengths", "INT32", (1,)),
    Tensor("request_output_len", "INT32", (1,), "most tokens to generate"),
    Tensor("prompt_embedding_table", FLOAT, (-1, "H"), "row i stands for id V+i"),
    Tensor("prompt_vocab_size", "INT32", (1,), "rows of the table"),
    Tensor("prompt_table_extra_ids", "UINT64", (-1,), "one an input token: 0 for text, equal for equal embeddings"),
    Tensor("end_id", "INT32", (1,), "sent as the last token when generated"),
    Tensor("pad_id", "INT32", (1,)),
    Tensor("streaming", "BOOL", (1,), "true: responses while the LLM decodes"),
)
_LLM_SAMPLING = (
    Tensor("temperature", "FP32", (1,), "0 is greedy", optional=True),
    Tensor("runtime_top_k", "INT32", (1,), "0 is off", optional=True),
    Tensor("runtime_top_p", "FP32", (1,), "1 is off", optional=True),
    Tensor("seed", "UINT64", (1,), "the same seed draws the same answer", optional=True),
    Tensor("repetition_penalty", "FP32", (1,), "1 is off", optional=True),
)
_LLM_LOG_PROBS = Tensor("return_log_probs", "BOOL", (1,), "TensorRT-LLM gives them only if true", optional=True)
_LLM_TOP = Tensor("num_top_log_probs", "INT32", (1,), "likeliest tokens to tell beside each token", optional=True)
_LLM_CLIPS = Tensor(CLIP_WEIGHTS, "BOOL", (1,), "true: the weights for clips and several images", optional=True)
_LLM_GUIDE = (
    Tensor(
        "guided_decoding_guide_type", TEXT, (-1,), "how the answer is constrained: json_schema, regex", optional=True
    ),
    Tensor("guided_decoding_guide", TEXT, (-1,), "UTF-8: the schema or the regular expression", optional=True),
)
_LLM_STOP = Tensor("stop", "BOOL", (1,), "true ends the request with the same id", optional=True)
_OUTPUT_IDS = Tensor("output_ids", "INT32", (-1, -1), "[1 beam, new tokens]")
_TEXTS = (
    Tensor("image_bytes", "UINT8", (-1,), "the file of one image"),
    Tensor("question", "UINT8", (-1,), "UTF-8"),
)
_ANSWER = Tensor(
    "answer", "UINT8", (-1,), "the responses' concatenation is UTF-8, but for a character that max_tokens cuts"
)
_ASKED = (*QUESTION, _BUDGET)
_SEEN = (*_VISUAL, *_RELEVANCE)

_vision_encoder = Model("vision_encoder", (_IMAGE,), VISION)
_relevance_allocator = Model("relevance_allocator", (*VISION, *_ASKED), (*_chosen("K"), *_RELEVANCE))
_relevance_allocator_448 = Model(
    "relevance_allocator_448", (*VISION, DETAIL, *_ASKED), (*_chosen(VISION_SLOTS), *_RELEVANCE)
)
_qformer = Model("qformer", (*_chosen("R"), *QUESTION), _VISUAL)
_llm = Model(
    "llm",
    (*_LLM_PROMPT, *_LLM_SAMPLING, _LLM_LOG_PROBS, _LLM_TOP, _LLM_CLIPS, *_LLM_GUIDE, _LLM_STOP),
    (
        _OUTPUT_IDS,
        Tensor("sequence_length", "INT32", (-1,), "of each beam, so far"),
        Tensor("cum_log_probs", "FP32", (-1,), "of each beam, so far"),
        Tensor("output_log_probs", "FP32", (-1, -1), "[1 beam, new tokens]"),
        Tensor("top_ids", "INT32", (-1, -1, -1), "[1 beam, new tokens, k]: the likeliest ones, likeliest first"),
        Tensor("top_log_probs", "FP32", (-1, -1, -1), "[1 beam, new tokens, k]"),
    ),
    decoupled=True,
)
# All frames of one clip in one request: it has no batch dimension, and the frames are the first one of most tensors.
_attend_clip = Model(
    "attend_clip",
    (
        *(replace(tensor, dims=(-1, *tensor.dims)) for tensor in VISION),
        Tensor("times", "FP32", (-1,), "of each frame, from 0 (first) to 1 (last)"),
        *QUESTION,
        Tensor("clip_budget", "INT32", (2,), "least and most vision tokens of all frames together"),
    ),
    (
        Tensor("visual_tokens", FLOAT, (CLIP_VISUAL_TOKENS, "H")),
        *(replace(tensor, dims=(-1, *tensor.dims)) for tensor in _RELEVANCE[:-1]),
        _RELEVANCE[-1],
    ),
    batched=False,
)
_prepare = Model("prepare", _TEXTS, (_IMAGE, *_ASKED, _PROMPT_IDS))
_compose = Model(
    "compose",
    (*_VISUAL, _PROMPT_IDS, *_SAMPLING),
    (*_LLM_PROMPT, *(replace(tensor, optional=False) for tensor in _LLM_SAMPLING)),
)
_finish = Model("finish", (_OUTPUT_IDS,), (_ANSWER,))
# The ensemble has inputs temperature and seed of its own, so the outputs of `compose` need other names.
_TO_LLM = _same(_compose.outputs) | {"temperature": "llm_temperature", "seed": "llm_seed"}

MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        _vision_encoder,
        _relevance_allocator,
        _qformer,
        _llm,
        Model(
            "see",
            (_IMAGE, *_ASKED),
            (*_SEEN, *VISION),
            steps=(_step(_vision_encoder), _step(_relevance_allocator), _step(_qformer)),
        ),
        Model("attend", _relevance_allocator.inputs, _SEEN, steps=(_step(_relevance_allocator), _step(_qformer))),
        # A repository has these two only if its checkpoint has a closer view.
        _relevance_allocator_448,
        Model(
            "attend_448",
            _relevance_allocator_448.inputs,
            _SEEN,
            steps=(_step(_relevance_allocator_448), _step(_qformer)),
        ),
        _attend_clip,  # only if its checkpoint has a clip resampler
        _prepare,
        _compose,
        _finish,
        Model(
            "vqa",
            (*_TEXTS, *_SAMPLING),
            (_ANSWER,),
            steps=(
                _step(_prepare),
                _step(_vision_encoder),
                # Triton refuses an ensemble's tensor that no step reads, and no step here reads the relevance map.
                _step(_relevance_allocator, _chosen("K")),
                _step(_qformer),
                Step("compose", _same(_compose.inputs), _TO_LLM),
                Step("llm", _TO_LLM, _same([_OUTPUT_IDS])),
                _step(_finish),
            ),
            decoupled=True,
        ),
    )
}
