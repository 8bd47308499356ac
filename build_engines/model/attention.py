"""Scaled dot-product attention in plain operations.

Every exporter and TensorRT see the same five nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from build_engines.model.gates import gated_softmax


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, gates: Tensor | None = None
) -> Tensor:
    """query (scaled) [B, heads, T, d] and key, value [B, heads, S, d] -> [B, T, heads * d].

    bias fits [B, heads, T, S]. gates [B, S] are those of `gates.gated_softmax`, for training.

    The query is scaled before the product, because TensorRT's attention fusion looks for this.
    """
    scores = query @ key.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    shares = torch.softmax(scores, dim=-1) if gates is None else gated_softmax(scores, gates)
    mixed = shares @ value
    return mixed.transpose(1, 2).flatten(2)


def bias_where_hidden(visible: Tensor) -> Tensor:
    """bool, True for a visible key -> float, 0 for a visible key and -1e9 for a hidden one."""
    return torch.where(visible, 0.0, -1e9)
