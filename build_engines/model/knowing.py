"""The three ways of knowing, each a map in [0, 1] on the 16x16 grid.

Propositional knowing is the luminance entropy, which the vision encoder's graph computes (`texture.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from build_engines.model.texture import CHANNELS


def perspectival(saliency: Tensor, texture: Tensor) -> Tensor:
    """What stands out: mean of CLS saliency [B, 256] and Sobel magnitude, each over its maximum in the image."""
    magnitude = texture[:, CHANNELS.index("sobel_magnitude")].flatten(1)
    return (_over_greatest(saliency) + _over_greatest(magnitude)) / 2


def _over_greatest(score: Tensor) -> Tensor:
    return score / score.amax(1, keepdim=True).clamp(min=1e-6)


def _unit(vectors: Tensor) -> Tensor:
    """Scale vectors along the last axis to length 1. `functional.normalize` would export the lengths expanded."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=1e-12)


class ParticipatoryKnowing(nn.Module):
    """Score what this question is about by coupling its words with the patches.

    Late interaction (as in ColBERT): a patch is as relevant as the question position that fits it best. A position sees
    itself and both neighbours, so that "red circle" is one meaning and not two. There are no position embeddings: what
    a question is about does not depend on where in the question it is said.
    """

    def __init__(self, vocabulary: int, width: int, token_width: int = 64, coupling_width: int = 96) -> None:
        """width: of the vision features. coupling_width: of the space that words and patches share."""
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

    @property
    def coupling_width(self) -> int:
        return self.meaning.out_channels

    def meanings(self, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """ids and mask [B, 32] of the bare question without BOS -> one unit vector a position, [B, 32, C]."""
        valid = question_mask.to(self.tokens.weight.dtype)
        words = self.tokens(question_ids) * valid[..., None]
        hidden = functional.relu(self.phrase(words.transpose(1, 2))) * valid[:, None]
        return _unit(self.meaning(hidden).transpose(1, 2))

    def places(self, features: Tensor) -> Tensor:
        """features [B, 257, D], CLS first -> one unit vector a patch, [B, 256, C]."""
        hidden = functional.relu(self.patch_hidden(self.patch_norm(features[:, 1:])))
        return _unit(self.patch(hidden))

    def coupling(self, places: Tensor, meanings: Tensor, question_mask: Tensor) -> Tensor:
        """places [B, 256, C]; meanings [B, 32, C]; mask [B, 32] -> logits of relevance [B, 256]."""
        valid = question_mask.to(places.dtype)
        fit = places @ meanings.transpose(1, 2) - 2.0 * (1.0 - valid[:, None])  # a cosine, or at most -1 for padding
        return self.scale * fit.amax(dim=-1) + self.bias

    def logits(self, features: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """features [B, 257, D], CLS first; ids and mask [B, 32] of the bare question without BOS -> [B, 256]."""
        return self.coupling(self.places(features), self.meanings(question_ids, question_mask), question_mask)

    def forward(self, features: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """Relevance in [0, 1], [B, 256]: the sigmoid of `logits`."""
        return torch.sigmoid(self.logits(features, question_ids, question_mask))


def mean_meaning(meanings: Tensor, question_mask: Tensor) -> Tensor:
    """The meaning of the whole question, [B, C]: mean over its real positions; zero without a question."""
    valid = question_mask.to(meanings.dtype)
    return (meanings * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1.0)
