"""Policies for choosing the cells that get detail: the allocator and its baselines.

All arms share the code of allocation, budget and Q-Former. They differ in the map that ranks the cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from build_engines.model.allocation import CELL_COUNT, CELLS, PATCH_COUNT, cells_of, spread_turns
from build_engines.model.allocator import Weighed

GUIDED, RANDOM, UNIFORM, CENTRE = "guided", "random", "uniform", "centre"
WAYS = ("propositional", "perspectival", "participatory")  # each alone, with the allocator's tensions
POLICIES = (GUIDED, *WAYS, RANDOM, UNIFORM, CENTRE)
TRAINED = (GUIDED, "propositional", "perspectival", RANDOM, UNIFORM, CENTRE)  # in equal shares
TENSIONS = ("particularize", "explore", "diversify")


def centre_weight() -> Tensor:
    """[64] in [0, 1]: how near each cell is to the centre of the image."""
    line = (torch.arange(CELLS) + 0.5) / CELLS - 0.5
    distance = torch.hypot(line[:, None], line[None]).flatten()
    return 1 - distance / distance.max()


def select(policy: str, weighed: Weighed, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The map that ranks the cells, [B, 64] in [0, 1], and the tensions [B, 3] under a policy.

    noise [B, 64] in [0, 1] is the random policy's map. Random and centre-weighted choice spend everything by rank and
    ignore neighbours. Uniform choice does so by rank in an evenly spread order (Bayer's), so that with a closer view it
    reaches level 2 too. Particularize is always the allocator's.
    """
    if policy == GUIDED:
        return weighed.cells, weighed.tensions
    if policy in WAYS:
        return cells_of(weighed.scores[:, WAYS.index(policy)]).amax(2), weighed.tensions
    evenly = 1 - spread_turns().to(noise) / CELL_COUNT
    cells = {RANDOM: noise, UNIFORM: evenly.expand_as(noise), CENTRE: centre_weight().to(noise).expand_as(noise)}[
        policy
    ]
    fixed = noise.new_zeros(len(noise), 2)
    return cells, torch.cat([weighed.tensions[:, :1], fixed], dim=1)


def select_each(policies: list[str], weighed: Weighed, noise: Tensor) -> tuple[Tensor, Tensor]:
    """As `select`, with a policy for every row."""
    cells, tensions = noise.clone(), weighed.tensions.clone()
    for policy in set(policies):
        rows = torch.tensor([i for i, p in enumerate(policies) if p == policy], device=noise.device)
        part = Weighed(*(field[rows] for field in weighed))
        chosen, tension = select(policy, part, noise[rows])
        cells, tensions = cells.index_copy(0, rows, chosen), tensions.index_copy(0, rows, tension)
    return cells, tensions


def on_asked(cells: Tensor, coverage: Tensor) -> Tensor:
    """bool [B]: whether the most relevant cell of [B, 64] shows an asked object.

    coverage [B, 256] is the greatest share of each patch that an asked object fills.
    """
    shown = cells_of(coverage.reshape(-1, PATCH_COUNT)).amax(2) > 0.15
    return shown.gather(1, cells.argmax(1, keepdim=True)).squeeze(1)
