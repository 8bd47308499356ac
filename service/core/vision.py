"""What the models make of an image, as arrays.

`P` is the 16x16 grid of patches, `D` the vision width, `H` the
LLM's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from service.core.request import Budget

FloatArray = npt.NDArray[np.floating]
Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]

IMAGE_SIZE = 224  # pixels, both sides, of what the vision encoder sees
CLOSER_SIZE = 448  # pixels, both sides, of the closer view, which the encoder sees as CROPS crops
CROPS = 4  # top left, top right, bottom left, bottom right
GRID = 16  # patches a side
TEXTURE_CHANNELS = 13
CELLS = 8  # cells a side; a cell is 2x2 patches
QUESTION_TOKENS = 32  # what the allocator reads of the question
MAX_VISUAL_TOKENS = 128  # rows of the prompt embedding table: four groups of 32 queries
TENSIONS = ("particularize", "explore", "diversify")
TOKENS_AT_LEVEL = (1, 4, 16)  # vision tokens that a cell costs at each level of detail
MAX_VISION_TOKENS = 400  # of one image, with the closer view


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Floats [N, D] in about a quarter of the bytes: a row's largest magnitude is 127 of its scale."""

    values: npt.NDArray[np.int8]  # [N, D]
    scales: FloatArray  # [N], of the floats' dtype

    @classmethod
    def of(cls, rows: FloatArray) -> Self:
        """A row with an infinity or a NaN comes back as NaNs, one below 1e-30 as zeros."""
        largest = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float32)
        whole = np.isfinite(largest)
        if not whole.all():
            rows = np.where(whole[:, np.newaxis], rows, 0)
        steps = np.divide(127, largest, where=whole & (largest > 1e-30), out=np.zeros_like(largest))
        values = np.rint(rows * steps[:, np.newaxis]).astype(np.int8)
        return cls(values, np.where(whole, largest / 127, np.nan).astype(rows.dtype))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dense(self) -> FloatArray:
        """[N, D], each within half a scale of what it was."""
        return self.values * self.scales[:, np.newaxis]


def dense(rows: FloatArray | Int8Rows) -> FloatArray:
    return rows.dense() if isinstance(rows, Int8Rows) else rows


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the vision encoder found in one image; what the feature cache keeps, exactly as it came or as int8."""

    features: FloatArray | Int8Rows  # [257, D], CLS first, then the patches row by row
    saliency: FloatArray  # [256], CLS-to-patch attention of the last layer
    entropy: FloatArray  # [256], bits over 4, of each patch's 16-bin luminance histogram
    texture: FloatArray  # [13, 16, 16]

    @property
    def nbytes(self) -> int:
        return self.features.nbytes + self.saliency.nbytes + self.entropy.nbytes + self.texture.nbytes


@dataclass(frozen=True, slots=True)
class CloserFeatures:
    """What the vision encoder found in the closer view of one image."""

    features: FloatArray | Int8Rows  # [1024, D], the patches of the 32x32 grid row by row, without the crops' CLS

    @classmethod
    def joined(cls, crops: Sequence[VisionFeatures]) -> Self:
        """From the CROPS crops, each [257, D]."""
        rows, side = 2, GRID
        patches = np.stack([dense(crop.features)[1:] for crop in crops]).reshape(rows, rows, side, side, -1)
        return cls(patches.transpose(0, 2, 1, 3, 4).reshape(CROPS * side * side, -1))

    @property
    def nbytes(self) -> int:
        return self.features.nbytes


@dataclass(frozen=True, slots=True)
class Relevance:
    """Where the image was looked at closely for one question, and why."""

    map: FloatArray  # [16, 16] in [0, 1]
    scores: FloatArray  # [3, 16, 16] in [0, 1]: propositional, perspectival, participatory
    levels: Int32Array  # [8, 8]: level of detail of each cell
    tensions: FloatArray  # [3] in [0, 1], those of TENSIONS

    @property
    def evenness(self) -> float:
        """The map's entropy over that of an even one: 1 where everything is as relevant as everything else."""
        shares = self.map[self.map > 0].astype(np.float64)
        shares /= shares.sum()
        return float(-(shares * np.log(shares)).sum() / np.log(self.map.size)) if shares.size else 1.0

    @property
    def nbytes(self) -> int:
        return self.map.nbytes + self.scores.nbytes + self.levels.nbytes + self.tensions.nbytes

    @property
    def particularize(self) -> float:
        """In [0, 1]: how much of the budget the question asks for."""
        return float(self.tensions[0])

    @property
    def vision_tokens(self) -> int:
        """How many vision tokens the levels cost, CLS not counted."""
        return int(np.asarray(TOKENS_AT_LEVEL)[self.levels].sum())


@dataclass(frozen=True, slots=True)
class Seen:
    """One image as the LLM gets it for one question."""

    visual_tokens: FloatArray  # [count, H]
    relevance: Relevance
    budget: Budget  # what it was allowed
    detail: Literal["low", "high"] = "low"  # high with the closer view
    is_rounded: bool = False  # made from features that were kept as int8

    @property
    def nbytes(self) -> int:
        return self.visual_tokens.nbytes + self.relevance.nbytes
