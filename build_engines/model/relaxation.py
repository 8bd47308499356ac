"""Make the allocator's choice differentiable for training.

The forward pass chooses exactly as `allocation.py` does; the backward pass uses a soft choice. The method is
straight-through Gumbel top-k (Jang et al. 2017, "Categorical reparameterization with Gumbel-softmax"; Kool et al. 2019,
"Stochastic beams and where to find them"). The Q-Former gets all candidate tokens, each with a gate that is 0 or 1.
Token j gets the attention gate_j * exp(logit_j), normalised. The gradient of a closed token's gate is what opening it
would be worth (`gates.py`).

    allocator = RelevanceAllocator(participatory, balancing, closer)
    weighed = allocator.weigh(...)
    choice = choose(allocator, weighed.cells, weighed.tensions, budget, temperature=0.5)
    tokens, gates = allocator.allocation.sources(features, None), gates_of(allocator.allocation, choice)
    seen = QFormer(model).read(tokens, gates=gates)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from build_engines.model.allocation import (
    CELL_COUNT,
    DEEP_COST,
    LEFT_OUT,
    PATCH_COUNT,
    REFINEMENT_COST,
    Allocation,
    Steps,
)
from build_engines.model.allocator import RelevanceAllocator

SHARPNESS = 0.1  # in gain: a step this far above the threshold has a gate about three quarters open
WIDTH = 2.0  # in steps: of the edge between taken and not taken


class Choice(NamedTuple):
    """Gates of each cell: 0 or 1 going forward, soft going backward."""

    refined: Tensor  # [B, 64]: level 1 or 2
    deep: Tensor | None  # [B, 64]: level 2; None without a closer view
    levels: Tensor  # int64 [B, 64] from -1


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return `hard` in the forward pass with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())


def perturbed(gains: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Add Gumbel noise of this temperature to the log odds of gains [B, 64].

    The result stays in [0, 1]. The gradient is the one without noise.
    """
    if temperature == 0:
        return gains
    uniform = torch.rand(gains.shape, generator=generator, device=gains.device).clamp(1e-9, 1 - 1e-6)
    gumbel = -torch.log(-torch.log(uniform))
    noisy = torch.sigmoid(torch.logit(gains.detach(), eps=1e-4) + temperature * gumbel)
    return straight_through(noisy, gains)


def choose(
    allocator: RelevanceAllocator,
    cell_relevance: Tensor,
    tensions: Tensor,
    budget: Tensor,
    *,
    closer: bool = False,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Choice:
    """Choose levels with a gradient to relevance and tensions.

    cell_relevance [B, 64] in [0, 1]; tensions [B, 3]; budget int32 [B, 4]. At temperature 0 the choice equals that of
    `RelevanceAllocator`.

    A step taken by rank has two gradients:
    - through its gain: sigmoid((gain - threshold) / SHARPNESS). The threshold lies half way between the last gain taken
      and the first gain not taken.
    - through the number of affordable steps: sigmoid((number - position) / WIDTH). One more step opens one more cell,
      however close the gains are.

    A cell refined in its turn has the second gradient, in the number of turns. These numbers are real (tokens divided
    by cost), so that gradients reach particularize and explore.
    """
    allocation = allocator.allocation
    particularize, explore, diversify = tensions.split(1, dim=1)
    gains = perturbed(allocation.gains(cell_relevance, diversify), temperature, generator)
    extra = allocation.extra(particularize, budget, closer)
    spendable = allocation.spendable(particularize, extra, closer)
    with torch.no_grad():
        steps = allocation.steps(gains, allocation.refinements(spendable), explore, closer)
        levels = steps.levels
        if closer:
            levels = allocation.leave_out(levels, cell_relevance, extra, allocator.focus(cell_relevance).peaks)
    affordable = spendable / REFINEMENT_COST
    share = affordable * explore
    by_rank = _rank_gates(steps, gains, affordable - share * ~steps.crowded)
    turns = steps.spread.float().sum(1, keepdim=True)
    by_turn = straight_through(steps.spread.float(), _edge(straight_through(turns, share), steps.turn))
    refined = by_rank[:, :CELL_COUNT] + by_turn  # never both
    return Choice(refined, by_rank[:, CELL_COUNT:] if closer else None, levels)


def _rank_gates(steps: Steps, gains: Tensor, affordable: Tensor) -> Tensor:
    """Gates of the K steps [B, K]. affordable [B, 1] is the real number of refinements left for rank."""
    closer = steps.taken.shape[1] > CELL_COUNT
    worth = torch.cat([gains, gains * gains], dim=1) if closer else gains
    taken = steps.taken.float()
    number = taken.sum(1, keepdim=True)
    following = steps.position == number
    cost = 1.0 + (DEEP_COST - 1.0) * following[:, CELL_COUNT:].any(1, keepdim=True)  # cost of the first step not taken
    place = (number - 0.5).clamp(0, worth.shape[1] - 1)
    ordered = worth.sort(dim=1, descending=True).values
    ends = ordered.gather(1, torch.cat([place.floor(), place.ceil()], dim=1).long())
    threshold = ends.mean(1, keepdim=True)
    by_gain = torch.sigmoid((worth - threshold) / SHARPNESS)
    by_number = _edge(straight_through(number, affordable / cost), steps.position)
    return straight_through(taken, by_gain + by_number)


def _edge(number: Tensor, position: Tensor) -> Tensor:
    """How far inside the first `number` each position is, in (0, 1). Its slopes add up to 1."""
    return torch.sigmoid((number - position - 0.5) / WIDTH)


def gates_of(allocation: Allocation, choice: Choice) -> Tensor:
    """The gates [B, N] of every candidate token, in the order of `Allocation.sources`: N is 321, or 1345 if the choice
    has a closer view."""
    seen = torch.ones_like(choice.refined[:, :1])
    patches = choice.refined if choice.deep is None else choice.refined - choice.deep
    pooled = (1 - choice.refined) * (choice.levels > LEFT_OUT)
    gates = [seen, _by_place(patches, allocation.patch_of), pooled]
    if choice.deep is not None:
        gates.append(_by_place(choice.deep, allocation.detail_of))
    return torch.cat(gates, dim=1)


def _by_place(cells: Tensor, places: Tensor) -> Tensor:
    """Copy each cell's value [B, 64] to its patches, in row order. places int64 [64, n] are the patches of a cell."""
    owner = torch.empty_like(places.flatten())
    owner[places.flatten()] = torch.arange(CELL_COUNT, device=places.device).repeat_interleave(places.shape[1])
    return cells[:, owner]


def region_gates(allocation: Allocation, gates: Tensor, regions: Tensor, region: int) -> Tensor:
    """Gates [B, N] of the tokens that the focus group of this region reads.

    regions int [B, 64] are those of `FocusRegions`; region is 1 to 3. CLS belongs to no region.
    """
    inside = (regions == region).to(gates.dtype)
    parts = [torch.zeros_like(gates[:, :1]), _by_place(inside, allocation.patch_of), inside]
    if gates.shape[1] > 1 + PATCH_COUNT + CELL_COUNT:
        parts.append(_by_place(inside, allocation.detail_of))
    return gates * torch.cat(parts, dim=1)
