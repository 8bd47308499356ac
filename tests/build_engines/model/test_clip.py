"""A clip: which cells get a token, positions in time, and the graph against PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from build_engines.model.allocation import CELL_COUNT, LEFT_OUT, cells_of
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.clip import ClipAttention, ClipResampler, TemporalPositions
from build_engines.model.clip_allocation import ClipAllocation
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.model.qformer import QFormer
from build_engines.train.architecture import new_config, new_model
from build_engines.train.tokens import new_tokenizer

WIDTH = 32
ALLOCATION = ClipAllocation()
PLAIN = torch.linspace(-1, 1, WIDTH)  # the feature of an empty place
THING = -PLAIN


def clip(frames: int, place: Callable[[float], int | None]) -> tuple[Tensor, Tensor]:
    """Pooled cells [1, T, 64, D] with an object at the cell that `place` gives for a time, and the times."""
    times = torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)
    pooled = PLAIN.expand(1, frames, CELL_COUNT, WIDTH).clone()
    for frame, time in enumerate(times.tolist()):
        if (cell := place(time)) is not None:
            pooled[0, frame, cell] = THING
    return pooled, times


def levels(pooled: Tensor, times: Tensor, budget: tuple[int, int], relevance: Tensor | None = None) -> Tensor:
    """[T, 64]"""
    asked = torch.zeros(pooled.shape[:3]) if relevance is None else relevance
    return ALLOCATION(asked, pooled, times, torch.tensor([budget])).levels[0]


def kept(found: Tensor) -> list[tuple[int, int]]:
    """Frame and cell of every token after the first frame."""
    return [(frame, cell) for frame, cell in (found > LEFT_OUT).nonzero().tolist() if frame]


@pytest.mark.parametrize("frames", [1, 2, 8, 32])
def test_a_still_clip_costs_no_more_than_its_first_frame(frames):
    pooled, times = clip(frames, lambda _: 9)
    found = levels(pooled, times, (64, 256))
    assert (found[0] == 0).all()
    assert (found[1:] == LEFT_OUT).all()


def test_the_least_is_filled_with_the_most_relevant_still_cells():
    pooled, times = clip(4, lambda _: 9)
    relevance = torch.zeros(1, 4, CELL_COUNT)
    relevance[0, :, 20], relevance[0, 2, 33] = 0.9, 1.0
    assert kept(levels(pooled, times, (66, 256), relevance)) == [(1, 20), (2, 33)]


def test_an_object_that_came_has_a_token_when_it_came():
    pooled, times = clip(8, lambda time: 12 if time > 0.5 else None)
    assert kept(levels(pooled, times, (64, 256))) == [(4, 12)]


def test_a_place_that_was_left_has_a_token_that_shows_it_empty():
    pooled, times = clip(8, lambda time: 12 if time < 0.5 else 13)
    assert kept(levels(pooled, times, (64, 256))) == [(4, 12), (4, 13)]


def test_the_last_state_comes_before_what_happened_on_the_way():
    pooled, times = clip(8, lambda time: round(7 * time))  # along the first row
    few = kept(levels(pooled, times, (64, 72)))
    assert few == sorted([(cell + 1, cell) for cell in range(7)] + [(7, 7)])  # each cell when it was left


def test_the_newest_token_of_each_cell_is_not_old():
    pooled, times = clip(8, lambda time: 5 if 0.2 < time < 0.6 else None)
    found = ALLOCATION(torch.zeros(1, 8, CELL_COUNT), pooled, times, torch.tensor([[64, 256]]))
    place, seen, old = found.place[0], found.seen[0], found.old[0]
    of_five = [(int(p) // CELL_COUNT, bool(o)) for p, s, o in zip(place, seen, old, strict=True) if s and p % 64 == 5]
    assert sorted(of_five) == [(0, True), (2, True), (5, False)]
    assert not old[seen & (place < CELL_COUNT) & (place != 5)].any()


def test_relevance_decides_among_changes():
    def appearing(time: float) -> int | None:
        return None

    pooled, times = clip(8, appearing)
    pooled[0, 3, 10] = pooled[0, 3, 50] = THING  # two flashes; both settle again in frame 4
    relevance = torch.zeros(1, 8, CELL_COUNT)
    relevance[0, :, 50] = 1.0
    assert kept(levels(pooled, times, (64, 67), relevance)) == [(3, 50), (4, 10), (4, 50)]


def test_a_slow_change_in_many_frames_is_seen_in_frames_near_the_trained_positions():
    few, many = (kept(levels(*clip(frames, lambda time: int(7.99 * time)), (64, 256))) for frames in (8, 32))
    assert len(many) >= len(few)
    ends = {cell: frame / 31 for frame, cell in many}  # the latest of each
    for cell in range(1, 7):
        assert ends[cell] == pytest.approx((cell + 1) / 8, abs=0.04)


@given(st.integers(1, 32), st.integers(64, 256), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_a_budget_is_kept(frames, most, seed):
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, frames, CELL_COUNT, WIDTH, generator=generator)
    relevance = torch.rand(1, frames, CELL_COUNT, generator=generator)
    times = torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)
    found = ALLOCATION(relevance, pooled, times, torch.tensor([[64, most]]))
    spent = int((found.levels > LEFT_OUT).sum())
    assert spent == int(found.seen.sum()) == min(most, 64 * frames)
    flat = found.levels[0].flatten() > LEFT_OUT
    assert sorted(found.place[0][found.seen[0]].tolist()) == flat.nonzero()[:, 0].tolist()


def test_positions_in_time_are_interpolated_linearly():
    positions = TemporalPositions(WIDTH)
    torch.nn.init.normal_(positions.weight)
    assert torch.allclose(positions(torch.arange(8) / 7), positions.weight, atol=1e-5)
    between = positions(torch.tensor([0.5 / 7, 3.25 / 7, 1.0]))
    weight = positions.weight
    expected = torch.stack([(weight[0] + weight[1]) / 2, 0.75 * weight[3] + 0.25 * weight[4], weight[7]])
    assert torch.allclose(between, expected, atol=1e-5)


@pytest.fixture(scope="module")
def attention() -> ClipAttention:
    torch.manual_seed(3)
    tokenizer = new_tokenizer()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = new_model(tokenizer, new_config(len(tokenizer), sizes, layers=2))
    participatory = ParticipatoryKnowing(len(tokenizer), WIDTH)
    balancing = OpponentProcessing(participatory.coupling_width)
    return ClipAttention(RelevanceAllocator(participatory, balancing), ClipResampler(QFormer(model))).eval()


def arguments(frames: int, budget: tuple[int, int] = (64, 256)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(frames)
    features = torch.randn(257, WIDTH, generator=generator).repeat(frames, 1, 1)
    features[frames // 2 :, 30:60] += torch.randn(30, WIDTH, generator=generator)
    return {
        "features": features,
        "saliency": torch.rand(frames, 256, generator=generator),
        "entropy": torch.rand(frames, 256, generator=generator),
        "texture": torch.rand(frames, 13, 16, 16, generator=generator),
        "times": torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1),
        "question_ids": torch.randint(4, 300, (32,), generator=generator, dtype=torch.int32),
        "question_mask": (torch.arange(32) < 9).int(),
        "clip_budget": torch.tensor(budget, dtype=torch.int32),
    }


def test_a_clip_of_one_frame_begins_as_the_q_former_reads_it(attention):
    torch.manual_seed(4)
    tokenizer = new_tokenizer()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    qformer = QFormer(new_model(tokenizer, new_config(len(tokenizer), sizes, layers=2))).eval()
    resampler = ClipResampler(qformer).eval()
    resampler.query_tokens.data = qformer.query_tokens.detach().repeat(1, 2, 1)
    one = ClipAttention(attention.allocator, resampler)
    given = arguments(1)
    with torch.no_grad():
        visual_tokens = one(*given.values())[0]
        pooled = cells_of(given["features"][:, 1:]).mean(2)
        tokens = torch.cat([given["features"][:, :1], pooled], dim=1)
        expected = qformer(tokens, torch.ones(1, 65, dtype=torch.int32))[0]
    # The halves attend to each other as well, so that equal queries stay equal.
    assert torch.allclose(visual_tokens[:32], expected, atol=1e-4)
    assert torch.allclose(visual_tokens[32:], expected, atol=1e-4)
