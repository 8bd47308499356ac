"""Loss and accuracy of the decoder on packed questions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import OPTForCausalLM

from build_engines.train.packing import Pack, Row

Decode = Callable[[Tensor, Tensor, Tensor], Tensor]


def decoder_of(language: OPTForCausalLM) -> Decode:
    """(prefix and text embeddings [B, 288, H], mask [B, 1, 288, 288] additive, positions [B, 288]) -> [B, 288, H]."""
    decoder = language.model.decoder

    def decode(embeddings: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        hidden: Tensor = decoder(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        return hidden

    return decode


def answer_states(
    language: OPTForCausalLM, decode: Decode, prefix: Tensor, pack: Pack
) -> tuple[Tensor, Tensor, Tensor]:
    """The states from which the n tokens of all answers are told, float32 [n, H], and each one's row and column."""
    table = language.model.decoder.embed_tokens.weight
    embeddings = torch.cat([prefix, functional.embedding(pack.ids, table)], dim=1)
    mask = torch.where(pack.mask, 0.0, -1e4)
    hidden = decode(embeddings, mask, pack.positions)[:, prefix.shape[1] :]
    rows, columns = torch.nonzero(pack.targets != -100, as_tuple=True)
    return hidden[rows, columns].float(), rows, columns


def answer_loss(
    language: OPTForCausalLM, decode: Decode, prefix: Tensor, pack: Pack
) -> tuple[Tensor, dict[str, float], dict[str, int]]:
    """Mean over questions of the answers' cross-entropy.

    Also returns exact matches under teacher forcing, and numbers of questions, both by type. Teacher-forced exact match
    equals greedy exact match: the first wrong token is wrong in both.
    """
    states, rows, columns = answer_states(language, decode, prefix, pack)
    truth = pack.targets[rows, columns]
    logits = functional.linear(states, language.model.decoder.embed_tokens.weight)
    entropy = functional.cross_entropy(logits, truth, reduction="none")
    # A long answer (a description) counts as a few short ones, not as sixty.
    questions = torch.stack([rows, pack.owner[rows, columns]])
    _, group, lengths = torch.unique(questions, dim=1, return_inverse=True, return_counts=True)
    weights = lengths[group].float().pow(-0.6)
    loss = (entropy * weights).sum() / weights.sum()
    wrong = entropy.new_zeros(len(lengths)).index_add_(0, group, (logits.argmax(-1) != truth).float())
    right: dict[str, float] = defaultdict(float)
    number: dict[str, int] = defaultdict(int)
    # torch.unique sorts its columns by image, then by question: the order of pack.kept.
    for question, errors in zip([q for kept in pack.kept for q in kept], wrong.tolist(), strict=True):
        right[question.type] += errors == 0
        number[question.type] += 1
    return loss, right, number


def row_losses(language: OPTForCausalLM, decode: Decode, prefix: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """Score each row after its prefix [B, P, H].

    Returns the mean cross-entropy of the answer's tokens, float [B], and whether the answer is exactly right under
    teacher forcing, bool [B].
    """
    table = language.model.decoder.embed_tokens.weight
    embeddings = torch.cat([prefix, functional.embedding(row.ids, table)], dim=1)
    hidden = decode(embeddings, torch.where(row.mask, 0.0, -1e4), row.positions)[:, prefix.shape[1] :]
    rows, columns = torch.nonzero(row.targets != -100, as_tuple=True)
    truth = row.targets[rows, columns]
    logits = functional.linear(hidden[rows, columns].float(), table.float())
    entropy = functional.cross_entropy(logits, truth, reduction="none")
    zero = entropy.new_zeros(len(prefix))
    number = zero.index_add(0, rows, torch.ones_like(entropy))
    wrong = zero.index_add(0, rows, (logits.argmax(-1) != truth).to(zero))
    return zero.index_add(0, rows, entropy) / number, wrong == 0
