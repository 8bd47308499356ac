"""Test the field's methods of pruning tokens: what they keep, and that the chain reads what was kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks.ablate import main
from benchmarks.ablation.pruning import (
    ATTENTION,
    CDPRUNER,
    DART,
    EVENLY,
    METHODS,
    PIVOTS,
    Candidates,
    Pruned,
    answer_pruned,
    ranked_cells,
)
from build_engines.scenes.held_out import SMALL
from build_engines.train.evaluation import Arm, Chain, Exam, answer, held_out_exam
from tests.support.paths import PROJECT


def some(number: int, *, rows: int = 3, width: int = 6) -> Candidates:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    place = torch.arange(number) * 256 // number
    return Candidates(
        drawn(rows, number, width) - 0.5, drawn(rows, number), drawn(rows, number), place, drawn(rows, number)
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [1, PIVOTS, 12, 256])
def test_a_method_keeps_different_candidates(method, keep):
    kept = METHODS[method](some(256), keep)
    assert kept.shape == (3, keep)
    assert all(len(set(row)) == keep for row in kept.tolist())


@pytest.mark.parametrize("number", [256, 256 + 1024])
def test_even_choice_takes_one_place_of_each_part_of_the_closest_view(number):
    kept = METHODS[EVENLY](some(number, rows=1), 64)[0] - (number - (1024 if number > 256 else 256))
    side = 32 if number > 256 else 16
    parts = (kept // side // (side // 8)) * 8 + kept % side // (side // 8)
    assert sorted(parts.tolist()) == list(range(64))


@pytest.mark.parametrize("method", METHODS)
def test_more_room_takes_nothing_away(method):
    found = some(256)
    more = METHODS[method](found, 20)
    assert torch.equal(METHODS[method](found, 12), more[:, :12])


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-5])
def test_cdpruner_adds_what_makes_the_determinant_greatest(share: float):
    """As well where one candidate is relevant and all others have only this share of its relevance."""
    found, keep = some(12, rows=1), 6
    found.relevance[:, 1:] *= share
    unit = functional.normalize(found.tokens[0].double(), dim=1)
    relevance = found.relevance[0].double()
    weight = (relevance - relevance.min()) / (relevance.max() - relevance.min()) + 1e-6
    kernel = weight[:, None] * (unit @ unit.T) * weight
    chosen: list[int] = []
    for _ in range(keep):
        others = [i for i in range(12) if i not in chosen]
        chosen.append(max(others, key=lambda i: torch.det(kernel[[*chosen, i]][:, [*chosen, i]]).item()))
    assert METHODS[CDPRUNER](found, keep)[0].tolist() == chosen


def test_cdpruner_takes_the_most_relevant_once_nothing_new_is_left():
    found = some(10, rows=1, width=2)
    kept = METHODS[CDPRUNER](found, 6)[0].tolist()
    left = [i for i in found.relevance[0].argsort(descending=True).tolist() if i not in kept[:2]]
    assert kept[2:] == left[:4]


def test_dart_keeps_pivots_and_what_is_least_like_them():
    found = some(30, rows=1)
    kept = METHODS[DART](found, PIVOTS + 1)[0].tolist()
    tokens = found.tokens[0]
    assert kept[:PIVOTS] == tokens.abs().sum(1).argsort(descending=True)[:PIVOTS].tolist()
    others = [i for i in range(30) if i not in kept[:PIVOTS]]
    assert kept[PIVOTS] == min(
        others, key=lambda i: functional.cosine_similarity(tokens[kept[0]], tokens[i], dim=0).item()
    )


def test_attention_keeps_what_is_attended_to():
    found = some(20, rows=1)
    assert METHODS[ATTENTION](found, 4)[0].tolist() == found.attention[0].argsort(descending=True)[:4].tolist()


def test_a_cell_is_ranked_by_its_first_candidate():
    order = torch.tensor([[3, 0, 2]])
    place = torch.tensor([0, 1, 20, 255])  # patches: two of the first cell, one of the third, one of the last
    cells = ranked_cells(order, place)[0]
    assert cells.nonzero()[:, 0].tolist() == [0, 2, 63]
    assert cells[63] == 1
    assert cells[0] == pytest.approx(2 / 3)


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain.load(PROJECT / "reference")


@pytest.fixture(scope="module")
def exam(chain: Chain) -> Exam:
    return held_out_exam(chain, SMALL, 2, closely=True, first=30_000)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_all_patches_kept_read_as_all_patches(chain, exam, method):
    every = answer(chain, exam, Arm(vision_tokens=(256, 256)))
    pruned = answer_pruned(chain, exam, Pruned(method, 256))
    assert (pruned.vision_tokens == 256).all()
    assert np.array_equal(pruned.right, every.right)


@pytest.mark.slow
def test_the_first_question_decides_for_all_if_it_prunes_once(chain, exam):
    once = answer(chain, exam, Arm(vision_tokens=(64, 400), closer=True, once=True))
    own = answer(chain, exam, Arm(vision_tokens=(64, 400), closer=True))
    for scene in (0, 1):
        rows = once.scenes == scene
        assert (once.levels[rows] == own.levels[rows][0]).all()
        assert len(np.unique(own.levels[rows], axis=0)) > 1
    pruned = answer_pruned(chain, exam, Pruned(CDPRUNER, 80, closer=True, once=True))
    first = answer_pruned(chain, exam, Pruned(CDPRUNER, 80, closer=True))
    starts = [int(np.argmax(once.scenes == scene)) for scene in (0, 1)]
    assert pruned.right[starts].tolist() == first.right[starts].tolist()


@pytest.mark.slow
def test_the_command_compares_all_methods(tmp_path: Path):
    main(["--rivals", "--kept", str(tmp_path / "kept"), "--out", str(tmp_path), "--scenes", "1", "--small-print", "1"])
    found = json.loads((tmp_path / "rivals.json").read_text())
    for by_tokens in found["same_tokens"].values():
        for tokens, each in by_tokens.items():
            forms = 1 if tokens == "64" else 2
            assert len(each["accuracy"]) == 1 + forms * len(METHODS)
            assert each["best_rival"] in each["accuracy"]
            means = [row["mean_vision_tokens"] for row in each["accuracy"].values()]
            assert max(means) <= int(tokens)
            assert min(means) > int(tokens) - 15
    assert set(found["many_questions"]) == set(found["scenes"])
    for each in found["many_questions"].values():  # an arm is kept under its name, which must tell its tokens
        own, *_ = each["accuracy"].values()
        assert f", {round(own['mean_vision_tokens'])} tokens, once" in list(each["accuracy"])[-1]
