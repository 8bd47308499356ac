"""Dense losses at every patch, with which the vision encoder learns.

Shape is the hardest attribute. Two things made it learnable: Muon on the encoder's matrices, and a curriculum that
first aligns objects with the patch grid and lets them drift as shapes are recognised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.scenes.render import compressed
from build_engines.scenes.wide import draw_scene
from build_engines.scenes.world import (
    CHARACTERS,
    COLOURS,
    GRID,
    IMAGE_SIZE,
    NONE,
    PATCH_SIZE,
    SHAPES,
    SIZES,
    SMALL_PRINT,
    WIDE_SMALL_PRINT,
    Thing,
    World,
)
from build_engines.train.stages import tensor

HEADS = {"colour": len(COLOURS), "shape": len(SHAPES), "size": len(SIZES), "character": len(CHARACTERS) + 1}
IGNORED = -100
WANDERING = 7.0  # pixels of jitter that leave nothing of the patch grid
OWNED = 0.25  # of a patch: with this share or more it belongs to an object


class Perception(nn.Module):
    """Read each patch: object or not, centre or not, offset of the centre, and attributes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.splits = [1, 1, 2, *HEADS.values()]
        self.readout = nn.Linear(width, sum(self.splits))
        nn.init.zeros_(self.readout.bias)

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        """[B, 256, D] -> logits and offsets, each [B, 256, n]."""
        parts = self.readout(patches).split(self.splits, dim=-1)
        return dict(zip(("object", "centre", "offset", *HEADS), parts, strict=True))


@dataclass
class Views:
    """A batch of rendered scenes.

    pixels: [B, 224, 224, 3] uint8; labels by name, [B, 256]; offset [B, 256, 2].
    """

    pixels: Tensor
    labels: dict[str, Tensor]
    scenes: list[list[Thing]]
    coverage: list[np.ndarray]


def draw_views(rng: np.random.Generator, number: int, worlds: list[World], compressed_share: float) -> Views:
    """Draw scenes of the given worlds in equal parts, with labels for every patch."""
    pixels, labels, scenes, coverages = [], [], [], []
    for index in range(number):
        things, picture = draw_scene(rng, worlds[index % len(worlds)])
        shown = compressed(picture.pixels, rng) if rng.random() < compressed_share else picture.pixels
        pixels.append(shown)
        labels.append(patch_labels(things, picture.coverage))
        scenes.append(things)
        coverages.append(picture.coverage)
    stacked = {name: tensor(np.stack([one[name] for one in labels])) for name in labels[0]}
    return Views(tensor(np.stack(pixels)), stacked, scenes, coverages)


def patch_labels(things: list[Thing], coverage: np.ndarray) -> dict[str, np.ndarray]:
    """Labels of the 256 patches. Attributes are IGNORED without an object or a name.

    An object whose centre is outside the view has no centre patch, and its character may be cut off, so it is IGNORED.
    """
    flat = coverage.reshape(len(things), GRID * GRID).copy()
    truth = {name: np.full(GRID * GRID, IGNORED, np.int64) for name in HEADS}
    centre = np.zeros(GRID * GRID, np.float32)
    offset = np.zeros((GRID * GRID, 2), np.float32)
    inside = [0 <= thing.x < IMAGE_SIZE and 0 <= thing.y < IMAGE_SIZE for thing in things]
    for index, thing in enumerate(things):
        if not inside[index]:
            continue
        column, row = min(GRID - 1, int(thing.x // PATCH_SIZE)), min(GRID - 1, int(thing.y // PATCH_SIZE))
        patch = row * GRID + column
        centre[patch] = 1
        offset[patch] = thing.x / PATCH_SIZE - column - 0.5, thing.y / PATCH_SIZE - row - 0.5
        flat[index, patch] = 2.0  # the centre belongs to its object, also inside a ring
    if things:
        owner, share = flat.argmax(0), flat.max(0)
        for patch in np.flatnonzero(share >= OWNED):
            thing = things[owner[patch]]
            truth["colour"][patch] = thing.colour if thing.colour != NONE else IGNORED
            truth["shape"][patch] = thing.shape
            truth["size"][patch] = thing.size if thing.size != NONE else IGNORED
            truth["character"][patch] = thing.character + 1 if inside[owner[patch]] else IGNORED
    return {**truth, "object": (truth["shape"] != IGNORED).astype(np.float32), "centre": centre, "offset": offset}


def normalised(pixels: Tensor) -> Tensor:
    """[B, 224, 224, 3] uint8 -> [B, 3, 224, 224] float32 in [-2, 2]."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def perception_loss(seen: dict[str, Tensor], labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The sum of the dense losses, and the accuracy of each attribute at the objects' centres."""
    centre = labels["centre"]
    weight = 1.0 + 4.0 * centre
    bce = functional.binary_cross_entropy_with_logits
    loss = bce(seen["object"][..., 0], labels["object"]) + 2.0 * bce(
        seen["centre"][..., 0], centre, pos_weight=centre.new_tensor(3.0)
    )
    loss = loss + 2.0 * ((seen["offset"] - labels["offset"]).square().sum(-1) * centre).sum() / centre.sum().clamp(
        min=1
    )
    accuracy = {}
    for name, classes in HEADS.items():
        truth = labels[name]
        known = weight * (truth != IGNORED)
        if name == "character":
            known = known * torch.where(truth > 0, 2.0, 1.0)
        entropy = functional.cross_entropy(
            seen[name].reshape(-1, classes), truth.reshape(-1), ignore_index=IGNORED, reduction="none"
        )
        loss = loss + (entropy * known.reshape(-1)).sum() / known.sum().clamp(min=1)
        counted = (centre > 0) & (truth != IGNORED)
        if name == "character":
            counted &= truth > 0
        right = (seen[name].argmax(-1) == truth) & counted
        accuracy[name] = right.sum().item() / max(1, counted.sum().item())
    found = (seen["centre"][..., 0] > 0) == (centre > 0)
    accuracy["scene"] = found.all(-1).float().mean().item()  # every centre found, and no others
    return loss, accuracy


@dataclass
class Curriculum:
    """How far objects drift from the patch grid, in pixels.

    It rises as shapes are recognised; WANDERING and more means anywhere. Then half of the scenes are wide.
    """

    jitter: float = 1.0
    shape: float = 0.0  # running accuracy at the centres

    def worlds(self) -> list[World]:
        dense = World(fewest=6, most=12, character_share=0.75, unnamed_share=0.25, repeat_share=0.2)
        if self.jitter < WANDERING:
            drifting = replace(dense, lattice_jitter=self.jitter)
            return [drifting, drifting, replace(drifting, lattice_jitter=min(self.jitter, 2.0))]
        wide = replace(dense, fewest=3, most=10, unnamed_share=0.3, wide=True)
        return [
            *(dense, wide, replace(dense, fewest=3, most=8), replace(wide, fewest=1)),
            *(replace(SMALL_PRINT, near=True), wide, dense, replace(WIDE_SMALL_PRINT, near=True)),
        ]

    def observe(self, shape_accuracy: float) -> None:
        self.shape = 0.95 * self.shape + 0.05 * shape_accuracy
        if self.shape > 0.75 and self.jitter < WANDERING:
            self.jitter, self.shape = self.jitter + 1.0, 0.6
