"""The quadtree: budgets, determinism, monotony and packing, over random relevance."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from build_engines.model.allocation import CELL_COUNT, MAX_VISION_TOKENS, Allocation, cells_of, rank, spread_turns

ALLOCATION = Allocation()
RELEVANCE = npst.arrays(np.float32, (1, CELL_COUNT), elements=st.sampled_from([0.0, 0.1, 0.5, 0.5001, 0.9, 1.0]))
SHARE = st.sampled_from([0.0, 0.25, 0.5, 1.0])


def levels(relevance: np.ndarray, refinements: int, explore: float = 0.25) -> torch.Tensor:
    asked = torch.tensor([[float(refinements)]])
    return ALLOCATION.levels(torch.from_numpy(relevance), asked, torch.tensor([[explore]]))


@given(RELEVANCE, st.integers(0, CELL_COUNT), SHARE)
@settings(max_examples=60, deadline=None)
def test_refines_exactly_as_many_cells_as_asked(relevance, refinements, explore):
    assert int(levels(relevance, refinements, explore).sum()) == refinements


@given(RELEVANCE, st.integers(0, CELL_COUNT - 1), SHARE)
@settings(max_examples=60, deadline=None)
def test_more_budget_never_takes_detail_from_a_cell(relevance, refinements, explore):
    fewer, more = levels(relevance, refinements, explore), levels(relevance, refinements + 1, explore)
    assert bool((more >= fewer).all())


@given(RELEVANCE, st.integers(0, CELL_COUNT))
@settings(max_examples=30, deadline=None)
def test_without_exploring_the_most_relevant_cells_are_refined(relevance, refinements):
    chosen = levels(relevance, refinements, 0.0)[0].bool().numpy()
    if 0 < refinements < CELL_COUNT:
        assert relevance[0][chosen].min() >= relevance[0][~chosen].max()


def test_exploring_alone_ignores_relevance_and_covers_every_quadrant():
    chosen = levels(np.linspace(1, 0, CELL_COUNT, dtype=np.float32)[None], 16, 1.0).reshape(8, 8)
    quadrants = [chosen[:4, :4], chosen[:4, 4:], chosen[4:, :4], chosen[4:, 4:]]
    assert [int(quadrant.sum()) for quadrant in quadrants] == [4, 4, 4, 4]


def test_spread_turns_visits_every_cell_once():
    assert sorted(spread_turns().tolist()) == list(range(CELL_COUNT))


def test_rank_breaks_ties_by_index():
    assert rank(torch.tensor([[0.5, 0.9, 0.5]])).tolist() == [[1.0, 0.0, 2.0]]


@pytest.mark.parametrize("refinements", [0, 1, 17, 64])
def test_packs_cls_then_each_cells_tokens_then_padding(refinements):
    torch.manual_seed(0)
    features = torch.randn(2, 257, 5)
    chosen = torch.zeros(2, CELL_COUNT, dtype=torch.long)
    chosen[:, :refinements] = 1
    tokens, mask = ALLOCATION.pack(features, chosen)
    by_cell = cells_of(features[:, 1:])
    expected = [features[:, :1]]
    for cell in range(CELL_COUNT):
        expected.append(by_cell[:, cell] if chosen[0, cell] else by_cell[:, cell].mean(1, keepdim=True))
    expected = torch.cat(expected, dim=1)
    assert tokens.shape == (2, MAX_VISION_TOKENS + 1, 5)
    assert expected.shape[1] == 65 + 3 * refinements
    assert torch.allclose(tokens[:, : expected.shape[1]], expected)
    assert mask.sum(1).tolist() == [expected.shape[1]] * 2
    assert bool((mask[:, : expected.shape[1]] == 1).all())


def test_full_detail_is_plain_blip2():
    features = torch.randn(1, 257, 3)
    tokens, _ = ALLOCATION.pack(features, torch.ones(1, CELL_COUNT, dtype=torch.long))
    ours = {tuple(row) for row in tokens[0, :257].tolist()}
    assert ours == {tuple(row) for row in features[0].tolist()}


def test_permuting_the_batch_permutes_the_result():
    relevance, features = torch.rand(4, CELL_COUNT), torch.randn(4, 257, 3)
    refinements, explore, order = torch.tensor([[3.0], [20.0], [40.0], [64.0]]), torch.full((4, 1), 0.25), [2, 0, 3, 1]
    straight = ALLOCATION.pack(features, ALLOCATION.levels(relevance, refinements, explore))
    mixed = ALLOCATION.pack(features[order], ALLOCATION.levels(relevance[order], refinements[order], explore[order]))
    assert torch.equal(straight[0][order], mixed[0])
    assert torch.equal(straight[1][order], mixed[1])
