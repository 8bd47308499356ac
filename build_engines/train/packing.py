"""Pack questions for the decoder: many after one image, or one a row.

Questions after one image cannot see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from build_engines.scenes.questions import Question
from build_engines.train.architecture import QUERIES
from build_engines.train.stages import tensor
from build_engines.train.tokens import EOS, PAD, PROMPT

TEXT_TOKENS = 256  # per image, shared by its questions


@dataclass
class Pack:
    """Questions packed by image.

    With P visual tokens and T of text, ids and targets are [B, T] int64 (targets are -100 except at answers), positions
    [B, P + T] int64, mask [B, 1, P + T, P + T] bool, True = visible. owner: [B, T] int64, the question's index in its
    image, -1 for padding. kept: each image's questions.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor
    owner: Tensor
    kept: list[list[Question]]


@dataclass
class Row:
    """One question a row after P visual tokens.

    ids and targets [B, T] int64 (targets are -100 except at answers), positions [B, P + T], mask [B, 1, P + T, P + T]
    bool, True = visible.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor
    mask: Tensor


class Packer:
    """Tokenise and pack questions, with a cache of tokenised texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, text_tokens: int = TEXT_TOKENS) -> None:
        self.text_tokens = text_tokens
        self._encode = lru_cache(200_000)(lambda text: tuple(tokenizer.backend_tokenizer.encode(text).ids))
        self._answer = lru_cache(200_000)(
            lambda text: tuple(tokenizer.backend_tokenizer.encode(f" {text}", add_special_tokens=False).ids)
        )

    def pack(self, images: Sequence[Sequence[Question]], prefix: int = QUERIES) -> Pack:
        """Pack the questions of each image after its `prefix` visual tokens. Questions that do not fit are left out."""
        number, length = len(images), self.text_tokens
        ids = np.full((number, length), PAD, np.int64)
        positions = np.zeros((number, length), np.int64)
        targets = np.full((number, length), -100, np.int64)
        owner = np.full((number, length), -1, np.int64)
        kept: list[list[Question]] = []
        for row, questions in enumerate(images):
            used, fitting = 0, []
            for question in questions:
                prompt, answer = self._encode(PROMPT.format(question=question.text)), self._answer(question.answer)
                text = (*prompt, *answer)
                if used + len(text) > length:
                    continue
                end = used + len(text)
                ids[row, used:end] = text
                positions[row, used:end] = np.arange(prefix, prefix + len(text))
                targets[row, used + len(prompt) - 1 : end] = (*answer, EOS)
                owner[row, used:end] = len(fitting)
                used = end
                fitting.append(question)
            kept.append(fitting)
        return Pack(
            tensor(ids),
            tensor(np.concatenate([np.tile(np.arange(prefix), (number, 1)), positions], axis=1)),
            tensor(targets),
            tensor(_mask(owner, prefix)),
            tensor(owner),
            kept,
        )

    def rows(self, questions: Sequence[Question], prefix: int = QUERIES) -> Row:
        """One question a row, padded to the longest, rounded up to a multiple of eight tokens."""
        texts = [
            (self._encode(PROMPT.format(question=question.text)), (*self._answer(question.answer), EOS))
            for question in questions
        ]
        length = -8 * (-max(len(prompt) + len(answer) - 1 for prompt, answer in texts) // 8)
        ids = np.full((len(texts), length), PAD, np.int64)
        targets = np.full((len(texts), length), -100, np.int64)
        for row, (prompt, answer) in enumerate(texts):
            text = (*prompt, *answer[:-1])
            ids[row, : len(text)] = text
            targets[row, len(prompt) - 1 : len(text)] = answer
        positions = np.tile(np.arange(prefix + length), (len(texts), 1))
        causal = np.tri(prefix + length, dtype=bool)[None, None].repeat(len(texts), 0)
        return Row(tensor(ids), tensor(positions), tensor(targets), tensor(causal))


def _mask(owner: np.ndarray, prefix: int) -> np.ndarray:
    """[B, 1, P + T, P + T] bool: causal; a question sees the image and itself, the image only itself."""
    groups = np.concatenate([np.full((len(owner), prefix), -2), owner], axis=1)
    same = groups[:, :, None] == groups[:, None, :]
    image = (groups == -2)[:, None, :]
    causal = np.tri(groups.shape[1], dtype=bool)
    return ((same | image) & causal)[:, None]
