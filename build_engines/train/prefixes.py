"""Fit the positions after a prefix of 64 visual tokens, at the end of the stage `allocator`.

There the text is at positions 64 to 95. The frozen language model knows these from descriptions, as positions far into
a long text. These 32 rows are trained alone, so that they can also begin a question. 96 and 128 visual tokens use rows
that nothing else uses; those are trained with the other parts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from build_engines.scenes.questions import DESCRIBE, TYPES
from build_engines.scenes.world import NONE
from build_engines.train.architecture import QUERIES
from build_engines.train.lesson import Lesson
from build_engines.train.looking import Looking
from build_engines.train.looks import Looks
from build_engines.train.spending import Price

FIRST, LAST = 2 * QUERIES, 3 * QUERIES
RATE, WARMUP = 4e-3, 10
MIXTURE = (  # scenes, questions about each, least and most groups of queries, weight
    (6, dict.fromkeys(TYPES, 1.0), 4, (2, 2), 1.0),
    (3, dict.fromkeys(TYPES, 1.0), 3, (3, 4), 0.4),
    (5, {DESCRIBE: 1.0}, 1, (1, 1), 0.5),
)


def settle_positions(looking: Looking, looks: Looks, steps: int) -> None:
    """Train the 32 rows in place.

    They start half way between their values and the rows of a question after 32 visual tokens.
    """
    weight, start = looking.positions.weight, looking.first_position
    rows = slice(start + FIRST, start + LAST)
    weight.data[rows] = (weight.data[rows] + weight.data[start + QUERIES : start + FIRST]) / 2
    named = [i for i, things in enumerate(looks.scenes) if all(thing.colour != NONE for thing in things)]
    optimizer = torch.optim.Adam([weight], lr=RATE)
    outside = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    outside[rows] = False
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
        optimizer.zero_grad()
        rng = np.random.default_rng((77, step))
        for number, kinds, asked, (least, most), share in MIXTURE:
            chosen = rng.choice(named, min(number, len(named)), replace=False).tolist()
            loss = _loss(looking, rng, looks.take(chosen), kinds, asked, int(rng.integers(least, most + 1)))
            (gradient,) = torch.autograd.grad(share * loss, [weight])
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
        weight.grad[outside] = 0
        optimizer.step()


def _loss(
    looking: Looking, rng: np.random.Generator, looks: Looks, kinds: dict[str, float], asked: int, groups: int
) -> Tensor:
    lesson = Lesson(looking, rng, Price(0.0), 0.0)
    rows = lesson.ask(looks, kinds, asked, False, groups)
    with torch.no_grad():
        weighed = looking.weigh(rows)
        choice, cells = looking.choose(rows, weighed, weighed.cells, 0.0)
        outputs = looking.read(rows, choice, cells, groups)
    return looking.answer(outputs, rows.questions)[0].mean()
