"""Fit particularize at the end of the stage `allocator`, from measured losses and a prior.

The straight-through gradient of particularize is noisy: whether a question needs more tokens shows in hundredths of a
nat, and a step has a dozen guided questions. After all other parts are trained, thousands of questions are answered at
several budgets each. Opponent processing then learns to spend tokens if they lower the loss by more than their price.
Returns diminish in the same way for all questions: loss = a - gain * h(share), h(s) = (1 - exp(-s / KNEE)) / (1 -
exp(-1 / KNEE)). Each question's gain is a least-squares fit. (Straight lines between the budgets were tried: their
slopes are noise.)

On plain scenes most gains are too small to be told from zero by thousands of questions. There a prior decides: each
cell that participatory knowing finds relevant gets its four patches, and other cells do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from build_engines.model.allocation import CELL_COUNT, MOST_TOKENS, REFINEMENT_COST, cells_of
from build_engines.model.balancing import WAYS, OpponentProcessing, quadrant_summaries

SHARES = (0.0, 0.15, 0.4, 1.0)  # of the range from least to most tokens
KNEE = 0.25  # share of the room that yields most of the gain
MOST_LOSS = 1.0  # nats; worse answers count as this, so that a few questions do not decide
STEPS, RATE, DECAY = 600, 1e-2, 0.01
PRICE = 0.01  # nats for ROOM tokens: the worth of about one point of accuracy
PRIOR = 0.3  # nats for a deviation of the whole room from the prior, squared
RELEVANT = 0.5  # participatory relevance from which a cell is worth its patches
HELD = 1.0  # penalty for changes of weights, explore and diversify, per squared logit
PARTICULARIZE = WAYS  # its row among the outputs: the weights come first
ROOM = MOST_TOKENS - CELL_COUNT  # tokens that the price is for


@dataclass
class Curves:
    """R questions and their losses.

    scores [R, 3, 256] and meanings [R, C] are the inputs of `OpponentProcessing`. losses [R, len(SHARES)]; room [R]:
    tokens between least and most; kinds [R]: question types; closely bool [R]: whether with the closer view.
    """

    scores: Tensor
    meanings: Tensor
    losses: Tensor
    room: Tensor
    kinds: Tensor
    closely: Tensor

    @classmethod
    def joined(cls, parts: list[Curves]) -> Curves:
        names = ("scores", "meanings", "losses", "room", "kinds", "closely")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def returns(share: Tensor) -> Tensor:
    """h in the module's docstring: 0 at 0, 1 at 1, steep first."""
    return (1 - torch.exp(-share / KNEE)) / (1 - math.exp(-1 / KNEE))


def gains(losses: Tensor) -> Tensor:
    """Losses at SHARES [R, K] -> gain from the whole room, nats [R]; negative if it hurts."""
    shape = returns(losses.new_tensor(SHARES))
    shape = shape - shape.mean()
    return -(losses.clamp(max=MOST_LOSS) @ shape) / shape.square().sum()


def needed(scores: Tensor) -> Tensor:
    """The prior [R] in [0, 1]: the share of the room that gives each relevant cell its patches.

    scores [R, 3, 256].
    """
    relevant = cells_of(scores[:, 2]).amax(2) >= RELEVANT
    return (REFINEMENT_COST * relevant.float().sum(1) / ROOM).clamp(max=1.0)


def settle(balancing: OpponentProcessing, curves: Curves, steps: int = STEPS) -> None:
    """Train `balancing` in place. The weights, explore and diversify keep their values."""
    gain, prior = gains(curves.losses), needed(curves.scores)
    with torch.no_grad():  # particularize is learned anew
        balancing.out.weight[PARTICULARIZE] = 0
        balancing.out.bias[PARTICULARIZE] = torch.logit(prior.mean(), eps=1e-3)
    summaries = quadrant_summaries(curves.scores)
    before = _logits(balancing, summaries, curves.meanings).detach()
    number = int(curves.kinds.max()) + 1
    # Every kind of question counts equally, separately for plain scenes and those with a closer view.
    group = curves.kinds + number * curves.closely.long()
    weight = 1.0 / torch.bincount(group, minlength=2 * number).clamp(min=1).float()[group]
    weight = weight / weight.sum()
    optimizer = torch.optim.AdamW(balancing.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(steps):
        for options in optimizer.param_groups:
            options["lr"] = RATE * (1 - step / steps)
        said = _logits(balancing, summaries, curves.meanings)
        particularize = torch.sigmoid(said[:, PARTICULARIZE])
        moved = (said - before).square()
        held = moved.sum(1) - moved[:, PARTICULARIZE]
        cost = PRICE * particularize * curves.room / ROOM - gain * returns(particularize)
        cost = cost + PRIOR * (particularize - prior).square()
        optimizer.zero_grad()
        ((cost * weight).sum() + HELD * held.mean()).backward()
        optimizer.step()


def _logits(balancing: OpponentProcessing, summaries: Tensor, meanings: Tensor) -> Tensor:
    weights, tensions = balancing.of(summaries, meanings)
    return torch.cat([weights.clamp(min=1e-6).log(), torch.logit(tensions, eps=1e-6)], dim=1)
