"""Focus regions: the up to three places that a focus group of queries reads on its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.model.allocation import GROUP, MAX_VISUAL_TOKENS, affordable, cell_distances

REGIONS = MAX_VISUAL_TOKENS // GROUP - 1
OUTSIDE = 3.0  # for a cell outside a region: above the squared distance of a corner of the 3x3 cells from their middle


def query_groups(particularize: Tensor, budget: Tensor) -> Tensor:
    """int32 [B, 1], 1 to 4: the visual tokens that are `affordable` in whole groups of 32 queries, rounded half up."""
    return torch.floor(affordable(particularize, budget)[:, 1:] / GROUP + 0.5).int()


class FocusRegions(nn.Module):
    """Cell relevance [B, 64] and query groups int32 [B, 1] -> each cell's region, int32 [B, 64], 0 for none.

    The peaks: three times the (first) greatest of what is left, without the 3x3 cells around the peaks before it. A
    region is the 3x3 cells around its peak; a cell of several belongs to the nearest peak, and to the earlier of two as
    near. Regions of groups that are not used are not told.
    """

    distance: Tensor

    def __init__(self) -> None:
        super().__init__()
        apart = cell_distances()
        around = apart.amax(2) <= 1
        self.register_buffer("distance", torch.where(around, (apart * apart).sum(2), OUTSIDE), persistent=False)

    def forward(self, cell_relevance: Tensor, groups: Tensor) -> Tensor:
        nearest = functional.embedding(cell_relevance.argmax(1), self.distance)
        regions = (nearest < OUTSIDE).float()
        for region in range(2, REGIONS + 1):
            peak = torch.where(regions > 0, -1.0, cell_relevance).argmax(1)
            distance = functional.embedding(peak, self.distance)
            regions = torch.where(distance < nearest, float(region), regions)
            nearest = torch.minimum(nearest, distance)
        return torch.where(regions < groups.float(), regions, 0.0).int()
