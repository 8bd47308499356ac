"""The quadtree: budgets, determinism, monotony and packing, over random relevance."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from build_engines.model.allocation import (
    CELL_COUNT,
    CELLS,
    DETAIL_COUNT,
    LEFT_OUT,
    MAX_VISION_TOKENS,
    Allocation,
    before,
    cells_of,
    spread_turns,
)
from build_engines.model.closer import CloserView
from build_engines.model.focus import FocusRegions

ALLOCATION, FOCUS = Allocation(), FocusRegions()
RELEVANCE = npst.arrays(np.float32, (1, CELL_COUNT), elements=st.sampled_from([0.0, 0.1, 0.5, 0.5001, 0.9, 1.0]))
SHARE = st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0])
MOST_REFINEMENTS = (MAX_VISION_TOKENS - CELL_COUNT) // 3  # with the closer view
COST = torch.tensor([0, 1, 5])  # refinements of 3 tokens, by level
TOKENS = torch.tensor([1, 4, 16, 0])  # by level; the last is that of -1


def levels(relevance: np.ndarray, refinements: int, explore: float = 0.25, closer: bool = False) -> torch.Tensor:
    asked = torch.tensor([[float(refinements)]])
    return ALLOCATION.levels(torch.from_numpy(relevance), asked, torch.tensor([[explore]]), closer)


@given(RELEVANCE, st.integers(0, CELL_COUNT), SHARE)
@settings(max_examples=60, deadline=None)
def test_refines_exactly_as_many_cells_as_asked(relevance, refinements, explore):
    assert int(levels(relevance, refinements, explore).sum()) == refinements


@given(RELEVANCE, st.integers(0, MOST_REFINEMENTS), SHARE)
@settings(max_examples=60, deadline=None)
def test_a_closer_view_is_refined_within_one_step_of_what_is_asked(relevance, refinements, explore):
    spent = int(COST[levels(relevance, refinements, explore, closer=True)].sum())
    assert refinements - 4 < spent <= refinements


@given(RELEVANCE, st.integers(0, MOST_REFINEMENTS - 1), SHARE, st.booleans())
@settings(max_examples=100, deadline=None)
def test_more_budget_never_takes_detail_from_a_cell(relevance, refinements, explore, closer):
    refinements = refinements if closer else refinements % CELL_COUNT
    fewer, more = (levels(relevance, each, explore, closer) for each in (refinements, refinements + 1))
    assert bool((more >= fewer).all())


@given(RELEVANCE, st.integers(0, MOST_REFINEMENTS), SHARE)
@settings(max_examples=30, deadline=None)
def test_only_cells_more_relevant_than_the_rest_go_deep(relevance, refinements, explore):
    chosen = levels(relevance, refinements, explore, closer=True)[0].numpy()
    if 0 < (chosen == 2).sum() < CELL_COUNT:
        assert relevance[0][chosen == 2].min() >= relevance[0][chosen < 2].max()


@given(st.permutations(range(CELL_COUNT)), st.integers(-3, 4), st.integers(-3, 4), st.integers(0, 60), st.booleans())
@settings(max_examples=30, deadline=None)
def test_moving_relevance_moves_the_levels(order, down, right, refinements, closer):
    grid = np.array(order, np.float32).reshape(1, CELLS, CELLS) / CELL_COUNT
    moved = np.roll(grid, (down, right), axis=(1, 2))
    here, there = (levels(each.reshape(1, -1).copy(), refinements, 0.0, closer) for each in (grid, moved))
    assert torch.equal(here.reshape(1, CELLS, CELLS).roll((down, right), (1, 2)), there.reshape(1, CELLS, CELLS))


@given(RELEVANCE, st.integers(0, MOST_REFINEMENTS), SHARE)
@settings(max_examples=20, deadline=None)
def test_the_same_again(relevance, refinements, explore):
    assert torch.equal(*(levels(relevance.copy(), refinements, explore, closer=True) for _ in range(2)))


@given(RELEVANCE)
@settings(max_examples=30, deadline=None)
def test_diversifying_lowers_the_gain_of_cells_whose_neighbours_come_first(relevance):
    given_relevance = torch.from_numpy(relevance)
    none, some, full = (ALLOCATION.gains(given_relevance, torch.tensor([[share]])) for share in (0.0, 0.5, 1.0))
    assert torch.equal(none, given_relevance)
    assert bool((full >= 0).all() and (full <= some).all() and (some <= none).all())
    first = before(given_relevance)[0].sum(1).argmin()
    assert full[0, first] == none[0, first]  # nothing comes before the most relevant cell


def test_diversifying_refines_the_second_of_two_places_before_the_rest_of_the_first():
    relevance = torch.zeros(1, CELLS, CELLS)
    relevance[0, 1:4, 1:4] = 0.9
    relevance[0, 6, 6] = 0.8
    asked, none = torch.tensor([[8.0]]), torch.tensor([[0.0]])
    chosen = [
        ALLOCATION.levels(ALLOCATION.gains(relevance.flatten(1), torch.tensor([[share]])), asked, none)
        for share in (0.0, 0.5)
    ]
    assert [int(each.reshape(CELLS, CELLS)[6, 6]) for each in chosen] == [0, 1]


@given(st.integers(0, 450), st.integers(0, 450), st.floats(0, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_callers_least_and_most_hold(least, most, particularize, closer):
    ceiling = MAX_VISION_TOKENS if closer else 256
    budget = torch.tensor([[least, most, 32, 32]], dtype=torch.int32)
    extra = ALLOCATION.extra(torch.tensor([[particularize]], dtype=torch.float32), budget, closer)
    spent = CELL_COUNT + 3 * int(ALLOCATION.refinements(extra))
    assert spent <= min(max(most, CELL_COUNT), ceiling)
    assert spent > min(least, most, ceiling) - 3
    if particularize == 1:
        assert spent > min(most, ceiling) - 3


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


def test_of_two_that_are_equal_the_lower_index_comes_before():
    assert before(torch.tensor([[0.5, 0.9, 0.5]])).sum(2).tolist() == [[1.0, 0.0, 2.0]]


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
    assert tokens.shape == (2, 257, 5)
    assert expected.shape[1] == 65 + 3 * refinements
    assert torch.allclose(tokens[:, : expected.shape[1]], expected)
    assert mask.sum(1).tolist() == [expected.shape[1]] * 2
    assert bool((mask[:, : expected.shape[1]] == 1).all())


def test_packs_the_closer_view_and_says_which_region_a_token_is_of():
    class Number(CloserView):
        """Return the numbers of the patch around and of the closer patch."""

        def look(self, around: torch.Tensor, detail: torch.Tensor) -> torch.Tensor:
            return torch.cat([around[..., :1], detail[..., :1]], dim=2)

    features = torch.arange(-1, 256).float().reshape(1, -1, 1).expand(-1, -1, 2)
    details = torch.arange(DETAIL_COUNT).float().reshape(1, -1, 1).expand(-1, -1, 2)
    chosen, regions = torch.zeros(2, 1, CELL_COUNT, dtype=torch.int64)
    chosen[0, [9, 10]] = torch.tensor([2, 1])
    regions[0, [9, 11]] = torch.tensor([1, 3])
    tokens, mask = ALLOCATION.pack(features, chosen, regions.int(), details, Number(2))
    same, _ = ALLOCATION.pack(features, chosen, None, Number(2)(features, details))
    assert torch.equal(same, tokens)
    deep = [(16 * (row // 2) + column // 2, 32 * row + column) for row in range(4, 8) for column in range(4, 8)]
    assert [tuple(row) for row in tokens[0, 10:26].tolist()] == deep
    assert torch.equal(tokens[0, 26:30], cells_of(features[:, 1:])[0, 10])
    assert mask[0].tolist() == [1] * 10 + [2] * 16 + [1] * 4 + [4] + [1] * 52 + [0] * (401 - 83)


def test_full_detail_is_plain_blip2():
    features = torch.randn(1, 257, 3)
    tokens, _ = ALLOCATION.pack(features, torch.ones(1, CELL_COUNT, dtype=torch.long))
    ours = {tuple(row) for row in tokens[0, :257].tolist()}
    assert ours == {tuple(row) for row in features[0].tolist()}


def test_permuting_the_batch_permutes_the_result():
    relevance, features = torch.rand(4, CELL_COUNT), torch.randn(4, 257, 3)
    refinements, explore, order = torch.tensor([[3.0], [20.0], [40.0], [64.0]]), torch.full((4, 1), 0.25), [2, 0, 3, 1]
    details, closer = torch.randn(4, DETAIL_COUNT, 3), CloserView(3)
    chosen = ALLOCATION.levels(relevance, refinements, explore, True)
    straight = ALLOCATION.pack(features, chosen, None, details, closer)
    chosen = ALLOCATION.levels(relevance[order], refinements[order], explore[order], True)
    mixed = ALLOCATION.pack(features[order], chosen, None, details[order], closer)
    assert torch.equal(straight[0][order], mixed[0])
    assert torch.equal(straight[1][order], mixed[1])


TENSIONS = st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.25, 1.0]), st.floats(0, 1))


def spend(
    relevance: np.ndarray, tensions: tuple[float, float, float], extra: float, closer: bool = True
) -> torch.Tensor:
    cells = torch.from_numpy(relevance)
    return ALLOCATION.spend(cells, torch.tensor([tensions]), torch.tensor([[extra]]), FOCUS(cells).peaks, closer)[0]


ONE_PALE_CELL = np.where(np.arange(CELL_COUNT) == 16, np.float32(0), np.float32(1))[None]
PLATEAUS = np.kron(np.array([[1, 0.5, 1, 0.5]] * 4, np.float32), np.ones((2, 2), np.float32)).reshape(1, -1)


@given(RELEVANCE, TENSIONS, st.integers(0, 336))
@example(ONE_PALE_CELL, (1.0, 1.0, 0.0), 0)  # every cell but one ties
@example(PLATEAUS, (1.0, 1.0, 0.0), 0)
@settings(max_examples=100, deadline=None)
def test_cells_left_out_pay_for_detail_and_not_a_token_more(relevance, tensions, extra):
    levels = spend(relevance, tensions, float(extra))
    tokens = int(TOKENS[levels].sum())
    assert extra - 12 < tokens - CELL_COUNT <= extra
    if (levels == LEFT_OUT).any():
        assert tokens == CELL_COUNT + extra  # what refinements leave unspent goes to cells first
        peaks = FOCUS(torch.from_numpy(relevance)).peaks[0].tolist()
        seen = [cell for cell in range(CELL_COUNT) if levels[cell] == 0 and cell not in peaks]
        assert all(levels[peak] > LEFT_OUT for peak in peaks)
        assert not seen or relevance[0][seen].min() >= relevance[0][(levels == LEFT_OUT).numpy()].max()


@given(RELEVANCE, TENSIONS)
@settings(max_examples=40, deadline=None)
def test_nothing_is_left_out_while_the_budget_has_what_the_question_calls_for(relevance, tensions):
    called_for = ALLOCATION.extra(torch.tensor([[tensions[0]]]), torch.tensor([[64, 400, 32, 32]]), True)
    assert (spend(relevance, tensions, float(called_for)) > LEFT_OUT).all()
    assert (spend(relevance, tensions, 0.0, closer=False) == 0).all()


def test_a_question_that_calls_for_detail_gets_it_within_64_tokens():
    relevance = np.linspace(0, 1, CELL_COUNT, dtype=np.float32)[None]
    levels = spend(relevance, (1.0, 0.0, 0.0), 0.0)
    assert levels[-2:].tolist() == [2, 2]
    assert int(TOKENS[levels].sum()) == CELL_COUNT
    assert 19 <= (levels > LEFT_OUT).sum() < 32  # at least a quarter of 64, and 3
    assert (spend(relevance, (0.0, 0.0, 0.0), 0.0) == 0).all()


def test_left_out_cells_take_no_place_among_the_packed_tokens():
    torch.manual_seed(3)
    features, detail = torch.randn(1, 257, 4), torch.randn(1, DETAIL_COUNT, 4)
    chosen = torch.randint(-1, 3, (1, CELL_COUNT), generator=torch.Generator().manual_seed(1))
    chosen[0, 40:] = LEFT_OUT
    tokens, mask = ALLOCATION.pack(features, chosen, None, detail)
    patches, details = cells_of(features[:, 1:])[0], cells_of(detail, 4)[0]
    expected = [features[0, 0]]
    for cell, level in enumerate(chosen[0].tolist()):
        expected += {-1: [], 0: [patches[cell].mean(0)], 1: list(patches[cell]), 2: list(details[cell])}[level]
    assert int(mask.sum()) == len(expected)
    assert torch.allclose(tokens[0, : len(expected)], torch.stack(expected), atol=1e-6)
