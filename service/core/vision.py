"""Define the models' results for an image, as arrays. `D` is the vision width, `H` the LLM's hidden size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from service.core.request import Budget
from service.core.viewport import WHOLE, Area, Viewport

FloatArray = npt.NDArray[np.floating]
Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]

IMAGE_SIZE = 224  # pixels, both sides, of the vision encoder's input
CLOSER_SIZE = 448  # pixels, both sides, of the closer view, which the encoder sees as CROPS crops
CROPS = 4  # top left, top right, bottom left, bottom right
GRID = 16  # patches a side
TEXTURE_CHANNELS = 13
CELLS = 8  # cells a side; a cell is 2x2 patches
QUESTION_TOKENS = 32  # tokens of the question that the allocator reads
MAX_VISUAL_TOKENS = 128  # rows of the prompt embedding table: four groups of 32 queries
CLIP_VISUAL_TOKENS = 64  # that a clip resampler makes of a whole clip
TENSIONS = ("particularize", "explore", "diversify")
TOKENS_AT_LEVEL = (1, 4, 16)  # vision tokens that a cell costs at each level of detail from 0; at level -1, none
_TOKENS_FROM_LEVEL_MINUS_1 = np.array([0, *TOKENS_AT_LEVEL])
MAX_VISION_TOKENS = 400  # of one image, with the closer view


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Floats [N, D] in about a quarter of the bytes. A row's scale is its largest magnitude divided by 127."""

    values: npt.NDArray[np.int8]  # [N, D]
    scales: FloatArray  # [N], of the floats' dtype

    @classmethod
    def of(cls, rows: FloatArray) -> Self:
        """Round rows to int8.

        `dense` gives NaNs for a row with an infinity or a NaN, and zeros for a row whose values are below 1e-30.
        """
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
        """Return the floats [N, D]. Each differs from the original by at most half a scale."""
        return self.values * self.scales[:, np.newaxis]


def dense(rows: FloatArray | Int8Rows) -> FloatArray:
    return rows.dense() if isinstance(rows, Int8Rows) else rows


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class VisionFeatures:
    """The vision encoder's output for one image. The feature cache keeps it exactly, or as int8."""

    features: FloatArray | Int8Rows  # [257, D], CLS first, then the patches row by row
    saliency: FloatArray  # [256], CLS-to-patch attention of the last layer
    entropy: FloatArray  # [256], bits over 4, of each patch's 16-bin luminance histogram
    texture: FloatArray  # [13, 16, 16]

    @property
    def nbytes(self) -> int:
        return self.features.nbytes + self.saliency.nbytes + self.entropy.nbytes + self.texture.nbytes


@dataclass(frozen=True, slots=True)
class CloserFeatures:
    """The vision encoder's output for the closer view of one image."""

    features: FloatArray | Int8Rows  # [1024, D], the patches of the 32x32 grid row by row, without the crops' CLS

    @classmethod
    def joined(cls, crops: Sequence[VisionFeatures]) -> Self:
        """Join the outputs of the CROPS crops, each [257, D]."""
        rows, side = 2, GRID
        patches = np.stack([dense(crop.features)[1:] for crop in crops]).reshape(rows, rows, side, side, -1)
        return cls(patches.transpose(0, 2, 1, 3, 4).reshape(CROPS * side * side, -1))

    @property
    def nbytes(self) -> int:
        return self.features.nbytes


def rounded_among(views: Sequence[VisionFeatures | CloserFeatures]) -> tuple[int, ...]:
    """Return the places of the views whose features were kept as int8."""
    return tuple(place for place, view in enumerate(views) if isinstance(view.features, Int8Rows))


@dataclass(frozen=True)
class Relevance:
    """The places in an image where the model looked closely for one question, and why."""

    map: FloatArray  # [16, 16] in [0, 1]
    scores: FloatArray  # [3, 16, 16] in [0, 1]: propositional, perspectival, participatory
    levels: Int32Array  # [8, 8]: level of detail of each cell, -1 for one that is left out
    tensions: FloatArray  # [3] in [0, 1], those of TENSIONS
    area: Area = WHOLE  # where the maps lie in the image: left, top, right, bottom as shares of its sides

    @cached_property
    def evenness(self) -> float:
        """Return the map's entropy divided by that of an even map: 1 if all patches are equally relevant."""
        shares = self.map[self.map > 0].astype(np.float64)
        shares /= shares.sum()
        return float(-(shares * np.log(shares)).sum() / np.log(self.map.size)) if shares.size else 1.0

    @property
    def nbytes(self) -> int:
        return self.map.nbytes + self.scores.nbytes + self.levels.nbytes + self.tensions.nbytes

    @property
    def particularize(self) -> float:
        """Return the share of the budget that the question needs, in [0, 1]."""
        return float(self.tensions[0])

    @cached_property
    def vision_tokens(self) -> int:
        """Count the vision tokens at these levels, without CLS."""
        return int(_TOKENS_FROM_LEVEL_MINUS_1.take(self.levels + 1, mode="clip").sum())


@dataclass(frozen=True, slots=True)
class Seen:
    """The LLM's view of one image for one question."""

    visual_tokens: FloatArray  # [count, H]
    relevance: Relevance
    budget: Budget  # the budget that was allowed
    detail: Literal["low", "high"] = "low"  # high with the closer view
    rounded: tuple[int, ...] = ()  # views whose features were kept as int8: 0 the first one, 1 the closer one
    viewport: Viewport | None = None  # what was seen of the image; None: all of it, squashed
    strangeness: float = 0.0  # of the image: see core/confidence.py; 0 if the models are not calibrated

    @property
    def vision_tokens(self) -> int:
        return self.relevance.vision_tokens

    @property
    def nbytes(self) -> int:
        return self.visual_tokens.nbytes + self.relevance.nbytes


@dataclass(frozen=True, slots=True)
class SeenClip:
    """The LLM's view of a whole clip for one question, if the models have a clip resampler."""

    visual_tokens: FloatArray  # [count, H]
    frames: tuple[Relevance, ...]  # of each frame; all have the clip's tensions
    budget: Budget  # the budget that was allowed, of all frames together
    rounded: tuple[int, ...] = ()  # places of the frames whose features were kept as int8
    strangeness: float = 0.0  # the mean over the frames: see core/confidence.py; 0 if the models are not calibrated

    @property
    def vision_tokens(self) -> int:
        return sum(frame.vision_tokens for frame in self.frames)

    @property
    def nbytes(self) -> int:
        return self.visual_tokens.nbytes + sum(frame.nbytes for frame in self.frames)


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a clip that is looked at."""

    index: int  # in the clip, from 0
    time_s: float | None  # after the clip's first frame; None if the frames came as images
    at: float  # its time as a share of the clip, from 0 to 1
    digest: str  # what cache keys have for it
    image_id: str = ""  # of a frame that came as an image


@dataclass(frozen=True, slots=True)
class Sight:
    """The LLM's view of all that one request shows."""

    images: tuple[Seen, ...]  # in the order of the prompt
    frames: tuple[Frame, ...] = ()  # of the clip
    of_frames: tuple[Seen, ...] = ()  # one a frame, if each is looked at as an image is
    clip: SeenClip | None = None  # if all are looked at together

    @property
    def relevance(self) -> tuple[Relevance, ...]:
        """Return the relevance of each frame."""
        return tuple(each.relevance for each in self.of_frames) if self.clip is None else self.clip.frames

    @property
    def seen(self) -> tuple[Seen | SeenClip, ...]:
        """Return everything that has visual tokens of its own."""
        return (*self.images, *self.of_frames, *(() if self.clip is None else (self.clip,)))
