"""Participatory knowing: what this question is about, from the coupling of its words with the patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class ParticipatoryKnowing(nn.Module):
    """Late interaction (as in ColBERT): each patch is as relevant as the question position that it fits best.

    A position sees itself and both neighbours, so that "red circle" is one meaning and not two. There are no position
    embeddings: what a question is about does not depend on where in it that is said.
    """

    def __init__(self, vocabulary: int, width: int, token_width: int = 64, coupling_width: int = 96) -> None:
        """width: of the vision features. coupling_width: of the space in which words and patches meet."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, token_width)
        self.phrase = nn.Conv1d(token_width, 2 * coupling_width, kernel_size=3, padding=1)
        self.meaning = nn.Conv1d(2 * coupling_width, coupling_width, kernel_size=3, padding=1)
        self.patch_norm = nn.LayerNorm(width)
        self.patch_hidden = nn.Linear(width, 2 * coupling_width)
        self.patch = nn.Linear(2 * coupling_width, coupling_width)
        self.scale = nn.Parameter(torch.tensor(12.0))
        self.bias = nn.Parameter(torch.tensor(-5.0))
        nn.init.normal_(self.tokens.weight, std=0.5)

    def logits(self, features: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """features [B, 257, D], CLS first; ids and mask [B, 32] of the bare question without BOS. -> [B, 256]."""
        valid = question_mask.to(features.dtype)
        words = self.tokens(question_ids) * valid[..., None]
        hidden = functional.relu(self.phrase(words.transpose(1, 2))) * valid[:, None]
        meanings = functional.normalize(self.meaning(hidden).transpose(1, 2), dim=-1)  # [B, 32, C]
        patches = functional.relu(self.patch_hidden(self.patch_norm(features[:, 1:])))
        patches = functional.normalize(self.patch(patches), dim=-1)  # [B, 256, C]
        fit = patches @ meanings.transpose(1, 2) - 2.0 * (1.0 - valid[:, None])  # a cosine, or at most -1 for padding
        return self.scale * fit.amax(dim=-1) + self.bias

    def forward(self, features: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """As `logits`, then relevance in [0, 1], [B, 256]."""
        return torch.sigmoid(self.logits(features, question_ids, question_mask))
