"""Losses on the Q-Former's outputs, under random budgets of vision tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Blip2ForConditionalGeneration

from build_engines.model.allocation import CELL_COUNT, Allocation, cells_of
from build_engines.model.allocator import EXPLORE
from build_engines.train.course import Measures
from build_engines.train.stages import tensor
from build_engines.train.vision import HEADS, IGNORED

Look = Callable[[Tensor, Tensor, Tensor], Tensor]
MOST_TOKENS = 257


class SlotReadout(nn.Module):
    """Read each query's cell: filled or not, the place, and the attributes. For training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.splits = [1, 3, *HEADS.values()]
        self.readout = nn.Linear(width, sum(self.splits))

    def forward(self, queries: Tensor) -> dict[str, Tensor]:
        """[B, 32, D] -> logits and places, each [B, 32, n]."""
        parts = self.readout(queries).split(self.splits, dim=-1)
        return dict(zip(("filled", "place", *HEADS), parts, strict=True))


def slot_loss(read: dict[str, Tensor], slots: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Measures]:
    """The sum of the slots' losses, and measures.

    The measures are accuracy by attribute, and the share of scenes in which every slot's filled flag is right.
    """
    attributes, places, filled = slots
    present = filled.float()
    logits = read["filled"][..., 0]
    loss = 6.0 * functional.binary_cross_entropy_with_logits(logits, present)
    loss = loss + 2.0 * ((read["place"] - places).square().sum(-1) * present).sum() / present.sum().clamp(min=1)
    measures = {"slots": ((logits > 0) == filled).all(-1).float().mean().item()}
    for index, name in enumerate(HEADS):
        truth = attributes[..., index]
        known = truth != IGNORED
        flat = read[name].flatten(0, 1)
        entropy = functional.cross_entropy(flat, truth.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = loss + entropy / known.sum().clamp(min=1)
        counted = known & (truth > 0) if name == "character" else known
        right = (read[name].argmax(-1) == truth) & counted
        measures[f"slot_{name}"] = right.sum().item() / max(1, counted.sum().item())
    return loss, measures


def looker(model: Blip2ForConditionalGeneration) -> Look:
    """(queries [B, 32, D], tokens [B, 257, D], mask [B, 257] int) -> the Q-Former's outputs [B, 32, D]."""

    def look(queries: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        output: Tensor = model.qformer(
            query_embeds=queries, encoder_hidden_states=tokens, encoder_attention_mask=mask
        ).last_hidden_state
        return output

    return look


def refinements(rng: np.random.Generator, number: int) -> Tensor:
    """[B, 1]: refined cells per image. A quarter has all 64 (the plain BLIP-2 input), others any number from 0."""
    drawn = np.where(rng.random(number) < 0.25, CELL_COUNT, rng.integers(0, CELL_COUNT + 1, number))
    return tensor(drawn.astype(np.float32))[:, None]


def allocate(allocation: Allocation, features: Tensor, relevance: Tensor, refined: Tensor) -> tuple[Tensor, Tensor]:
    """features [B, 257, D], patch relevance [B, 256], refined cells [B, 1] -> tokens [B, 257, D], mask [B, 257]."""
    cells = cells_of(relevance).amax(2)
    levels = allocation.levels(cells, refined, torch.full_like(refined, EXPLORE))
    tokens, mask = allocation.pack(features, levels)
    return tokens[:, :MOST_TOKENS], mask[:, :MOST_TOKENS]


def random_relevance(rng: np.random.Generator, coverage: list[np.ndarray]) -> Tensor:
    """[B, 256]: for most images a random choice of objects, as by a question; for a quarter, noise."""
    rows = []
    for shares in coverage:
        noise = rng.random(shares.shape[-1] ** 2).astype(np.float32)
        chosen = np.flatnonzero(rng.random(len(shares)) < rng.uniform(0.2, 1.0))
        if len(chosen) == 0 or rng.random() < 0.25:
            rows.append(noise)
        else:
            rows.append(shares[chosen].max(0).reshape(-1) + 0.05 * noise)
    return tensor(np.stack(rows).astype(np.float32))
