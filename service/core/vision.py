"""The service's own words, as values: what a request is, what was seen, what was said.

No I/O and no third-party types but numpy arrays. `P` is the 16x16 grid of patches, `D` the vision width, `H` the
LLM's hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

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
BUDGETS = ("vision_tokens", "visual_tokens", "default_visual_tokens")  # pairs of a model card
TENSIONS = ("particularize", "explore", "diversify")
TOKENS_AT_LEVEL = (1, 4, 16)  # vision tokens that a cell costs at each level of detail
MAX_VISION_TOKENS = 400  # of one image, with the closer view

Detail = Literal["low", "high", "auto"]  # without the closer view, with it, or as the question needs


@dataclass(frozen=True, slots=True)
class Budget:
    """The least and the most tokens a request allows, both ends included."""

    vision_tokens: tuple[int, int] = (64, 256)  # what the Q-Former reads, CLS not counted
    visual_tokens: tuple[int, int] = (32, 32)  # what the LLM reads, a multiple of 32

    def to_array(self) -> Int32Array:
        """int32 [4]: least and most vision tokens, least and most visual tokens."""
        return np.array([*self.vision_tokens, *self.visual_tokens], np.int32)

    def within(self, vision_tokens: int) -> Budget:
        """With at most so many vision tokens."""
        least, most = self.vision_tokens
        if most <= vision_tokens:
            return self
        return replace(self, vision_tokens=(min(least, vision_tokens), min(most, vision_tokens)))


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the answer is drawn, and told. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch the filters off."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    streaming: bool = True  # tokens as they come; else all together at the end, which costs a fraction of the work


@dataclass(frozen=True, slots=True)
class Turn:
    """A question about the same images that was asked before, and its answer."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question as the allocator reads it, cut or padded to QUESTION_TOKENS."""

    ids: Int32Array  # [32]
    mask: Int32Array  # [32], 1 where a token stands


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


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the LLM reads: visual ids (V, V+1, ...) and text ids in one row, and the rows the visual ids stand for."""

    input_ids: Int32Array  # [T]
    visual_tokens: FloatArray  # [N, H]
    extra_ids: npt.NDArray[np.uint64]  # [T]: 0 for text, >= 1 for visual; equal ids mean equal embeddings


@dataclass(frozen=True, slots=True)
class Engines:
    """How much the models take in at once, by their configurations."""

    encoder_images: int = 1  # the vision encoder's batch, times its instances
    llm_rows: int = 16  # requests that the LLM decodes at once


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a model repository says of itself (`card.json` beside the models)."""

    name: str
    fingerprint: str  # of the vision encoder's weights: keys the feature cache
    visual_fingerprint: str  # of all weights up to the visual tokens: keys the LLM's reuse of their KV
    vocab_size: int  # V: visual ids start here
    hidden_size: int  # H
    vision_width: int  # D
    bos_id: int
    end_id: int
    pad_id: int
    max_positions: int  # visual + text + generated tokens of one request
    prompt_template: str  # with {question}
    allocator_trained: bool
    vision_tokens: tuple[int, int]  # what budgets can ask for
    visual_tokens: tuple[int, int]
    default_visual_tokens: tuple[int, int] = (32, 32)  # what a budget that does not say gets
    closer_view: bool = False  # whether `attend_448` is there: cells at level 2
    closer_view_at: float = 1.0  # detail "auto" looks closer where `particularize` reaches this
    # The file beside the card whose ids `question_ids` are. Where it is not the LLM's, it is the Q-Former's own
    # (InstructBLIP's), which reads the LLM's whole prompt between its special tokens, not the bare question.
    question_tokenizer: str = "tokenizer.json"
    float_type: str = "FP32"  # Triton's type of features, vision tokens and visual tokens: FP16 on GPUs
    metadata: Mapping[str, object] = field(default_factory=dict)  # shown in GET /v1/models: licence, accuracy, source

    @property
    def feature_shapes(self) -> dict[int, dict[str, tuple[int, ...]]]:
        """By the view's size in pixels, what the vision encoder finds: VisionFeatures' and CloserFeatures' fields."""
        patches = GRID * GRID
        return {
            IMAGE_SIZE: {
                "features": (1 + patches, self.vision_width),
                "saliency": (patches,),
                "entropy": (patches,),
                "texture": (TEXTURE_CHANNELS, GRID, GRID),
            },
            CLOSER_SIZE: {"features": (CROPS * patches, self.vision_width)},
        }

    def type_of(self, feature: str) -> str:
        """Triton's type of one of `feature_shapes`' arrays."""
        return "FP32" if feature in ("saliency", "entropy") else self.float_type

    @property
    def called(self) -> tuple[str, ...]:
        """The models that questions call; `see` and `attend` run every model of the 224-pixel view."""
        return ("see", "attend", *(["attend_448"] if self.closer_view else []), "llm")

    def vision_tokens_for(self, detail: Detail) -> tuple[int, int]:
        """What budgets can ask for at this detail."""
        least, most = self.vision_tokens
        return (least, MAX_VISION_TOKENS) if self.closer_view and detail != "low" else (least, most)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The text of a card.json. Raises ValueError for text that is no card: what is missing, what is unknown."""
        try:
            fields = json.loads(text)
            budgets = {name: tuple(value) for name, value in fields.items() if name in BUDGETS}
            return cls(**fields | budgets)
        except (TypeError, AttributeError) as exc:
            raise ValueError(f"not a model card: {exc}") from exc
