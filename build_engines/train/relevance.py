"""Train participatory knowing on the masks of the objects that an answer depends on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.scenes.questions import Question
from build_engines.train.course import Measures
from build_engines.train.stages import device, tensor

QUESTION_TOKENS = 32
SHOWN = 0.15  # of a patch: with this share or more it matters
COUPLED = 3  # questions per image


def question_tensors(tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 [B, 32]: the bare questions, cut or padded."""
    ids = torch.full((len(questions), QUESTION_TOKENS), tokenizer.pad_token_id)
    mask = torch.zeros(len(questions), QUESTION_TOKENS, dtype=torch.int64)
    for row, question in enumerate(questions):
        encoded = tokenizer.encode(question.text, add_special_tokens=False)[:QUESTION_TOKENS]
        ids[row, : len(encoded)] = torch.tensor(encoded)
        mask[row, : len(encoded)] = 1
    return ids.to(device()), mask.to(device())


def relevance_loss(
    participatory: ParticipatoryKnowing,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    features: Tensor,
    coverage: list[np.ndarray],
    questions: list[list[Question]],
) -> tuple[Tensor, Tensor, Measures]:
    """Binary cross-entropy against the asked objects' patches, for up to three questions an image.

    Also returns the relevance [B, 256] of one of the questions (zero without a question), and recall and precision at
    one half. The encoder gets no gradient from this loss: relevance is read from the features as they are.
    """
    rows, chosen, truth = [], [], []
    for row, asked in enumerate(questions):
        for index in rng.permutation(len(asked))[:COUPLED]:
            rows.append(row)
            chosen.append(asked[index])
            truth.append(coverage[row][list(asked[index].asked)].max(0).reshape(-1))
    ids, mask = question_tensors(tokenizer, chosen)
    logits = participatory.logits(features.detach()[rows], ids, mask)
    target = tensor((np.stack(truth) > SHOWN).astype(np.float32))
    loss = functional.binary_cross_entropy_with_logits(logits, target, pos_weight=logits.new_tensor(2.0))
    said, hit = logits > 0, (logits > 0) & (target > 0)
    relevance = features.new_zeros(len(features), logits.shape[1])
    relevance[rows] = logits.detach().sigmoid()  # the last of an image's questions stays
    measures = {
        "relevance_recall": (hit.sum() / target.sum().clamp(min=1)).item(),
        "relevance_precision": (hit.sum() / said.sum().clamp(min=1)).item(),
    }
    return loss, relevance, measures
