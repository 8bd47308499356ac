import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from service.core.vision import Int8Rows, Relevance, dense


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
