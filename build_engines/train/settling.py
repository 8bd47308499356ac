"""The end of the stage `allocator`: what particularize says is settled on measured losses and on what is relevant.

Its straight-through gradient is noisy: whether a question wants more tokens shows in hundredths of a nat, and a step
sees a dozen guided questions. With everything else trained, thousands of questions are answered at several budgets
each, and opponent processing learns to spend where the tokens lower the loss by more than their price. Returns diminish
in the same way for all: loss = a - gain * h(share), h(s) = (1 - exp(-s / KNEE)) / (1 - exp(-1 / KNEE)), with each
question's gain by least squares. (Straight lines between the budgets were tried: their slopes are noise.)

On plain scenes most gains are smaller than what thousands of questions can tell from zero. There a prior decides: each
cell that participatory knowing finds relevant gets its four patches, and what nobody asks about does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from build_engines.model.allocation import CELL_COUNT, MOST_TOKENS, REFINEMENT_COST, cells_of
from build_engines.model.balancing import WAYS, OpponentProcessing

SHARES = (0.0, 0.15, 0.4, 1.0)  # of what lies between the least and the most tokens
KNEE = 0.25  # of the room: by here most of the gain is had
MOST_LOSS = 1.0  # nats; a worse answer counts as this, so that no few questions decide
STEPS, RATE, DECAY = 600, 1e-2, 0.01
PRICE = 0.01  # nats for ROOM tokens: what a gain of about one point of accuracy is worth
PRIOR = 0.3  # nats for a whole room more or less than the prior, squared
RELEVANT = 0.5  # of participatory knowing, from which on a cell is worth its patches
HELD = 1.0  # how firmly weights, explore and diversify stay where they were, per squared logit
PARTICULARIZE = WAYS  # its row among the outputs: the weights come first
ROOM = MOST_TOKENS - CELL_COUNT  # tokens that the price is for


@dataclass
class Curves:
    """R questions and what they lose: scores [R, 3, 256] and meanings [R, C] as `OpponentProcessing` reads them, losses
    [R, len(SHARES)], room [R] tokens between least and most, kinds [R] of question, and where (closely bool [R])."""

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
    """h of the module's text: 0 at 0, 1 at 1, steep first."""
    return (1 - torch.exp(-share / KNEE)) / (1 - math.exp(-1 / KNEE))


def gains(losses: Tensor) -> Tensor:
    """Losses at SHARES [R, K] -> what the whole room gains each question, nats [R], negative where it hurts."""
    shape = returns(losses.new_tensor(SHARES))
    shape = shape - shape.mean()
    return -(losses.clamp(max=MOST_LOSS) @ shape) / shape.square().sum()


def needed(scores: Tensor) -> Tensor:
    """The prior, [R] in [0, 1]: the share of the room that gives every relevant cell of [R, 3, 256] its patches."""
    relevant = cells_of(scores[:, 2]).amax(2) >= RELEVANT
    return (REFINEMENT_COST * relevant.float().sum(1) / ROOM).clamp(max=1.0)


def settle(balancing: OpponentProcessing, curves: Curves) -> None:
    """Trains `balancing` in place; the weights, explore and diversify stay what they were."""
    gain, prior = gains(curves.losses), needed(curves.scores)
    with torch.no_grad():  # what training left of particularize is forgotten
        balancing.out.weight[PARTICULARIZE] = 0
        balancing.out.bias[PARTICULARIZE] = torch.logit(prior.mean(), eps=1e-3)
    before = _logits(balancing, curves).detach()
    number = int(curves.kinds.max()) + 1
    # Every kind of question counts alike, apart on plain scenes and on those with a closer view.
    group = curves.kinds + number * curves.closely.long()
    weight = 1.0 / torch.bincount(group, minlength=2 * number).clamp(min=1).float()[group]
    weight = weight / weight.sum()
    optimizer = torch.optim.AdamW(balancing.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(STEPS):
        for options in optimizer.param_groups:
            options["lr"] = RATE * (1 - step / STEPS)
        said = _logits(balancing, curves)
        particularize = torch.sigmoid(said[:, PARTICULARIZE])
        moved = (said - before).square()
        held = moved.sum(1) - moved[:, PARTICULARIZE]
        cost = PRICE * particularize * curves.room / ROOM - gain * returns(particularize)
        cost = cost + PRIOR * (particularize - prior).square()
        optimizer.zero_grad()
        ((cost * weight).sum() + HELD * held.mean()).backward()
        optimizer.step()


def _logits(balancing: OpponentProcessing, curves: Curves) -> Tensor:
    weights, tensions = balancing(curves.scores, curves.meanings)
    return torch.cat([weights.clamp(min=1e-6).log(), torch.logit(tensions, eps=1e-6)], dim=1)
