"""Represent scenes as symbols: one vector per query cell for the object centred there.

The language model learns the task from these vectors before it sees an image. Later the Q-Former learns to produce
them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from build_engines.scenes.world import CHARACTERS, COLOUR_NAMES, IMAGE_SIZE, SHAPES, SIZE_NAMES, Thing
from build_engines.train.architecture import QUERIES, QUERY_COLUMNS, QUERY_ROWS
from build_engines.train.stages import tensor
from build_engines.train.vision import HEADS, IGNORED

CELL_HEIGHT, CELL_WIDTH = IMAGE_SIZE / QUERY_ROWS, IMAGE_SIZE / QUERY_COLUMNS


@dataclass
class Slots:
    """The symbols of one scene.

    attributes: [32, 4] int64 (colour, shape, size, character + 1; IGNORED if empty). places: [32, 3] float32 (x, y in
    [-1, 1] and the diameter in units of 64 pixels). filled: [32] bool. cells: that of each object, in their order.
    """

    attributes: np.ndarray
    places: np.ndarray
    filled: np.ndarray
    cells: list[int]


def slots_of(things: list[Thing]) -> Slots:
    """Put each object into the cell of its centre, or into the nearest free cell if that is taken."""
    attributes = np.full((QUERIES, len(HEADS)), IGNORED, np.int64)
    places = np.zeros((QUERIES, 3), np.float32)
    filled = np.zeros(QUERIES, bool)
    cells: list[int] = []
    for thing in things:
        cell = min(
            (cell for cell in range(QUERIES) if not filled[cell]),
            key=lambda cell: math.hypot(
                max(0.0, abs((cell % QUERY_COLUMNS + 0.5) * CELL_WIDTH - thing.x) - CELL_WIDTH / 2),
                max(0.0, abs((cell // QUERY_COLUMNS + 0.5) * CELL_HEIGHT - thing.y) - CELL_HEIGHT / 2),
            ),
        )
        filled[cell] = True
        cells.append(cell)
        colour = thing.colour if thing.colour >= 0 else IGNORED
        attributes[cell] = colour, thing.shape, thing.size, thing.character + 1
        places[cell] = thing.x / 112 - 1, thing.y / 112 - 1, thing.diameter / 64
    return Slots(attributes, places, filled, cells)


def slot_tensors(scenes: list[list[Thing]]) -> tuple[Tensor, Tensor, Tensor]:
    """attributes [B, 32, 4] int64, places [B, 32, 3] float32, filled [B, 32] bool."""
    slots = [slots_of(things) for things in scenes]
    attributes, places, filled = zip(*((s.attributes, s.places, s.filled) for s in slots), strict=True)
    return tensor(np.stack(attributes)), tensor(np.stack(places)), tensor(np.stack(filled))


class SlotTable(nn.Module):
    """Map slots to the language model's vectors: the sum of a column per attribute and the place.

    Empty slots have a vector of their own.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.columns = nn.ModuleDict({name: nn.Embedding(classes, width) for name, classes in HEADS.items()})
        self.place = nn.Linear(3, width)
        self.empty = nn.Parameter(torch.zeros(width))
        for column in self.columns.values():
            nn.init.normal_(column.weight, std=0.05)
        nn.init.normal_(self.place.weight, std=0.1)
        nn.init.zeros_(self.place.bias)

    def start_from_words(self, words: dict[str, Tensor]) -> None:
        """Start from the embeddings of the answers' tokens, so that a lookup nearly answers the question."""
        tables = {"colour": COLOUR_NAMES, "shape": SHAPES, "size": SIZE_NAMES}
        for name, names in tables.items():
            self.columns[name].weight.data.copy_(torch.stack([words[n] for n in names]))
        self.columns["character"].weight.data[1:].copy_(torch.stack([words[c] for c in CHARACTERS]))

    def forward(self, attributes: Tensor, places: Tensor, filled: Tensor) -> Tensor:
        """[B, 32, 4], [B, 32, 3], [B, 32] -> [B, 32, H]."""
        total = self.place(places)
        for index, column in enumerate(self.columns.values()):
            total = total + column(attributes[..., index].clamp(min=0)) * (attributes[..., index] >= 0)[..., None]
        return torch.where(filled[..., None], total, self.empty)
