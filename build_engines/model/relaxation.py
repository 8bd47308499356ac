"""The allocator's choice with a gradient: what is chosen is as in `allocation.py`, how it would change is soft.

Straight-through Gumbel top-k (Jang et al. 2017, "Categorical reparameterization with Gumbel-softmax"; Kool et al. 2019,
"Stochastic beams and where to find them"). All candidate tokens are laid open to the Q-Former, each with a gate that is
0 or 1: token j gets the attention gate_j * exp(logit_j), normalised, and a closed token tells, going backward, what
opening it would have been worth (`gates.py`).

    allocator = RelevanceAllocator(participatory, balancing, closer)
    weighed = allocator.weigh(...)
    choice = choose(allocator.allocation, weighed.cells, weighed.tensions, budget, temperature=0.5)
    opened = open_tokens(allocator.allocation, features, None, choice)
    seen = QFormer(model).read(opened.tokens, gates=opened.gates)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from build_engines.model.allocation import CELL_COUNT, DEEP_COST, PATCH_COUNT, REFINEMENT_COST, Allocation, Steps

SHARPNESS = 0.1  # of a gate, in gain: a step this far above the threshold is about three quarters open
WIDTH = 2.0  # of the edge between taken and not taken, in steps


class Choice(NamedTuple):
    """Gates of each cell: 0 or 1 going forward, soft going backward."""

    refined: Tensor  # [B, 64]: level 1 or 2
    deep: Tensor | None  # [B, 64]: level 2; None where there is no closer view
    levels: Tensor  # int64 [B, 64]


class Opened(NamedTuple):
    """Every candidate token, in the order of `Allocation.sources`, with its gate."""

    tokens: Tensor  # [B, N, D], N = 321, or 1345 with a closer view
    gates: Tensor  # [B, N]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Exactly `hard` going forward, `soft` going backward."""
    return hard.detach() + (soft - soft.detach())


def perturbed(gains: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """gains [B, 64] with Gumbel noise of that temperature added to their log odds; still in [0, 1].

    The gradient is as without noise."""
    if temperature == 0:
        return gains
    uniform = torch.rand(gains.shape, generator=generator, device=gains.device).clamp(1e-9, 1 - 1e-6)
    gumbel = -torch.log(-torch.log(uniform))
    noisy = torch.sigmoid(torch.logit(gains.detach(), eps=1e-4) + temperature * gumbel)
    return straight_through(noisy, gains)


def choose(
    allocation: Allocation,
    cell_relevance: Tensor,
    tensions: Tensor,
    budget: Tensor,
    *,
    closer: bool = False,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Choice:
    """cell_relevance [B, 64] in [0, 1]; tensions [B, 3]; budget int32 [B, 4]. Without temperature the choice is that of
    `RelevanceAllocator`.

    The gradient of a step taken by rank: through its gain, sigmoid((gain - threshold) / SHARPNESS), the threshold half
    way between the last gain taken and the first not taken; and through the number of affordable steps,
    sigmoid((number - position) / WIDTH): one more step opens one more cell, however close the gains lie. Of a cell
    refined in its turn: the same in the number of turns. The numbers are real: tokens over cost, so that particularize
    and explore are reached.
    """
    particularize, explore, diversify = tensions.split(1, dim=1)
    gains = perturbed(allocation.gains(cell_relevance, diversify), temperature, generator)
    extra = allocation.extra(particularize, budget, closer)
    with torch.no_grad():
        steps = allocation.steps(gains, allocation.refinements(extra), explore, closer)
    affordable = extra / REFINEMENT_COST
    share = affordable * explore
    by_rank = _rank_gates(steps, gains, affordable - share * ~steps.crowded)
    turns = steps.spread.float().sum(1, keepdim=True)
    by_turn = straight_through(steps.spread.float(), _edge(straight_through(turns, share), steps.turn))
    refined = by_rank[:, :CELL_COUNT] + by_turn  # never both
    return Choice(refined, by_rank[:, CELL_COUNT:] if closer else None, steps.levels)


def _rank_gates(steps: Steps, gains: Tensor, affordable: Tensor) -> Tensor:
    """Gates of the K steps [B, K]; affordable [B, 1]: refinements left to rank, a real number."""
    closer = steps.taken.shape[1] > CELL_COUNT
    worth = torch.cat([gains, gains * gains], dim=1) if closer else gains
    taken = steps.taken.float()
    number = taken.sum(1, keepdim=True)
    following = steps.position == number
    cost = 1.0 + (DEEP_COST - 1.0) * following[:, CELL_COUNT:].any(1, keepdim=True)  # of the first step not taken
    place = (number - 0.5).clamp(0, worth.shape[1] - 1)
    ordered = worth.sort(dim=1, descending=True).values
    ends = ordered.gather(1, torch.cat([place.floor(), place.ceil()], dim=1).long())
    threshold = ends.mean(1, keepdim=True)
    by_gain = torch.sigmoid((worth - threshold) / SHARPNESS)
    by_number = _edge(straight_through(number, affordable / cost), steps.position)
    return straight_through(taken, by_gain + by_number)


def _edge(number: Tensor, position: Tensor) -> Tensor:
    """How far inside the first `number` each position is, in (0, 1); its slopes add up to 1."""
    return torch.sigmoid((number - position - 0.5) / WIDTH)


def open_tokens(allocation: Allocation, features: Tensor, detail: Tensor | None, choice: Choice) -> Opened:
    """features [B, 257, D] and the closer view's tokens [B, 1024, D] (`RelevanceAllocator.detail`), or None."""
    if (detail is None) != (choice.deep is None):
        raise ValueError("a closer view's tokens and gates come together or not at all")
    return Opened(allocation.sources(features, detail), gates_of(allocation, choice))


def gates_of(allocation: Allocation, choice: Choice) -> Tensor:
    """The gates [B, N] alone, for tokens that several choices share."""
    seen = torch.ones_like(choice.refined[:, :1])
    patches = choice.refined if choice.deep is None else choice.refined - choice.deep
    gates = [seen, _by_place(patches, allocation.patch_of), 1 - choice.refined]
    if choice.deep is not None:
        gates.append(_by_place(choice.deep, allocation.detail_of))
    return torch.cat(gates, dim=1)


def _by_place(cells: Tensor, places: Tensor) -> Tensor:
    """Values of the cells [B, 64] to those of the patches that lie in them, row by row; places [64, n] int64."""
    owner = torch.empty_like(places.flatten())
    owner[places.flatten()] = torch.arange(CELL_COUNT, device=places.device).repeat_interleave(places.shape[1])
    return cells[:, owner]


def region_gates(allocation: Allocation, gates: Tensor, regions: Tensor, region: int) -> Tensor:
    """Gates [B, N] of what the focus group of that region reads: regions int [B, 64] as of `FocusRegions`, 1 to 3.

    CLS belongs to none."""
    inside = (regions == region).to(gates.dtype)
    parts = [torch.zeros_like(gates[:, :1]), _by_place(inside, allocation.patch_of), inside]
    if gates.shape[1] > 1 + PATCH_COUNT + CELL_COUNT:
        parts.append(_by_place(inside, allocation.detail_of))
    return gates * torch.cat(parts, dim=1)
