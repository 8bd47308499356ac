"""The closer view: tokens for the patches of a 448-pixel view of the image."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class CloserView(nn.Module):
    """Compute the tokens of the closer view's patches.

    A token is the sum of two terms: the feature of the 224-pixel view's patch around it, which the Q-Former knows, and
    what a small network computes from the closer patch. The network's output starts at zero. Before training, the four
    closer patches in one patch are therefore copies of it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def look(self, around: Tensor, detail: Tensor) -> Tensor:
        """Row by row: features of the patches around and of the closer patches, both [B, n, D] -> [B, n, D]."""
        return around + self.out(functional.gelu(self.hidden(self.norm(detail))))

    def forward(self, features: Tensor, detail_features: Tensor) -> Tensor:
        """Compute every token of the closer view.

        features [B, 257, D] and detail_features [B, 1024, D] (32x32, row by row, without CLS) -> [B, 1024, D].
        """
        rows = features[:, 1:].unflatten(1, (16, 1, 16, 1)).expand(-1, -1, 2, -1, 2, -1)
        return self.look(rows.flatten(1, 4), detail_features)
