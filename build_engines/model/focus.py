"""Focus regions: the up to three places that a focus group of queries reads on its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from build_engines.model.allocation import cell_distances, rank

REGIONS = 3
GROUP = 32  # queries of one group


def query_groups(particularize: Tensor, budget: Tensor) -> Tensor:
    """int32 [B, 1], 1 to 4: particularize [B, 1] of the way from the least to the most visual tokens of budget
    int32 [B, 4], in whole groups of 32 queries, rounded half up. Where the least is above the most, the most wins."""
    asked = budget[:, 2:].float() / GROUP
    most = asked[:, 1:]
    least = torch.minimum(asked[:, :1], most)
    groups = torch.floor(least + particularize * (most - least) + 0.5)
    return groups.clamp(1, 1 + REGIONS).int()


class FocusRegions(nn.Module):
    """Cell relevance [B, 64] and query groups int32 [B, 1] -> each cell's region, int32 [B, 64], 0 for none.

    The peaks: three times the greatest of what is left, without the 3x3 cells around the peaks before it. A region is
    the 3x3 cells around its peak; a cell of several belongs to the nearest peak, and to the earlier of two as near.
    Regions of groups that are not used are not told.
    """

    around: Tensor
    distance: Tensor

    def __init__(self) -> None:
        super().__init__()
        apart = cell_distances()
        self.register_buffer("around", (apart.amax(2) <= 1).float(), persistent=False)
        self.register_buffer("distance", (apart * apart).sum(2), persistent=False)

    def forward(self, cell_relevance: Tensor, groups: Tensor) -> Tensor:
        left, regions = cell_relevance, torch.zeros_like(cell_relevance)
        nearest = torch.full_like(cell_relevance, 3.0)  # above the squared distance of a corner
        for region in range(1, REGIONS + 1):
            peak = (rank(left) == 0).float()
            around = peak @ self.around
            distance = torch.where(around > 0, peak @ self.distance, 3.0)
            regions = torch.where(distance < nearest, float(region), regions)
            nearest = torch.minimum(nearest, distance)
            left = torch.where(around > 0, -1.0, left)
        return torch.where(regions < groups.float(), regions, 0.0).int()
