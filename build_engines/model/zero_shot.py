"""Participatory knowing without training: what InstructBLIP's Q-Former looks at once it has read the question."""

from __future__ import annotations

from torch import Tensor, nn

from build_engines.model.qformer import InstructQFormer


class QFormerKnowing(nn.Module):
    """Score each patch by the attention that the checkpoint's own queries give it.

    The queries exchange with the question's words before every cross-attention, so that the attention depends on the
    question. It runs the Q-Former once more, on the full view.
    """

    def __init__(self, qformer: InstructQFormer) -> None:
        super().__init__()
        self.qformer = qformer

    def forward(self, features: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """features [B, 257, D], CLS first; ids and mask int32 [B, 32] -> relevance [B, 256] in [0, 1]."""
        share = self.qformer.attention(features, (question_ids, question_mask))[:, 1:]
        return share / share.amax(1, keepdim=True).clamp(min=1e-9)
