"""Where the whole view is unsure, the teacher looks at the quarter that relevance chooses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from build_engines.adapt.data import Asked
from build_engines.adapt.teacher import LIKELIHOOD, Lessons, Teacher
from build_engines.adapt.train import divergence
from build_engines.model.allocation import GRID, Allocation

UNSURE, SURE = 0.3, 0.95
WHOLE = 9  # the whole view's answer


class Quarters:
    """Stands for the chain: features of quarter k are k, and it answers k. It is sure of all but quarter 3."""

    closer = {0: 0}  # noqa: RUF012  (a test's)

    def take_crops(self, images: list[int]) -> Tensor:
        return torch.arange(4.0)[None, :, None, None].expand(len(images), 4, 257, 8).clone()

    def visual(self, candidates: Tensor, gates: Tensor, owner: Tensor, question: object) -> Tensor:
        return candidates[:, 1:2]

    def answer(self, visual: Tensor, texts: list[str]) -> list[list[int]]:
        return [[round(float(value))] for value in visual[:, 0, 0]]

    def speak(self, visual: Tensor, texts: list[str], answers: list[list[int]]) -> SimpleNamespace:
        return SimpleNamespace(probability=torch.tensor([UNSURE if answer == [3] else SURE for answer in answers]))

    def tensors(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(texts), 32), torch.zeros(len(texts), 32)


def relevance_in(quarter: int | None) -> np.ndarray:
    """[256]: in this quarter, or the same everywhere."""
    grid = np.zeros((GRID, GRID), np.float32) if quarter is not None else np.ones((GRID, GRID), np.float32)
    if quarter is not None:
        grid[8 * (quarter // 2) + 3, 8 * (quarter % 2) + 4] = 1.0
    return grid.reshape(-1)


@pytest.mark.parametrize(
    ("quarter", "image", "sure", "answer"),
    [
        (0, 0, UNSURE, 0),
        (2, 0, UNSURE, 2),
        (3, 0, UNSURE, WHOLE),  # the quarter is not sure either
        (None, 0, UNSURE, WHOLE),  # relevance does not say where
        (2, 0, SURE, WHOLE),
        (2, 1, UNSURE, WHOLE),  # no closer view
    ],
)
def test_unsure_answers_come_from_the_relevant_quarter(
    quarter: int | None, image: int, sure: float, answer: int, tmp_path: Path
) -> None:
    chain = Quarters()
    teacher = Teacher(chain, chain, chain, Allocation(), LIKELIHOOD)  # type: ignore[arg-type]
    before = Lessons([[WHOLE], [WHOLE]], [SURE, sure], [False, False], np.zeros((2, 256), np.float16))
    asked = [Asked(0, "what is it?", ""), Asked(image, "what does it say?", "")]
    relevance = np.stack([relevance_in(1), relevance_in(quarter)])
    after = teacher.look_nearer(asked, chain, before, relevance, tmp_path)  # type: ignore[arg-type]
    assert after.answers == [[WHOLE], [answer]]
    assert after.nearer == [False, answer != WHOLE]
    found = before.with_nearer(tmp_path)  # by a continued training
    assert (found.answers, found.sure, found.nearer) == (after.answers, after.sure, after.nearer)
    assert (found.importance == after.importance).all()
    assert before.answers == [[WHOLE], [WHOLE]]


def test_an_answer_teaches_by_the_probability_of_a_token_however_long_it_is() -> None:
    short = Lessons([[4]], [0.25], [False], np.zeros((1, 256)))
    long = Lessons([[4] * 7], [0.25**4], [False], np.zeros((1, 256)))
    assert short.weight(0) == long.weight(0) == 0.5


def test_divergence_is_least_where_the_odds_are_the_square_of_importance() -> None:
    importance = torch.rand(2, 256, generator=torch.Generator().manual_seed(1)) + 0.1
    odds = importance.square()
    same = odds / (odds + 1)
    assert divergence(same, importance).item() == pytest.approx(0, abs=1e-5)
    assert divergence(same.flip(1), importance).item() > 0.1
