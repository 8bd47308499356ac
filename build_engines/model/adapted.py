"""An adapted allocator as a folder: what `glimpse adapt` writes and `glimpse build --allocator` reads.

DIR/adapted.json             how it came about, for which models, and what the model card gets
DIR/allocator.safetensors    its weights, as beside a checkpoint
DIR/qformer.safetensors      the Q-Former's weights that LoRA changed, if it was asked for and the state is not fixed
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

NAME, WEIGHTS, QFORMER = "adapted.json", "allocator.safetensors", "qformer.safetensors"
FILES = (NAME, WEIGHTS, QFORMER)
TRAINED, DISTILLED, ZERO_SHOT, FIXED = "trained", "distilled", "zero-shot", "fixed"


@dataclass(frozen=True)
class Adapted:
    """The card of an adapted allocator."""

    state: str  # trained, distilled or fixed
    encoder: str  # fingerprint of the encoder that it was adapted to
    default_vision_tokens: tuple[int, int]
    closer_view_at: float = 1.0
    told: dict[str, Any] = field(default_factory=dict)  # shown in GET /v1/models
    question_tokenizer: str = ""  # fingerprint of the question's tokenizer; empty: made before this was told
    qformer: str = ""  # fingerprint of the Q-Former as it was before LoRA changed it; empty likewise

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises ValueError for a folder that is no adapted allocator."""
        try:
            found = json.loads((folder / NAME).read_text())
            found["default_vision_tokens"] = tuple(found["default_vision_tokens"])
            return cls(**found)
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ValueError(
                f"{folder} holds no adapted allocator ({exc}): give a folder that `glimpse adapt` wrote"
            ) from exc

    def write(self, folder: Path) -> None:
        (folder / NAME).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
