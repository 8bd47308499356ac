"""The closer view: what a 448-pixel look adds to what the 224-pixel look knew of the same place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.model.allocation import DETAIL_GRID, GRID


class CloserView(nn.Module):
    """features [B, 257, D] and detail_features [B, 1024, D] (32x32, row by row, without CLS) -> tokens [B, 1024, D].

    A token is the feature of the 224-view's patch that contains it, so that the Q-Former knows it, plus what a small
    network reads from the closer patch. That starts at zero: untrained, level 2 is four copies of each patch.
    """

    above: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        row = torch.arange(DETAIL_GRID) // 2
        self.register_buffer("above", (1 + GRID * row.unsqueeze(1) + row).flatten(), persistent=False)

    def forward(self, features: Tensor, detail_features: Tensor) -> Tensor:
        known = features[:, self.above]
        return known + self.out(functional.gelu(self.hidden(self.norm(detail_features))))
