"""The relevance allocator: which parts of this image matter for this question, and the vision tokens that follow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from build_engines.model.allocation import CELL_COUNT, REFINEMENT_COST, Allocation, cells_of
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.model.texture import CHANNELS

EXPLORE = 0.25  # share of the refinements that is spread evenly over the grid
RELEVANT = 0.5  # a cell at or above this is worth its four patches


def perspectival(saliency: Tensor, texture: Tensor) -> Tensor:
    """What stands out: mean of CLS saliency [B, 256] and Sobel magnitude, each over its greatest in the image."""
    magnitude = texture[:, CHANNELS.index("sobel_magnitude")].flatten(1)
    return (_over_greatest(saliency) + _over_greatest(magnitude)) / 2


def _over_greatest(score: Tensor) -> Tensor:
    return score / score.amax(1, keepdim=True).clamp(min=1e-6)


class RelevanceAllocator(nn.Module):
    """features [B, 257, D], saliency [B, 256], entropy [B, 256], texture [B, 13, 16, 16], question_ids int32 [B, 32],
    question_mask int32 [B, 32], budget int32 [B, 4] (least and most vision tokens, least and most visual tokens)

    -> vision_tokens [B, 401, D], vision_mask int32 [B, 401] (0 = padding, 1 = token), query_groups int32 [B, 1],
    relevance [B, 256] in [0, 1], scores [B, 3, 256] in [0, 1] (propositional, perspectival, participatory),
    levels int32 [B, 64], tensions [B, 3] in [0, 1] (particularize, explore, diversify).

    With trained participatory knowing the relevance is its map alone, trained to tell the patches of the objects that
    the question is about. Without it (`participatory=None`: a plain BLIP-2 checkpoint) the relevance is the mean of the
    other two and the whole budget is spent.
    """

    def __init__(self, participatory: ParticipatoryKnowing | None) -> None:
        super().__init__()
        self.participatory = participatory
        self.allocation = Allocation()

    def forward(
        self, features: Tensor, saliency: Tensor, entropy: Tensor, texture: Tensor, question_ids: Tensor,
        question_mask: Tensor, budget: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        proposition, perspective = entropy, perspectival(saliency, texture)
        if self.participatory is None:
            participation = torch.zeros_like(proposition)
            relevance = (proposition + perspective) / 2
        else:
            participation = self.participatory(features, question_ids, question_mask)
            relevance = participation
        scores = torch.stack([proposition, perspective, participation], dim=1)

        cell_relevance = cells_of(relevance).amax(2)  # [B, 64]
        refinements, tensions = self._weigh(cell_relevance, budget)
        levels = self.allocation.levels(cell_relevance, refinements, tensions[:, 1:2])
        vision_tokens, vision_mask = self.allocation.pack(features, levels)
        query_groups = torch.ones_like(budget[:, :1])
        return vision_tokens, vision_mask, query_groups, relevance, scores, levels.int(), tensions

    def _weigh(self, cell_relevance: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        """How many cells to refine, float [B, 1], and the tensions [B, 3]."""
        least = torch.ceil((budget[:, :1].float() - CELL_COUNT) / REFINEMENT_COST).clamp(0, CELL_COUNT)
        most = torch.floor((budget[:, 1:2].float() - CELL_COUNT) / REFINEMENT_COST).clamp(0, CELL_COUNT)
        if self.participatory is None:
            refinements = most
        else:
            relevant = (cell_relevance >= RELEVANT).float().sum(1, keepdim=True)
            wanted = torch.ceil(relevant / (1 - EXPLORE)).clamp(max=CELL_COUNT)
            # The most wins: a range between two possible counts is spent below its least.
            refinements = torch.minimum(torch.maximum(wanted, least), most)
        room = (most - least).clamp(min=1.0)
        particularize = ((refinements - least) / room).clamp(0.0, 1.0)
        explore = torch.full_like(particularize, EXPLORE)
        return refinements, torch.cat([particularize, explore, torch.zeros_like(explore)], dim=1)
