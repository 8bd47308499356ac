"""Focus regions: up to three places, each read by its own group of queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.model.allocation import GROUP, REGIONS, affordable, cell_distances

OUTSIDE = 3.0  # distance to a peak of a cell outside its region: above a corner's squared distance (2) in the 3x3 cells


def query_groups(particularize: Tensor, budget: Tensor, queries: int = GROUP) -> Tensor:
    """int32 [B, 1], 1 to 4: the `affordable` visual tokens in whole groups of queries, rounded half up."""
    return torch.floor(affordable(particularize, budget)[:, 1:] / queries + 0.5).int()


class Regions(NamedTuple):
    """All focus regions."""

    of_cell: Tensor  # int32 [B, 64]: each cell's region, 0 for none
    peaks: Tensor  # int64 [B, 3]: the cell that is each region's peak

    def read_by(self, groups: Tensor) -> Tensor:
        """Each cell's region, int32 [B, 64]: 0 for the regions that these query groups, int32 [B, 1], do not read."""
        return torch.where(self.of_cell < groups, self.of_cell, 0)


class FocusRegions(nn.Module):
    """Cell relevance [B, 64] -> `Regions`.

    The first peak is the most relevant cell. Each next peak is the most relevant cell outside the 3x3 cells around
    earlier peaks. The first cell wins a tie. A region is the 3x3 cells around its peak. A cell in several regions
    belongs to the nearest peak, and to the earlier of two equally near peaks.
    """

    distance: Tensor

    def __init__(self) -> None:
        super().__init__()
        apart = cell_distances()
        around = apart.amax(2) <= 1
        self.register_buffer("distance", torch.where(around, (apart * apart).sum(2), OUTSIDE), persistent=False)

    def forward(self, cell_relevance: Tensor) -> Regions:
        peaks = [cell_relevance.argmax(1)]
        nearest = functional.embedding(peaks[0], self.distance)
        regions = (nearest < OUTSIDE).float()
        for region in range(2, REGIONS + 1):
            peaks.append(torch.where(regions > 0, -1.0, cell_relevance).argmax(1))
            distance = functional.embedding(peaks[-1], self.distance)
            regions = torch.where(distance < nearest, float(region), regions)
            nearest = torch.minimum(nearest, distance)
        return Regions(regions.int(), torch.stack(peaks, dim=1))
