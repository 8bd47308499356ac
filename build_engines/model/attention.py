"""Scaled dot-product attention in plain operations, so that every exporter and TensorRT see the same five nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from build_engines.model.gates import gated_softmax


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, gates: Tensor | None = None
) -> Tensor:
    """query (scaled) [B, heads, T, d]; key, value [B, heads, S, d]; bias fits [B, heads, T, S]; gates [B, S] as
    `gates.gated_softmax` takes them, for training -> [B, T, heads * d].

    The scale is on the query, before the product, which is what TensorRT's attention fusion looks for.
    """
    scores = query @ key.transpose(2, 3)
    if bias is not None:
        scores = scores + bias
    shares = torch.softmax(scores, dim=-1) if gates is None else gated_softmax(scores, gates)
    mixed = shares @ value
    return mixed.transpose(1, 2).flatten(2)


def bias_where_hidden(visible: Tensor) -> Tensor:
    """bool, True where a key may be seen -> float, 0 there and a very negative number elsewhere."""
    return torch.where(visible, 0.0, -1e9)
