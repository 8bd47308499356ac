"""Scenes as the allocator and the Q-Former read them: outputs of the finished encoder.

Encoding a scene costs several times as much as a question about it, so looks are kept and reused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import Blip2VisionModel

from build_engines.model.knowing import perspectival
from build_engines.model.vision import VisionEncoder
from build_engines.scenes.render import compressed, crops, overview
from build_engines.scenes.wide import draw_scene
from build_engines.scenes.world import GRID, IMAGE_SIZE, Thing, World
from build_engines.train.architecture import MEAN, STD
from build_engines.train.stages import Plan, device, faster, mixed, tensor

CLOSER = 2  # times as many pixels a side in the closer view


@dataclass
class Looks:
    """N encoded scenes.

    features [N, 257, D]; maps float32 [N, 2, 256], propositional and perspectival; detail [N, 1024, D], the closer view
    on its 32x32 grid, or None; the objects, and their coverage [things, 16, 16].
    """

    features: Tensor
    maps: Tensor
    detail: Tensor | None
    scenes: list[list[Thing]]
    coverage: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.scenes)

    def take(self, rows: Sequence[int]) -> Looks:
        index = list(rows)
        return Looks(
            self.features[index],
            self.maps[index],
            None if self.detail is None else self.detail[index],
            [self.scenes[i] for i in index],
            [self.coverage[i] for i in index],
        )

    def put(self, row: int, other: Looks) -> None:
        """Replace the scenes from `row`."""
        span = slice(row, row + len(other))
        self.features[span], self.maps[span] = other.features, other.maps
        if self.detail is not None:
            self.detail[span] = other.detail
        self.scenes[span], self.coverage[span] = other.scenes, other.coverage

    @classmethod
    def joined(cls, parts: Sequence[Looks]) -> Self:
        details = [part.detail for part in parts if part.detail is not None]
        return cls(
            torch.cat([part.features for part in parts]),
            torch.cat([part.maps for part in parts]),
            torch.cat(details) if details else None,
            [things for part in parts for things in part.scenes],
            [shares for part in parts for shares in part.coverage],
        )


class Eye:
    """The frozen encoder. It encodes the overview and, from 448 pixels, also the closer view."""

    def __init__(self, encode: Callable[[Tensor], tuple[Tensor, ...]], dtype: torch.dtype = torch.float32) -> None:
        """encode: as `VisionEncoder`; dtype: of the kept features."""
        self._encode, self._dtype = encode, dtype

    @classmethod
    def training(cls, vision: Blip2VisionModel, plan: Plan) -> Self:
        """A fast encoder rather than an exact one: compiled, in bfloat16."""
        encoder = VisionEncoder(vision, list(MEAN), list(STD)).to(device()).eval()
        quick = faster(encoder, plan)

        def encode(image: Tensor) -> tuple[Tensor, ...]:
            with mixed():
                return quick(image)

        return cls(encode, torch.bfloat16)

    @classmethod
    def exact(cls, vision: Blip2VisionModel) -> Self:
        return cls(VisionEncoder(vision, list(MEAN), list(STD)).to(device()).eval())

    @torch.no_grad()
    def look(
        self, pixels: Sequence[np.ndarray], scenes: list[list[Thing]], coverage: list[np.ndarray], closely: bool
    ) -> Looks:
        """Encode images, uint8 [224, 224, 3] or [448, 448, 3] each.

        closely: also encode the four quarters of the latter.
        """
        small = [one if len(one) == IMAGE_SIZE else overview(one) for one in pixels]
        features, saliency, entropy, texture = self._encode(_channels_first(np.stack(small)))
        maps = torch.stack([entropy, perspectival(saliency, texture)], dim=1).float()
        detail = None
        if closely:
            parts = [self._encode(_channels_first(crops(one)))[0][:, 1:] for one in pixels]
            grid = torch.stack(parts).unflatten(1, (2, 2)).unflatten(3, (GRID, GRID))  # [N, 2, 2, 16, 16, D]
            detail = grid.transpose(2, 3).flatten(1, 4).to(self._dtype)
        return Looks(features.to(self._dtype), maps, detail, scenes, coverage)

    def draw(self, rng: np.random.Generator, worlds: Sequence[World], closely: bool, lossy: float = 0.5) -> Looks:
        """Draw one new scene of each world. lossy: the share compressed by JPEG or WebP."""
        scenes, pixels, coverage = [], [], []
        for world in worlds:
            things, picture = draw_scene(rng, world, CLOSER if closely else 1)
            pixels.append(compressed(picture.pixels, rng) if rng.random() < lossy else picture.pixels)
            scenes.append(things)
            coverage.append(picture.coverage)
        return self.look(pixels, scenes, coverage, closely)


def _channels_first(pixels: np.ndarray) -> Tensor:
    return tensor(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


class LookStore:
    """Keep looks at scenes of some worlds, and renew the oldest. A world listed twice is drawn twice as often."""

    def __init__(self, eye: Eye, worlds: list[World], closely: bool, seed: tuple[int, ...]) -> None:
        self._eye, self._worlds, self._closely = eye, worlds, closely
        self._seed, self._turn = seed, 0
        self.kept: Looks

    def fill(self, size: int, at_once: int) -> None:
        rng = np.random.default_rng(self._seed)
        order = [self._worlds[i % len(self._worlds)] for i in range(size)]
        parts = [self._eye.draw(rng, order[i : i + at_once], self._closely) for i in range(0, size, at_once)]
        self.kept = Looks.joined(parts)

    def renew(self, rng: np.random.Generator, number: int) -> None:
        """Replace the oldest `number` looks. `number` must divide the store's size."""
        worlds = [self._worlds[(self._turn + i) % len(self._worlds)] for i in range(number)]
        self.kept.put(self._turn, self._eye.draw(rng, worlds, self._closely))
        self._turn = (self._turn + number) % len(self.kept)

    def draw(self, rng: np.random.Generator, number: int) -> Looks:
        return self.kept.take(rng.choice(len(self.kept), number, replace=False).tolist())

    def state(self) -> dict[str, Any]:
        return {"kept": self.kept, "turn": self._turn}

    def load(self, state: dict[str, Any]) -> None:
        self.kept, self._turn = state["kept"], state["turn"]
