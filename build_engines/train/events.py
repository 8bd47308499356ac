"""Tell clips by symbols: the slots of the first and the last state, and what happens to each object and when.

The language model learns from these vectors, as it learned images from `symbols.py`. The clip resampler learns to make
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.scenes.clips import WAYS, Event, Story, way_of
from build_engines.scenes.world import Thing
from build_engines.train.architecture import QUERIES
from build_engines.train.stages import tensor
from build_engines.train.symbols import Slots, SlotTable, slots_of

CODES = ("none", "appeared", "vanished", "recoloured", *WAYS)  # a movement's way is its code
COLUMN = 0.15  # standard deviation of an event's vector at the start
FILLED, EVENTFUL = 4.0, 12.0  # weights of slots with an object, and with one that something happens to; empty ones: 1
RARE = 0.2  # weight of the code "none", which most slots have


class ToldClips(NamedTuple):
    """The symbols of B clips: 32 slots of the first state, then 32 of the last.

    attributes int64 [B, 64, 4], places [B, 64, 3] and filled bool [B, 64] as in `symbols.Slots`; codes int64 [B, 64] of
    CODES; times float32 [B, 64] from -1 (first frame) to 1.
    """

    attributes: Tensor
    places: Tensor
    filled: Tensor
    codes: Tensor
    times: Tensor

    @property
    def weight(self) -> Tensor:
        """[B, 64]"""
        return torch.where(self.codes > 0, EVENTFUL, torch.where(self.filled, FILLED, 1.0))


def told_clips(stories: Sequence[Story]) -> ToldClips:
    states = [_state(story, time) for story in stories for time in (0.0, 1.0)]
    slots = [one for one, _, _ in states]
    arrays = (
        np.stack([one.attributes for one in slots]),
        np.stack([one.places for one in slots]),
        np.stack([one.filled for one in slots]),
        np.stack([codes for _, codes, _ in states]),
        np.stack([times for _, _, times in states]),
    )
    return ToldClips(*(tensor(array).unflatten(0, (len(stories), 2)).flatten(1, 2) for array in arrays))


def _state(story: Story, time: float) -> tuple[Slots, np.ndarray, np.ndarray]:
    """Slots of a state, with the code and the time of each slot's event."""
    shown = [
        (thing, story.event_of(index), story.things[index]) for index, thing in enumerate(story.scene(time)) if thing
    ]
    slots = slots_of([thing for thing, _, _ in shown])
    codes, times = np.zeros(QUERIES, np.int64), np.zeros(QUERIES, np.float32)
    for cell, (_, event, before) in zip(slots.cells, shown, strict=True):
        if event is not None:
            codes[cell] = CODES.index(_code(event, before))
            times[cell] = event.start + event.end - 1
    return slots, codes, times


def _code(event: Event, before: Thing) -> str:
    return way_of(event, before) if event.kind == "moved" else event.kind


class EventTable(nn.Module):
    """Vectors of events, which are added to those of the slots, and a readout that only training uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.codes = nn.Embedding(len(CODES), width)
        self.time = nn.Parameter(COLUMN * torch.randn(width))
        self.readout = nn.Linear(width, len(CODES) + 1)
        nn.init.normal_(self.codes.weight, std=COLUMN)

    def forward(self, table: SlotTable, told: ToldClips) -> Tensor:
        """[B, 64, H]"""
        happened = self.codes(told.codes) + told.times.unsqueeze(2) * self.time
        return table(told.attributes, told.places, told.filled) + happened * (told.codes > 0).unsqueeze(2)

    def loss(self, visual_tokens: Tensor, table: SlotTable, told: ToldClips) -> tuple[Tensor, dict[str, float]]:
        """How far visual tokens [B, 64, H] are from the symbols, and what is read from them."""
        target = self(table, told).detach()
        error = ((visual_tokens - target).square().mean(2) * told.weight).mean() / target.var()
        read = self.readout(visual_tokens)
        weight = read.new_ones(len(CODES))
        weight[0] = RARE
        entropy = functional.cross_entropy(read[..., :-1].flatten(0, 1), told.codes.flatten(), weight=weight)
        busy = told.codes > 0
        late = ((read[..., -1] - told.times).square() * busy).sum() / busy.sum().clamp(min=1)
        right = read[..., :-1].argmax(2) == told.codes
        measures = {
            "event": (right & busy).sum().item() / max(1, int(busy.sum())),
            "no_event": (right & ~busy).sum().item() / max(1, int((~busy).sum())),
            "event_time": late.item() ** 0.5,
            "apart": error.item(),
        }
        return 0.3 * error + entropy + late, measures
