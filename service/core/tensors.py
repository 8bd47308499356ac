"""The tensor contract: what the models that the gateway calls take and give.

The tests compare MODELS with every `config.pbtxt` and with the exported graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.core.vision import CELLS, CROPS, GRID, IMAGE_SIZE, MAX_VISUAL_TOKENS, QUESTION_TOKENS

Arrays = Mapping[str, npt.NDArray[Any]]

PATCHES = GRID * GRID


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor on the wire, batch dimension left out: -1 varies, "D" and "H" are the card's widths."""

    name: str
    datatype: str  # FP32 here stands for the checkpoint's float: FP16 on GPUs
    dims: tuple[int | str, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """One model the gateway calls, and the models that must live for it to answer."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    through: tuple[str, ...]
    decoupled: bool = False


_IMAGE = Tensor("image", "UINT8", (3, IMAGE_SIZE, IMAGE_SIZE))
_VISION = (
    Tensor("features", "FP32", (PATCHES + 1, "D")),
    Tensor("saliency", "FP32", (PATCHES,)),
    Tensor("entropy", "FP32", (PATCHES,)),
    Tensor("texture", "FP32", (13, GRID, GRID)),
)
_ASKED = (
    Tensor("question_ids", "INT32", (QUESTION_TOKENS,)),
    Tensor("question_mask", "INT32", (QUESTION_TOKENS,)),
    Tensor("budget", "INT32", (4,)),
)
_SEEN = (
    Tensor("visual_tokens", "FP32", (MAX_VISUAL_TOKENS, "H")),
    Tensor("visual_count", "INT32", (1,)),
    Tensor("relevance", "FP32", (PATCHES,)),
    Tensor("scores", "FP32", (3, PATCHES)),
    Tensor("levels", "INT32", (CELLS * CELLS,)),
    Tensor("tensions", "FP32", (3,)),
)

MODELS: Mapping[str, Model] = {
    "see": Model(
        inputs=(_IMAGE, *_ASKED),
        outputs=(*_SEEN, *_VISION),
        through=("vision_encoder", "relevance_allocator", "qformer"),
    ),
    "attend": Model(
        inputs=(*_VISION, *_ASKED),
        outputs=_SEEN,
        through=("relevance_allocator", "qformer"),
    ),
    # The four crops of a closer view in one request, as a batch.
    "vision_encoder": Model(inputs=(_IMAGE,), outputs=_VISION, through=("vision_encoder",)),
    # Only where the model card has a closer view.
    "attend_448": Model(
        inputs=(*_VISION, Tensor("detail_features", "FP32", (CROPS * PATCHES, "D")), *_ASKED),
        outputs=_SEEN,
        through=("relevance_allocator_448", "qformer"),
    ),
    "llm": Model(
        inputs=(
            Tensor("input_ids", "INT32", (-1,)),
            Tensor("input_lengths", "INT32", (1,)),
            Tensor("request_output_len", "INT32", (1,)),
            Tensor("prompt_embedding_table", "FP32", (-1, "H")),
            Tensor("prompt_vocab_size", "INT32", (1,)),
            Tensor("prompt_table_extra_ids", "UINT64", (-1,)),
            Tensor("end_id", "INT32", (1,)),
            Tensor("pad_id", "INT32", (1,)),
            Tensor("streaming", "BOOL", (1,)),
            Tensor("temperature", "FP32", (1,), optional=True),
            Tensor("runtime_top_k", "INT32", (1,), optional=True),
            Tensor("runtime_top_p", "FP32", (1,), optional=True),
            Tensor("seed", "UINT64", (1,), optional=True),
            Tensor("repetition_penalty", "FP32", (1,), optional=True),
            Tensor("stop", "BOOL", (1,), optional=True),
        ),
        outputs=(Tensor("output_ids", "INT32", (-1, -1)),),
        through=("llm",),
        decoupled=True,
    ),
    "vqa": Model(
        inputs=(
            Tensor("image_bytes", "UINT8", (-1,)),
            Tensor("question", "UINT8", (-1,)),
            Tensor("max_tokens", "INT32", (1,), optional=True),
        ),
        outputs=(Tensor("answer", "UINT8", (-1,)),),
        through=("prepare", "vision_encoder", "relevance_allocator", "qformer", "compose", "llm", "finish"),
        decoupled=True,
    ),
}

VISION_MODELS = {"see", "attend", "attend_448"}
VISION_MODELS |= {step for model in VISION_MODELS for step in MODELS[model].through}

DATATYPES: Mapping[np.dtype[Any], str] = {
    np.dtype(np.uint8): "UINT8",
    np.dtype(np.int32): "INT32",
    np.dtype(np.uint64): "UINT64",
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.float16): "FP16",
    np.dtype(np.float32): "FP32",
}
DTYPES: Mapping[str, np.dtype[Any]] = {name: dtype for dtype, name in DATATYPES.items()}
