"""Choose which cells of a clip's frames get a vision token.

A clip is 1 to 32 frames in order. Each frame is an 8x8 grid of cells, as an image is (`allocation.py`), and a chosen
cell is one pooled token. The first frame keeps all its cells. A cell of a later frame is worth a token only if it
changed: what is still has been seen. Changed cells are ranked in this order:

1. those that reach their last state in this frame. The newest tokens of all cells are then the clip's last state, and
   each tells when its cell last changed;
2. those of the frames that are nearest to the trained positions in time, then all others. A clip of 32 frames is
   therefore looked at like one of 8 frames first;
3. within both, by how much they changed, and by their relevance to the question.

A change is a distance of features, from the frame before or from any frame at most a seventh of the clip earlier. A
slow movement in many frames then counts as much as a fast one in few. Every operation has fixed sizes except for the
number of frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.model.allocation import CELL_COUNT, LEFT_OUT, MOST_TOKENS

FRAMES = 32  # the most of a clip
POSITIONS = 8  # in time, trained; other times lie between them
LEAST_CHANGE, GREAT_CHANGE = 0.02, 0.22  # squared distance of features over the product of their lengths
OFF_BEAT = 0.5  # of a change's worth, in a frame that is not the nearest to a trained position
UNASKED = 0.25  # of a change's worth, at no relevance to the question
FIRST_FRAME, LAST_STATE = 4.0, 2.0  # added to the worth of the cells of the first frame, and of those that settle
STILL = -1.0  # added to the relevance of a cell that did not change
TIE = 1e-6  # for each cell before: equal cells keep their order in every runtime
MISSING = -3.0  # the worth of a slot that no cell can fill


class Kept(NamedTuple):
    """The cells of B clips that have a token.

    place int64 [B, 256]: each slot's cell, 64 * frame + cell, the most worth first; 0 if no cell fills the slot. seen
    bool [B, 256]: whether one does. old bool [B, 256]: whether a later frame has a token of the same cell. levels int64
    [B, T, 64]: 0 or LEFT_OUT.
    """

    place: Tensor
    seen: Tensor
    old: Tensor
    levels: Tensor


class ClipAllocation(nn.Module):
    """Choose the cells of a clip within a budget."""

    grid: Tensor
    slots: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.arange(POSITIONS, dtype=torch.float32) / (POSITIONS - 1), persistent=False)
        self.register_buffer("slots", torch.arange(MOST_TOKENS), persistent=False)

    def forward(self, relevance: Tensor, pooled: Tensor, times: Tensor, budget: Tensor) -> Kept:
        """Keep the cells that are worth a token.

        relevance [B, T, 64] in [0, 1]; pooled [B, T, 64, D], the cells' tokens; times [T] from 0 to 1; budget [B, 2]:
        least and most vision tokens, from 64 to 256. Still cells are kept only below the least.
        """
        frames = times.shape[0]
        distance = distances(pooled)
        worth = self.worth(relevance, self.change(distance, times), settled(distance), times).flatten(1)
        worth = worth - TIE * torch.arange(CELL_COUNT * frames, device=worth.device)
        value, place = functional.pad(worth, (0, MOST_TOKENS), value=MISSING).topk(MOST_TOKENS, dim=1)
        most = budget[:, 1:].clamp(CELL_COUNT, MOST_TOKENS)
        least = torch.minimum(budget[:, :1], most)
        wanted = (value > STILL / 10) | (self.slots < least)
        seen = (self.slots < most) & wanted & (value > MISSING / 2)
        cutoff = torch.where(seen, value, 2 * FIRST_FRAME).amin(1, keepdim=True)
        kept = (worth >= cutoff).float().unflatten(1, (frames, CELL_COUNT))
        later = kept.sum(1, keepdim=True) - kept.cumsum(1)
        place = torch.where(seen, place, 0)
        old = later.flatten(1).gather(1, place) > 0
        return Kept(place, seen, old, torch.where(kept > 0, 0, LEFT_OUT))

    def worth(self, relevance: Tensor, change: Tensor, since: Tensor, times: Tensor) -> Tensor:
        """What a token of each cell is worth, [B, T, 64]: above 0 for changed cells and those of the first frame.

        relevance and change float [B, T, 64]; since int64 [B, 1, 64]: see `settled`.
        """
        frame = torch.arange(times.shape[0], device=times.device).unsqueeze(1)
        novelty = ((change - LEAST_CHANGE) / (GREAT_CHANGE - LEAST_CHANGE)).clamp(0.0, 1.0)
        beat = torch.where(self.on_beat(times), 1.0, OFF_BEAT).unsqueeze(1)
        worth = novelty * (UNASKED + (1 - UNASKED) * relevance) * beat
        worth = torch.where((novelty > 0) & (frame < since), worth, STILL * (1 - relevance / 2))
        worth = torch.where(frame == since, LAST_STATE + relevance, worth)
        return torch.where(frame == 0, FIRST_FRAME + relevance, worth)

    def on_beat(self, times: Tensor) -> Tensor:
        """bool [T]: whether a frame is the nearest to one of the trained positions."""
        distance = (times.unsqueeze(1) - self.grid).abs()
        return (distance <= distance.amin(0)).any(1)

    def change(self, distance: Tensor, times: Tensor) -> Tensor:
        """How much each cell differs from what it was a moment before, [B, T, 64]. distance: see `distances`."""
        frame = torch.arange(times.shape[0], device=times.device)
        ahead = frame.unsqueeze(1) - frame  # [T, T]: how many frames the first is after the second
        near = times.unsqueeze(1) - times <= 1 / (POSITIONS - 1) + 1e-4
        compared = (ahead > 0) & (near | (ahead == 1))
        return torch.where(compared, distance, 0.0).amax(3).transpose(1, 2)


def distances(pooled: Tensor) -> Tensor:
    """How much each cell differs between any two frames: [B, T, 64, D] -> [B, 64, T, T].

    It is the squared distance over the product of both lengths.
    """
    cells = pooled.transpose(1, 2)  # [B, 64, T, D]
    square = (cells * cells).sum(3)
    ours, theirs = square.unsqueeze(3), square.unsqueeze(2)
    return (ours + theirs - 2 * cells @ cells.transpose(2, 3)) / torch.sqrt(ours * theirs).clamp(min=1e-6)


def settled(distance: Tensor) -> Tensor:
    """int64 [B, 1, 64]: the frame in which a cell reaches its last state. From there on it is still."""
    frame = torch.arange(distance.shape[3], device=distance.device)
    differs = distance[:, :, -1] > LEAST_CHANGE  # [B, 64, T]: from the last frame
    return torch.where(differs, frame + 1, 0).amax(2).unsqueeze(1)
