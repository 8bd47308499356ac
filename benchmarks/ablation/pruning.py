"""Methods of the field that prune vision tokens, on our features: arms to compare the allocator with.

Each method orders candidates by which it would keep first. The candidates are the 256 patch tokens of the 224-pixel
view, and with the closer view also its 1,024 tokens. All methods are free of training, as in their papers. They are
asked in two forms, and the better one counts as the rival:

- *kept*: the Q-Former reads the first K candidates and nothing else, as the papers prune;
- *ranked*: the order ranks our cells, so that the rest of the image stays as pooled tokens. The Q-Former was trained
  to read these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from build_engines.model.allocation import (
    CELL_COUNT,
    DETAIL_GRID,
    GRID,
    GROUP,
    PATCH_COUNT,
    cells_of,
    patch_around,
    spread_turns,
)
from build_engines.train.evaluation import Answers, Asked, Chain, Exam, View, in_parts, peak_on_asked, read, view

CDPRUNER, DART, ATTENTION, RANDOM, EVENLY = "cdpruner", "dart", "attention", "random", "evenly"
PIVOTS = 8  # of DART
AT_ONCE = 16  # questions: a kernel of 1,280 candidates takes 6.6 MB each
NO_GAIN = 1e-6  # share of a candidate's own r^2: with no more than this left, those kept before it explain it


@dataclass(frozen=True)
class Pruned:
    """One way to prune. `once`: the first question about an image decides for all that follow."""

    method: str
    keep: int  # vision tokens, without CLS
    closer: bool = False
    ranked: bool = False
    once: bool = False


@dataclass(frozen=True)
class Candidates:
    """What a method chooses from, for each of B questions."""

    tokens: Tensor  # [B, N, D]
    relevance: Tensor  # [B, N] in [0, 1]: how much the question is about each, from participatory knowing
    attention: Tensor  # [B, N]: what the Q-Former's queries give each, of all of its attention
    place: Tensor  # int64 [N]: the patch of the 16x16 grid that each lies in
    noise: Tensor  # [B, N] in [0, 1]


def cdpruner(found: Candidates, keep: int) -> Tensor:
    """CDPruner: a determinantal point process over similarity, conditioned on relevance (Zhang et al. 2025,
    arXiv:2506.10967).

    The kernel is r_i * cos(i, j) * r_j, with relevance r scaled to [0, 1] in each image. The greedy maximum is found by
    incremental Cholesky factors (Chen et al. 2018, arXiv:1709.05135). Once the features' rank is used up, the most
    relevant of the others follow.
    """
    unit = functional.normalize(found.tokens.double(), dim=2)  # gains begin at r^2, which FP32 would round away
    relevance = found.relevance.double()
    low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    weight = (relevance - low) / (high - low).clamp(min=1e-6) + 1e-6
    rows = torch.arange(len(unit))
    gain = weight.square()
    least = NO_GAIN * gain
    factors: list[Tensor] = []
    chosen: list[Tensor] = []
    taken = torch.zeros_like(gain, dtype=torch.bool)
    for _ in range(keep):
        value = torch.where(gain > least, gain, weight - 2).masked_fill(taken, -torch.inf)
        best = value.argmax(1)
        left, is_new = (each[rows, best, None] for each in (gain, gain > least))
        kernel = weight[rows, best, None] * (unit @ unit[rows, best].unsqueeze(2)).squeeze(2) * weight
        known = sum((factor[rows, best, None] * factor for factor in factors), torch.zeros_like(kernel))
        factor = torch.where(is_new, (kernel - known) / left.sqrt(), 0.0)
        gain = (gain - factor.square()).clamp(min=0)
        factors.append(factor)
        taken[rows, best] = True
        chosen.append(best)
    return torch.stack(chosen, dim=1)


def dart(found: Candidates, keep: int) -> Tensor:
    """DART: a few pivots of the largest norm, then for each in turn the candidate least like it (Wen et al. 2025,
    arXiv:2502.11494)."""
    rows = torch.arange(len(found.tokens))
    pivots = found.tokens.abs().sum(2).topk(min(PIVOTS, keep), dim=1).indices
    unit = functional.normalize(found.tokens, dim=2)
    likeness = unit[rows[:, None], pivots] @ unit.transpose(1, 2)  # [B, pivots, N]
    likeness.scatter_(2, pivots[:, None].expand(-1, pivots.shape[1], -1), torch.inf)
    chosen = list(pivots.unbind(1))
    for number in range(keep - pivots.shape[1]):
        best = likeness[:, number % pivots.shape[1]].argmin(1)
        likeness[rows, :, best] = torch.inf
        chosen.append(best)
    return torch.stack(chosen, dim=1)


def attention(found: Candidates, keep: int) -> Tensor:
    """The most attended candidates, as FastV keeps them (Chen et al. 2024, arXiv:2403.06764).

    There the language model's second layer attends to image tokens. Here only the Q-Former reads them.
    """
    return found.attention.topk(keep, dim=1).indices


def random(found: Candidates, keep: int) -> Tensor:
    return found.noise.topk(keep, dim=1).indices


def evenly(found: Candidates, keep: int) -> Tensor:
    """Candidates spread evenly over the grid of the closest view."""
    count = found.tokens.shape[1]
    side = DETAIL_GRID if count > PATCH_COUNT else GRID
    order = spread_turns(side).argsort()[:keep]
    return (count - side * side + order).expand(len(found.tokens), -1)


METHODS: dict[str, Callable[[Candidates, int], Tensor]] = {
    CDPRUNER: cdpruner,
    DART: dart,
    ATTENTION: attention,
    RANDOM: random,
    EVENLY: evenly,
}


@torch.no_grad()
def answer_pruned(chain: Chain, exam: Exam, arm: Pruned, seed: int = 0) -> Answers:
    """Ask every question under one arm, as `evaluation.answer` does. seed: for the random method."""
    noise = torch.Generator().manual_seed(seed)
    return in_parts(exam, AT_ONCE, arm.once, lambda asked, deciding: _answer(chain, exam, asked, deciding, arm, noise))


def _answer(
    chain: Chain, exam: Exam, asked: list[Asked], deciding: list[Asked], arm: Pruned, noise: torch.Generator
) -> tuple[np.ndarray, ...]:
    seen = view(chain, exam, deciding, closer=arm.closer)
    tokens, mask, levels = _spent(chain, seen, arm, noise)
    return (
        read(chain, tokens, mask, torch.ones(len(asked), 1, dtype=torch.int32), asked),
        ((mask > 0).sum(1) - 1).numpy(),
        np.full(len(asked), GROUP),
        peak_on_asked(exam, asked, seen.weighed),
        levels.to(torch.int8).numpy(),
        seen.weighed.tensions.numpy(),
        seen.weighed.weights.numpy(),
    )


def _spent(chain: Chain, seen: View, arm: Pruned, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, 1 + N, D], mask int32 [B, 1 + N] and levels int64 [B, 64] (0 where nothing is ranked)."""
    found = candidates(chain, seen, noise)
    allocation = chain.allocator.allocation
    method = METHODS[arm.method]
    if arm.ranked:
        cells = ranked_cells(method(found, arm.keep), found.place)
        extra = torch.full((len(cells), 1), float(arm.keep - CELL_COUNT))
        levels = allocation.levels(
            cells, allocation.refinements(extra), torch.zeros(len(cells), 1), seen.detail is not None
        )
        return *allocation.pack(seen.features, levels, None, seen.detail), levels
    kept = method(found, arm.keep)
    chosen = found.tokens.gather(1, kept.unsqueeze(2).expand(-1, -1, found.tokens.shape[2]))
    tokens = torch.cat([seen.features[:, :1], chosen], dim=1)
    none = torch.zeros(len(tokens), CELL_COUNT, dtype=torch.long)
    return tokens, torch.ones(tokens.shape[:2], dtype=torch.int32), none


def candidates(chain: Chain, seen: View, noise: torch.Generator) -> Candidates:
    tokens, place = seen.features[:, 1:], torch.arange(PATCH_COUNT)
    if seen.detail is not None:
        tokens = torch.cat([tokens, seen.detail], dim=1)
        place = torch.cat([place, patch_around()])
    return Candidates(
        tokens,
        seen.weighed.scores[:, 2, place],
        chain.qformer.attention(tokens),
        place,
        torch.rand(tokens.shape[:2], generator=noise),
    )


def ranked_cells(order: Tensor, place: Tensor) -> Tensor:
    """The candidates that a method keeps, int64 [B, K], first to last -> cells [B, 64] in [0, 1].

    A cell's first candidate decides. A cell without one is 0.
    """
    keep = order.shape[1]
    score = ((keep - torch.arange(keep)) / keep).expand(len(order), -1)
    patches = torch.zeros(len(order), PATCH_COUNT).scatter_reduce_(1, place[order], score, "amax")
    return cells_of(patches).amax(2)
