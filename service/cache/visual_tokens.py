"""Keep visual tokens by image and question in process memory: an exact repeat needs only the LLM.

The key holds the budget and detail that the visual tokens were made with. They can be less than the request asked for.
So a hit equals the result that the models would give now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.cache.lru import Lru
from service.core.card import ModelCard
from service.core.request import Budget, Detail
from service.core.viewport import viewed
from service.core.vision import Frame, Seen, SeenClip
from service.telemetry.metrics import Metrics

ENTRY_BYTES = 2048  # of Python objects, in addition to the arrays and the key


def visual_key(card: ModelCard, digest: str, question: str, budget: Budget, detail: Detail) -> bytes:
    """Make a key of everything that decides visual tokens. The question is last, as it can hold any character."""
    tokens = map(str, (*budget.vision_tokens, *budget.visual_tokens))
    return "\0".join([card.visual_fingerprint, card.looks_by, digest, detail, *tokens, question]).encode()


def embedding_key(card: ModelCard, digest: str, question: str, seen: Seen) -> bytes:
    """Make a key of these exact visual tokens. Features kept as int8 give different visual tokens."""
    return _exactly(visual_key(card, viewed(digest, seen.viewport), question, seen.budget, seen.detail), seen)


def clip_key(card: ModelCard, frames: Sequence[Frame], question: str, budget: Budget) -> bytes:
    """Make a key of everything that decides the visual tokens of a clip whose frames are attended to together."""
    shown = [f"{frame.digest}@{frame.at}" for frame in frames]
    tokens = map(str, budget.vision_tokens)
    own = "" if card.clip is None else card.clip.fingerprint
    first = [card.visual_fingerprint, card.looks_by, "clip", own, *tokens]
    return "\0".join([*first, str(len(shown)), *shown, question]).encode()


def clip_embedding_key(card: ModelCard, frames: Sequence[Frame], question: str, seen: SeenClip) -> bytes:
    """Make a key of these exact visual tokens of a clip."""
    return _exactly(clip_key(card, frames, question, seen.budget), seen)


def _exactly(key: bytes, seen: Seen | SeenClip) -> bytes:
    """Add which features were kept as int8 to the key."""
    return f"int8 {','.join(map(str, seen.rounded))}\0".encode() + key if seen.rounded else key


class VisualCache:
    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._hits, self._misses = (metrics.visual_cache_lookups.labels(result) for result in ("hit", "miss"))
        self._kept: Lru[bytes, Any] = Lru(max_bytes, metrics.visual_cache_bytes, metrics.visual_cache_evictions)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, *keys: bytes) -> Seen | None:
        """Get the entry of the first key that has one. Counts one hit or one miss."""
        seen: Seen | None = self._get(keys)
        return seen

    def get_clip(self, *keys: bytes) -> SeenClip | None:
        """The same for keys that `clip_key` made."""
        seen: SeenClip | None = self._get(keys)
        return seen

    def _get(self, keys: Sequence[bytes]) -> Any:
        seen = next((seen for key in keys if (seen := self._kept.get(key)) is not None), None)
        (self._misses if seen is None else self._hits).inc()
        return seen

    def holds(self, *keys: bytes) -> bool:
        """Tell whether `get` would hit. Counts nothing."""
        return any(key in self._kept for key in keys)

    def keep(self, key: bytes, seen: Seen | SeenClip) -> None:
        self._kept.keep(key, seen, seen.nbytes + len(key) + ENTRY_BYTES)
