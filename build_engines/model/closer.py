"""The closer view: what a 448-pixel look adds to what the 224-pixel look knew of the same place."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class CloserView(nn.Module):
    """The token of a patch of the closer view: the feature of the 224-pixel view's patch around it, which the Q-Former
    knows, and what a small network reads from the closer patch. That starts at zero: untrained, the four patches in
    one are copies of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def look(self, around: Tensor, detail: Tensor) -> Tensor:
        """Row by row: the features around, and those of the closer patches, [B, n, D] both -> [B, n, D]."""
        return around + self.out(functional.gelu(self.hidden(self.norm(detail))))

    def forward(self, features: Tensor, detail_features: Tensor) -> Tensor:
        """features [B, 257, D] and detail_features [B, 1024, D] (32x32, row by row, without CLS) -> every token of the
        closer view, [B, 1024, D]."""
        rows = features[:, 1:].unflatten(1, (16, 1, 16, 1)).expand(-1, -1, 2, -1, 2, -1)
        return self.look(rows.flatten(1, 4), detail_features)
