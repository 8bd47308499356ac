"""Which cells of the image get detail, and the vision tokens that follow from it.

The 16x16 grid of patches is seen as an 8x8 grid of cells. A cell at level 0 is one token (the mean of its four patch
features), at level 1 its four patch features. 64 cells at level 0 cost 64 tokens; each refined cell adds three.

Every operation has fixed sizes, so that the graph is a TensorRT engine: ranks by comparing all pairs instead of
sorting, packing by comparing running sums against a constant range.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

GRID = 16
CELLS = 8
CELL_COUNT = CELLS * CELLS
PATCH_COUNT = GRID * GRID
MAX_VISION_TOKENS = 400
REFINEMENT_COST = 3  # tokens that a cell's step from level 0 to level 1 adds


def spread_turns() -> Tensor:
    """float [64]: each cell's turn in an order whose every prefix lies evenly over the grid.

    Bayer's 8x8 dispersed-dot dither matrix (Bayer 1973, "An optimum method for two-level rendition").
    """
    turns = torch.zeros(1, 1)
    while len(turns) < CELLS:
        upper = torch.cat([4 * turns, 4 * turns + 2], dim=1)
        lower = torch.cat([4 * turns + 3, 4 * turns + 1], dim=1)
        turns = torch.cat([upper, lower])
    return turns.flatten()


def cells_of(patches: Tensor) -> Tensor:
    """[B, 256, ...] by patch, row by row -> [B, 64, 4, ...] by cell: its two upper, then its two lower patches."""
    batch, rest = patches.shape[0], patches.shape[2:]
    grid = patches.reshape(batch, CELLS, 2, CELLS, 2, *rest)
    return grid.transpose(2, 3).reshape(batch, CELL_COUNT, 4, *rest)


def rank(score: Tensor) -> Tensor:
    """float [B, 64] -> float [B, 64]: how many cells come before each one; ties go to the lower index."""
    ours, theirs = score.unsqueeze(2), score.unsqueeze(1)
    index = torch.arange(score.shape[1], device=score.device)
    earlier = (index.unsqueeze(0) < index.unsqueeze(1)).unsqueeze(0)  # [1, ours, theirs]
    return ((theirs > ours) | ((theirs == ours) & earlier)).float().sum(2)


class Allocation(nn.Module):
    """Refines cells by rank and evenly, and packs the tokens of all cells."""

    spread: Tensor
    offsets: Tensor
    slots: Tensor
    patch_of: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("spread", spread_turns(), persistent=False)
        # x @ offsets is the sum over the cells before each one.
        self.register_buffer("offsets", torch.ones(CELL_COUNT, CELL_COUNT).triu(1), persistent=False)
        self.register_buffer("slots", torch.arange(MAX_VISION_TOKENS, dtype=torch.float32), persistent=False)
        patches = cells_of(torch.arange(PATCH_COUNT).unsqueeze(0))[0]
        self.register_buffer("patch_of", patches, persistent=False)

    def levels(self, cell_relevance: Tensor, refinements: Tensor, explore: Tensor) -> Tensor:
        """Level of detail of each cell.

        cell_relevance float [B, 64]; refinements float [B, 1], whole numbers 0 to 64; explore float [B, 1] in [0, 1],
        the share of the refinements that is spread evenly. Returns int64 [B, 64]. More refinements never take detail
        from a cell.
        """
        spread_count = torch.floor(refinements * explore)
        by_rank = rank(cell_relevance) < refinements - spread_count
        # The spread share goes to cells that rank has not refined: those are pushed behind all others.
        turn = -(self.spread.unsqueeze(0) + by_rank.float() * CELL_COUNT)
        return (by_rank | (rank(turn) < spread_count)).long()

    def pack(self, features: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """features [B, 257, D] and levels int64 [B, 64] -> tokens [B, 401, D] and mask int32 [B, 401] (1 = a token).

        CLS first, then the cells row by row, then padding (copies of the last cell's token, masked).
        """
        width = features.shape[2]
        pooled = cells_of(features[:, 1:]).mean(2)  # [B, 64, D]
        source = torch.cat([features, pooled], dim=1)  # [B, 321, D]: CLS, patches, pooled cells

        cost = 1.0 + REFINEMENT_COST * levels.float()
        start = cost @ self.offsets  # [B, 64]
        cell = (start.unsqueeze(1) <= self.slots.view(1, -1, 1)).float().sum(2).long() - 1  # [B, 400]
        within = self.slots - start.gather(1, cell)
        patch = self.patch_of[cell].gather(2, within.clamp(max=3.0).long().unsqueeze(2)).squeeze(2)
        index = torch.where(levels.gather(1, cell) > 0, 1 + patch, 1 + PATCH_COUNT + cell)
        index = torch.cat([torch.zeros_like(index[:, :1]), index], dim=1)

        tokens = source.gather(1, index.unsqueeze(2).expand(-1, -1, width))
        real = (self.slots < cost.sum(1, keepdim=True)).int()
        return tokens, torch.cat([torch.ones_like(real[:, :1]), real], dim=1)
