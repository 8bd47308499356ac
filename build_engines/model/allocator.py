"""The relevance allocator: find what matters for a question and choose vision tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from build_engines.model.allocation import GROUP, PATCH_COUNT, Allocation, cells_of
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.closer import CloserView
from build_engines.model.focus import FocusRegions, query_groups
from build_engines.model.knowing import ParticipatoryKnowing, mean_meaning, perspectival
from build_engines.model.zero_shot import QFormerKnowing

EXPLORE = 0.25  # share of the refinements spread evenly over the grid if no balancing is trained
WITHOUT_QUESTION = (
    (0.5, 0.5, 0.0),
    (1.0, EXPLORE, 0.0),
)  # weights and tensions; particularize 1 spends the whole budget
ZERO_SHOT = ((0.0, 0.0, 1.0), (1.0, EXPLORE, 0.0))
WITHOUT_BALANCE = ((0.0, 0.0, 1.0), (0.25, EXPLORE, 0.0))


class Weighed(NamedTuple):
    """What matters in each image for its question, before any token is chosen."""

    relevance: Tensor  # [B, 256] in [0, 1]
    scores: Tensor  # [B, 3, 256] in [0, 1]: propositional, perspectival, participatory
    weights: Tensor  # [B, 3]
    tensions: Tensor  # [B, 3] in [0, 1]: particularize, explore, diversify

    @property
    def cells(self) -> Tensor:
        """Relevance of each cell, [B, 64]: that of its most relevant patch."""
        return cells_of(self.relevance).amax(2)


class Spent(NamedTuple):
    """The tokens, query groups and levels that the budget pays for."""

    vision_tokens: Tensor  # [B, 1 + N, D]; N is the maximum, 256, or 400 with a closer view
    vision_mask: Tensor  # int32 [B, 1 + N]
    query_groups: Tensor  # int32 [B, 1]
    levels: Tensor  # int32 [B, 64]


class RelevanceAllocator(nn.Module):
    """Choose the vision tokens of each image for its question, within a budget.

    Inputs: features [B, 257, D], saliency [B, 256], entropy [B, 256], texture [B, 13, 16, 16], question_ids int32 [B,
    32], question_mask int32 [B, 32], budget int32 [B, 4] (least and most vision tokens, least and most visual tokens).
    With a closer view, also its detail_features [B, 1024, D].

    Outputs: vision_tokens [B, 1 + N, D] and vision_mask int32 [B, 1 + N] (0 = padding, 1 = token, 2 to 4 = token that a
    focus region also reads), N 256 or with a closer view 400; query_groups int32 [B, 1], relevance [B, 256] in [0, 1],
    scores [B, 3, 256] in [0, 1] (propositional, perspectival, participatory), levels int32 [B, 64], tensions [B, 3] in
    [0, 1] (particularize, explore, diversify).

    A part that is not trained is None. Without participatory knowing (a plain BLIP-2 checkpoint), the relevance is the
    mean of the other two maps and the whole budget is spent. Without balancing, the relevance is the participatory map
    alone, and a quarter of the range from least to most is spent. With zero_shot instead of participatory knowing, the
    relevance is its map, and the whole budget is spent.
    """

    def __init__(
        self,
        participatory: ParticipatoryKnowing | None,
        balancing: OpponentProcessing | None = None,
        closer: CloserView | None = None,
        zero_shot: QFormerKnowing | None = None,
        queries: int = GROUP,
    ) -> None:
        """`queries` are the visual tokens of one group.

        Raises ValueError for balancing without participatory knowing, whose word vectors it reads."""
        super().__init__()
        if balancing is not None and participatory is None:
            raise ValueError("balancing reads the question by participatory knowing: give participatory too")
        self.participatory = participatory
        self.balancing = balancing
        self.closer = closer
        self.zero_shot = zero_shot
        self.queries = queries
        self.allocation = Allocation()
        self.focus = FocusRegions()

    def forward(
        self, features: Tensor, saliency: Tensor, entropy: Tensor, texture: Tensor, question_ids: Tensor,
        question_mask: Tensor, budget: Tensor, detail_features: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Raises ValueError for detail_features if there is no closer view."""
        weighed = self.weigh(features, saliency, entropy, texture, question_ids, question_mask)
        spent = self.spend(features, weighed, budget, detail_features)
        return (
            spent.vision_tokens, spent.vision_mask, spent.query_groups, weighed.relevance, weighed.scores,
            spent.levels, weighed.tensions,
        )  # fmt: skip

    def weigh(
        self, features: Tensor, saliency: Tensor, entropy: Tensor, texture: Tensor, question_ids: Tensor,
        question_mask: Tensor,
    ) -> Weighed:  # fmt: skip
        """Compute relevance and tensions: every trained part except the closer view."""
        if self.zero_shot is not None:
            known = self.zero_shot(features, question_ids, question_mask)
            return self.from_known(entropy, perspectival(saliency, texture), known)
        places = None if self.participatory is None else self.participatory.places(features)
        return self.balance(entropy, perspectival(saliency, texture), places, question_ids, question_mask)

    def balance(
        self, proposition: Tensor, perspective: Tensor, places: Tensor | None, question_ids: Tensor,
        question_mask: Tensor,
    ) -> Weighed:  # fmt: skip
        """`weigh` from two maps [B, 256] and `ParticipatoryKnowing.places`, which several questions can share."""
        if self.participatory is None or places is None:
            scores = torch.stack([proposition, perspective, torch.zeros_like(proposition)], dim=1)
            weights, tensions = _fixed(WITHOUT_QUESTION, scores)
        else:
            meanings = self.participatory.meanings(question_ids, question_mask)
            participation = torch.sigmoid(self.participatory.coupling(places, meanings, question_mask))
            scores = torch.cat([proposition, perspective, participation], dim=1).unflatten(1, (3, PATCH_COUNT))
            if self.balancing is None:
                weights, tensions = _fixed(WITHOUT_BALANCE, scores)
            else:
                weights, tensions = self.balancing(scores, mean_meaning(meanings, question_mask))
        return _weighed(scores, weights, tensions)

    def from_known(self, proposition: Tensor, perspective: Tensor, known: Tensor) -> Weighed:
        """`weigh` with a participatory map [B, 256] from zero_shot."""
        scores = torch.stack([proposition, perspective, known], dim=1)
        return _weighed(scores, *_fixed(ZERO_SHOT, scores))

    def detail(self, features: Tensor, detail_features: Tensor | None) -> Tensor | None:
        """Every token of the closer view, [B, 1024, D], or None without detail_features.

        Raises ValueError for detail_features if there is no closer view.
        """
        if detail_features is None:
            return None
        if self.closer is None:
            raise ValueError("this allocator has no closer view: leave detail_features out")
        tokens: Tensor = self.closer(features, detail_features)
        return tokens

    def spend(self, features: Tensor, weighed: Weighed, budget: Tensor, detail_features: Tensor | None = None) -> Spent:
        """Spend the budget. Raises ValueError for detail_features if there is no closer view."""
        if detail_features is not None and self.closer is None:
            raise ValueError("this allocator has no closer view: leave detail_features out")
        closer, particularize = detail_features is not None, weighed.tensions[:, :1]
        groups = query_groups(particularize, budget, self.queries)
        regions = self.focus(weighed.cells)
        extra = self.allocation.extra(particularize, budget, closer)
        levels = self.allocation.spend(weighed.cells, weighed.tensions, extra, regions.peaks, closer)
        tokens, mask = self.allocation.pack(features, levels, regions.read_by(groups), detail_features, self.closer)
        return Spent(tokens, mask, groups, levels.int())


def _weighed(scores: Tensor, weights: Tensor, tensions: Tensor) -> Weighed:
    # The weights sum to 1 except for rounding.
    return Weighed((weights.unsqueeze(2) * scores).sum(1).clamp(0.0, 1.0), scores, weights, tensions)


def _fixed(balance: tuple[tuple[float, ...], tuple[float, ...]], scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same weights and tensions, each [B, 3], for every row."""
    weights, tensions = (scores.new_tensor(values).expand(scores.shape[0], -1) for values in balance)
    return weights, tensions
