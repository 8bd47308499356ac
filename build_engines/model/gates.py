"""Attention over tokens that are open or closed, with a gradient that tells what opening or closing one is worth."""

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
    """logits [B, heads, T, S] and gates [B, S], 0 or 1, at least one 1 a row -> shares [B, heads, T, S], float32, of
    the open tokens; a closed one's is exactly 0.

    A gate's gradient is that of gate * exp(logit), normalised, where it is open; where it is closed, the difference
    that opening it would make, to first order in the output: its share among the open ones and itself. (The
    derivative at 0 is exp(logit) over the open ones' sum, which has no bound.)
    """
    shares: Tensor = _GatedSoftmax.apply(logits, gates)
    return shares
