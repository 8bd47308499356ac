"""Attention over open and closed tokens, with a gradient for opening and closing each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _GatedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, gates: Tensor) -> Tensor:
        opened = (gates > 0)[:, None, None, :]
        logits = logits.float()
        visible = torch.where(opened, logits, -torch.inf)
        shares = torch.softmax(visible, dim=-1)
        ctx.save_for_backward(logits, torch.logsumexp(visible, dim=-1, keepdim=True), shares, opened)
        return shares

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits, total, shares, opened = ctx.saved_tensors
        centred = gradient - (gradient * shares).sum(-1, keepdim=True)
        would_be = torch.where(opened, shares, torch.sigmoid(logits - total))
        return shares * centred, (would_be * centred).sum((1, 2))


def gated_softmax(logits: Tensor, gates: Tensor) -> Tensor:
    """Softmax over the open tokens: logits [B, heads, T, S] -> shares [B, heads, T, S], float32.

    gates [B, S] are 0 or 1, with at least one 1 a row. The share of a closed token is exactly 0.

    The gradient of an open gate is that of gate * exp(logit), normalised. The gradient of a closed gate is the change
    that opening it would make, to first order in the output: its share among the open tokens and itself. (The
    derivative at 0 is exp(logit) over the sum of the open ones, which has no bound.)
    """
    shares: Tensor = _GatedSoftmax.apply(logits, gates)
    return shares
