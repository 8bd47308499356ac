"""Define text as the models read it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.core.vision import FloatArray, Int32Array


@dataclass(frozen=True, slots=True)
class Question:
    """A question as the allocator reads it, cut or padded to QUESTION_TOKENS."""

    ids: Int32Array  # [32]
    mask: Int32Array  # [32], 1 for a token, 0 for padding


@dataclass(frozen=True, slots=True)
class Prompt:
    """The LLM's input: visual ids (V, V+1, ...) and text ids in one row, and the embeddings of the visual ids."""

    input_ids: Int32Array  # [T]
    visual_tokens: FloatArray  # [N, H]
    extra_ids: npt.NDArray[np.uint64]  # [T]: 0 for text, >= 1 for visual; equal ids mean equal embeddings
    clip_weights: bool = False  # whether the weights for clips and several images answer
