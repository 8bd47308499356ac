"""Opponent processing: weights of the ways of knowing and three tensions, per question."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.model.allocation import GRID

WAYS = 3  # of knowing: propositional, perspectival, participatory
SUMMARIES = WAYS * 4 * 3  # of three maps in four quadrants: mean, greatest, standard deviation
TRUSTED = (0.05, 0.05, 0.9)  # weights before training
LEANING = (0.25, 0.25, 0.1)  # tensions before training


class Balance(NamedTuple):
    weights: Tensor  # [B, 3], their sum is 1: propositional, perspectival, participatory
    tensions: Tensor  # [B, 3] in [0, 1]: particularize, explore, diversify


def quadrant_summaries(scores: Tensor) -> Tensor:
    """Maps [B, 3, 256] in [0, 1] -> [B, 36] in [0, 1]: mean, greatest and standard deviation in each quadrant."""
    half = GRID // 2
    quadrants = scores.reshape(-1, WAYS, 2, half, 2, half).transpose(3, 4).reshape(-1, WAYS * 4, half * half)
    mean = quadrants.mean(2, keepdim=True)
    spread = quadrants - mean
    deviation = torch.sqrt((spread * spread).mean(2) + 1e-6)  # 1e-6: a constant map needs a gradient too
    return torch.cat([mean.squeeze(2), quadrants.amax(2), deviation], dim=1)


class OpponentProcessing(nn.Module):
    """scores [B, 3, 256] in [0, 1] and the question's meaning [B, Q] -> `Balance`.

    The summaries are not normalised: particularize depends on how much of the image is relevant, and a normalisation
    would hide that. Before training, the balance is the same for every input.
    """

    def __init__(self, meaning_width: int, hidden_width: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(meaning_width)
        self.hidden = nn.Linear(SUMMARIES + meaning_width, hidden_width)
        self.out = nn.Linear(hidden_width, 2 * WAYS)
        nn.init.zeros_(self.out.weight)
        start = [*(math.log(share) for share in TRUSTED), *(math.log(share / (1 - share)) for share in LEANING)]
        self.out.bias.data.copy_(torch.tensor(start))

    def forward(self, scores: Tensor, meaning: Tensor) -> Balance:
        return self.of(quadrant_summaries(scores), meaning)

    def of(self, summaries: Tensor, meaning: Tensor) -> Balance:
        """`forward` with the `quadrant_summaries` of the scores, which nothing here teaches."""
        known = torch.cat([summaries, self.norm(meaning)], dim=1)
        said = self.out(functional.gelu(self.hidden(known)))
        return Balance(torch.softmax(said[:, :WAYS], dim=1), torch.sigmoid(said[:, WAYS:]))
