import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from service.core.request import Budget
from service.core.vision import CloserFeatures, Int8Rows, Relevance, Seen, VisionFeatures, dense


def relevance(values: np.ndarray) -> Relevance:
    plain = np.zeros((16, 16), np.float32)
    return Relevance(values.astype(np.float32), np.stack([plain] * 3), np.zeros((8, 8), np.int32), np.zeros(3))


@pytest.mark.parametrize("patches", [1, 2, 16, 256])
def test_relevance_is_as_even_as_the_patches_it_lies_on_are_many(patches):
    spread = np.zeros((16, 16))
    spread.flat[:patches] = 0.3
    assert relevance(spread).evenness == pytest.approx(math.log(patches) / math.log(256))


def test_relevance_nowhere_is_even():
    assert relevance(np.zeros((16, 16))).evenness == 1.0


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 5), st.integers(1, 9)),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=True),
    )
)
def test_int8_rows_are_within_half_a_step_of_what_they_were(rows):
    kept = Int8Rows.of(rows)
    assert kept.values.dtype == np.int8
    assert kept.dense().dtype == rows.dtype
    assert (np.abs(kept.dense() - rows) <= 0.501 * kept.scales[:, np.newaxis] + 1e-30).all()
    again = Int8Rows.of(kept.dense())
    assert np.abs(again.values.astype(int) - kept.values).max() <= 1


def test_a_row_that_is_not_finite_is_not_and_spoils_no_other():
    rows = np.array([[1.0, np.nan], [np.inf, 2.0], [0.0, 0.0], [1.0, -2.0]], np.float32)
    back = Int8Rows.of(rows).dense()
    assert np.isnan(back[:2]).all()
    assert (back[2] == 0).all()
    assert back[3] == pytest.approx(rows[3], abs=0.01)


def test_int8_takes_about_a_quarter_of_the_bytes():
    rows = np.ones((257, 768), np.float32)
    assert Int8Rows.of(rows).nbytes < 0.26 * rows.nbytes
    assert dense(rows) is rows


def test_rows_are_dense_whether_they_were_kept_as_int8_or_not():
    rows = np.random.default_rng(0).normal(size=(257, 4)).astype(np.float32)
    kept = Int8Rows.of(rows)
    assert (dense(kept) == kept.dense()).all()
    empty = np.zeros(0, np.float32)
    crops = [VisionFeatures(kept, empty, empty, empty)] * 4
    assert (CloserFeatures.joined(crops).features[:16] == kept.dense()[1:17]).all()


def test_int8_rows_are_127_steps_of_the_largest_magnitude():
    kept = Int8Rows.of(np.array([[2.54, -1.27, 0.0, 0.02], [-5.08, 0.02, 0.04, 2.54]], np.float32))
    assert kept.values.tolist() == [[127, -64, 0, 1], [-127, 0, 1, 64]]  # to the nearest even step
    assert kept.scales == pytest.approx([0.02, 0.04])


def test_a_row_of_next_to_nothing_is_zeros_and_a_little_more_is_not():
    kept = Int8Rows.of(np.array([[1e-31, -1e-31], [1e-29, -1e-29]], np.float32))
    assert kept.values.tolist() == [[0, 0], [127, -127]]


def test_the_bytes_are_those_of_every_array():
    features = VisionFeatures(
        np.zeros((257, 4), np.float16), np.zeros(256, np.float32), np.zeros(256, np.float32),
        np.zeros((13, 16, 16), np.float32),
    )  # fmt: skip
    assert features.nbytes == 2 * 257 * 4 + 4 * (256 + 256 + 13 * 256)
    assert CloserFeatures(features.features).nbytes == 2 * 257 * 4
    one = relevance(np.zeros((16, 16)))
    assert one.nbytes == 4 * (256 + 3 * 256 + 64) + 8 * 3
    assert Seen(np.zeros((32, 4), np.float32), one, Budget()).nbytes == one.nbytes + 4 * 32 * 4
    assert Int8Rows.of(np.ones((5, 8), np.float32)).nbytes == 5 * 8 + 5 * 4


def test_four_crops_join_to_one_grid_row_by_row_without_their_cls():
    grid = np.arange(32 * 32, dtype=np.float32).reshape(32, 32)
    crops = []
    for top, left in [(0, 0), (0, 16), (16, 0), (16, 16)]:
        patches = grid[top : top + 16, left : left + 16].reshape(256, 1)
        rows = np.concatenate([[[-1.0]], patches]).repeat(2, axis=1).astype(np.float32)
        empty = np.zeros(0, np.float32)
        crops.append(VisionFeatures(rows, empty, empty, empty))
    joined = CloserFeatures.joined(crops).features
    assert joined.shape == (1024, 2)
    assert joined[:, 0].tolist() == joined[:, 1].tolist() == list(range(1024))


def test_levels_cost_1_4_and_16_vision_tokens_a_cell():
    one = relevance(np.zeros((16, 16)))
    assert one.vision_tokens == 64
    levels = one.levels.copy()
    levels[0] = [1] * 8
    levels[1, :3] = 2
    assert replace(one, levels=levels).vision_tokens == 53 + 8 * 4 + 3 * 16


def test_particularize_is_the_first_tension():
    one = Relevance(np.zeros((16, 16)), np.zeros((3, 16, 16)), np.zeros((8, 8), np.int32), np.array([0.25, 0.5, 1]))
    assert one.particularize == 0.25
