"""Draw budgets of vision tokens for training, and price the tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from build_engines.model.allocation import CELL_COUNT, MAX_VISION_TOKENS, MOST_TOKENS

UNIFORM_BUDGETS = (1.0, 1.0, 1.0)  # of the lower, middle and upper third of the budgets
LARGE_BUDGETS = (2.0, 3.0, 5.0)  # TokenFLEX's weights
ROOM = MOST_TOKENS - CELL_COUNT  # tokens: the price is per room
WHOLE_SHARE = 0.1  # of the questions, which get the maximum


def ceiling(closely: bool) -> int:
    return MAX_VISION_TOKENS if closely else MOST_TOKENS


def draw_budgets(rng: np.random.Generator, number: int, closely: bool, thirds: tuple[float, float, float]) -> Tensor:
    """float [number]: vision tokens from 64 to the maximum; thirds are drawn by weight, a tenth get the maximum."""
    share = np.array(thirds) / sum(thirds)
    place = (rng.choice(3, number, p=share) + rng.random(number)) / 3
    place[rng.random(number) < WHOLE_SHARE] = 1.0
    return torch.from_numpy(np.round(CELL_COUNT + place * (ceiling(closely) - CELL_COUNT)).astype(np.float32))


@dataclass
class Price:
    """Price in nats for the tokens between 64 and 256 (ROOM).

    It rises while the mean over the question types spends more than the target, and falls while it spends less.
    """

    target: float
    price: float = 0.02
    spent: dict[str, float] = field(default_factory=dict)  # by type, running means

    def observe(self, kinds: list[str], tokens: list[float]) -> None:
        """Update the price by the tokens spent on questions of these types.

        The price moves more slowly than particularize learns, so that neither oscillates.
        """
        for kind in set(kinds):
            number = float(np.mean([spent for one, spent in zip(kinds, tokens, strict=True) if one == kind]))
            self.spent[kind] = 0.8 * self.spent.get(kind, number) + 0.2 * number
        over = float(np.mean(list(self.spent.values()))) / self.target - 1
        self.price = float(np.clip(self.price * np.exp(0.02 * np.clip(over, -0.5, 0.5)), 0.005, 0.3))
