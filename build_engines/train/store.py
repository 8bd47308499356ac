"""Keep and renew scenes encoded by the finished encoder.

The later stages train on features, not on pixels. Encoding a scene costs several times as much as a Q-Former step on
it, so each scene is used about ten times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Blip2VisionModel

from build_engines.scenes.questions import DESCRIBE, Question
from build_engines.scenes.world import COLOUR_NAMES, NONE, Thing, World
from build_engines.train import replicas
from build_engines.train.language_stage import draw_questions
from build_engines.train.stages import Plan, faster, mixed
from build_engines.train.vision import draw_views, normalised


@dataclass
class Seen:
    """A batch of encoded scenes: features [N, 257, D] bfloat16."""

    features: Tensor
    scenes: list[list[Thing]]
    coverage: list[np.ndarray]

    def take(self, rows: Sequence[int]) -> Seen:
        return Seen(self.features[rows], [self.scenes[i] for i in rows], [self.coverage[i] for i in rows])

    def ask(self, rng: np.random.Generator, weights: dict[str, float], number: int) -> list[list[Question]]:
        """Questions about each scene. If a hue has no name, no question mentions or asks a colour."""
        return [questions_about(rng, things, weights, number) for things in self.scenes]


def questions_about(
    rng: np.random.Generator, things: list[Thing], weights: dict[str, float], number: int
) -> list[Question]:
    if all(thing.colour != NONE for thing in things):
        return draw_questions(rng, things, weights, number, loosely=True)
    colourless = {kind: weight for kind, weight in weights.items() if kind not in ("colour", DESCRIBE)}
    questions = draw_questions(rng, things, colourless, number, loosely=True)
    return [q for q in questions if not set(COLOUR_NAMES) & {*q.text.replace("?", "").split(), q.answer}]


class Store:
    """Keep `size` encoded scenes, and replace the oldest by `fresh` new ones at every draw."""

    def __init__(self, encoder: Blip2VisionModel, plan: Plan, worlds: list[World], size: int, fresh: int) -> None:
        self._see = faster(lambda pixels: encoder(pixel_values=pixels).last_hidden_state, plan)
        self._worlds, self._fresh, self._turn = worlds, fresh, 0
        rng = np.random.default_rng((3, replicas.rank()))
        bar = tqdm(range(size // fresh), desc="features", mininterval=5.0, disable=replicas.rank() > 0)
        parts = [self.encode(rng, fresh, worlds) for _ in bar]
        self._seen = Seen(
            torch.cat([part.features for part in parts]),
            [things for part in parts for things in part.scenes],
            [shares for part in parts for shares in part.coverage],
        )

    @torch.no_grad()
    def encode(self, rng: np.random.Generator, number: int, worlds: list[World]) -> Seen:
        """Encode new scenes, half of them after lossy compression."""
        views = draw_views(rng, number, worlds, 0.5)
        with mixed():
            return Seen(self._see(normalised(views.pixels)).bfloat16(), views.scenes, views.coverage)

    def draw(self, rng: np.random.Generator, number: int) -> Seen:
        """A batch of kept scenes, after renewing the oldest."""
        kept, new = self._seen, self.encode(rng, self._fresh, self._worlds)
        span = slice(self._turn, self._turn + self._fresh)
        kept.features[span], kept.scenes[span], kept.coverage[span] = new.features, new.scenes, new.coverage
        self._turn = (self._turn + self._fresh) % (len(kept.scenes) // self._fresh * self._fresh)
        return kept.take(rng.choice(len(kept.scenes), number, replace=False).tolist())
