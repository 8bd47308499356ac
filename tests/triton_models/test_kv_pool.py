"""The pool of keys and values beside a plain list of rows: what is put in comes out, in the shape the graph reads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triton_models.kv_pool import BLOCK, KvPool

PARTS, HEADS, HEAD_DIM, MAX_ROWS = 4, 3, 2, 4


def columns(seed: int, count: int, dtype: type = np.float32) -> np.ndarray:
    """[parts, heads, count, head_dim], no two alike and none 0."""
    return np.random.default_rng(seed).uniform(1, 2, (PARTS, HEADS, count, HEAD_DIM)).astype(dtype)


def pool(dtype: type = np.float32) -> KvPool:
    return KvPool(PARTS, HEADS, HEAD_DIM, MAX_ROWS, dtype)


def join(into: KvPool, *rows: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """As the decoder does, with each row's past and the columns after it; what the graph reads of the pasts."""
    starts = [past.shape[2] for past, _ in rows]
    lengths = [rest.shape[2] for _, rest in rows]
    totals = [start + length for start, length in zip(starts, lengths, strict=True)]
    placed = into.place([past for past, _ in rows], max(totals)).copy()
    new = np.full((PARTS, len(rows), HEADS, max(lengths), HEAD_DIM), 9.0, np.float32)  # 9: padding
    for row, (_, rest) in enumerate(rows):
        new[:, row, :, : rest.shape[2]] = rest
    into.append(list(new), starts, lengths)
    return placed


def filled(*lengths: int) -> tuple[KvPool, list[np.ndarray]]:
    """Rows without a past."""
    into = pool()
    expected = [columns(seed, length) for seed, length in enumerate(lengths)]
    join(into, *((columns(0, 0), each) for each in expected))
    return into, expected


def step(into: KvPool, seed: int) -> np.ndarray:
    """One more column a row: [parts, rows, heads, 1, head_dim]."""
    into.make_room()
    new = np.stack([columns(100 * seed + row, 1) for row in range(into.rows)], axis=1)
    into.extend(new)
    return new


moves = st.one_of(
    st.tuples(st.just("join"), st.lists(st.tuples(st.integers(0, 70), st.integers(1, 90)), min_size=1, max_size=3)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("drop"), st.integers(0, MAX_ROWS - 1)),
)


@settings(deadline=None)
@given(st.lists(moves, max_size=20))
def test_rows_come_grow_and_leave_as_in_a_list(moves):
    into, expected, seed = pool(), [], 0
    for move, what in moves:
        seed += 10
        if move == "join":
            new = [(columns(seed + n, past), columns(seed + n + 5, rest)) for n, (past, rest) in enumerate(what)]
            new = new[: MAX_ROWS - len(expected)]
            if new:
                placed = join(into, *new)
                for row, (past, _) in enumerate(new):
                    assert np.array_equal(placed[:, row, :, : past.shape[2]], past)
                expected += [np.concatenate(each, axis=2) for each in new]
        elif move == "step" and expected:
            for n in range(what):
                added = step(into, seed + n)
                expected = [np.concatenate([row, added[:, n]], axis=2) for n, row in enumerate(expected)]
        elif move == "drop" and what < len(expected):
            into.drop(what)
            expected[what] = expected[-1]
            expected.pop()
        assert into.rows == len(expected)
        assert into.lengths[: into.rows].tolist() == [row.shape[2] for row in expected]
        for row, held in enumerate(expected):
            assert np.array_equal(into.row(row), held)
        assert into.arrays.shape == (PARTS, MAX_ROWS, HEADS, into.columns, HEAD_DIM)
        assert into.columns % BLOCK == 0
        assert np.isfinite(into.arrays).all()


@pytest.mark.parametrize(
    ("length", "room"), [(1, BLOCK), (BLOCK, BLOCK), (BLOCK + 1, 2 * BLOCK), (2 * BLOCK, 2 * BLOCK)]
)
def test_there_is_room_in_whole_blocks_for_the_longest_row(length, room):
    assert filled(1, length)[0].columns == room


def test_a_full_block_grows_with_the_next_column_and_not_before():
    into, _ = filled(BLOCK - 1, 2)
    before = into.arrays
    step(into, 1)
    assert into.arrays is before  # a step's bindings stay
    step(into, 2)
    assert into.columns == 2 * BLOCK


@pytest.mark.parametrize(
    ("longest", "room"), [(BLOCK // 2, BLOCK), (BLOCK // 2 + 1, 3 * BLOCK)], ids=["half a block", "more"]
)
def test_it_shrinks_only_where_the_longest_row_can_double_and_leave_two_blocks_free(longest, room):
    """A pool that shrank as soon as it could would grow again at once."""
    into, (kept, _, also_kept) = filled(longest, 2 * BLOCK + 1, 5)
    into.drop(1)
    assert into.columns == room
    assert np.array_equal(into.row(0), kept)
    assert np.array_equal(into.row(1), also_kept)


def test_an_empty_pool_keeps_one_block():
    into, _ = filled(5 * BLOCK)
    into.drop(0)
    assert (into.rows, into.columns) == (0, BLOCK)


def test_the_first_rows_of_each_part_are_contiguous_for_the_graph():
    into, _ = filled(3, 4)
    assert all(part[:2].flags.c_contiguous for part in into.arrays)


def test_the_numbers_are_of_the_graphs_float():
    into = pool(np.float16)
    join(into, (columns(1, 2, np.float16), columns(2, BLOCK, np.float16)))
    assert into.arrays.dtype == np.float16
    assert into.columns == 2 * BLOCK
    assert pool().arrays.dtype == np.float32


def test_scrubbing_overwrites_the_whole_row_and_no_other():
    """The row that comes to live there may be shorter: nothing else would overwrite what is behind its end."""
    into, (first, _, last) = filled(7, 9, 8)
    into.arrays[:, 1, :, 3:] = np.nan
    into.scrub(1)
    assert np.isfinite(into.arrays).all()
    assert np.array_equal(into.row(0), first)
    assert np.array_equal(into.row(2), last)
    into.drop(1)
    assert np.array_equal(into.row(1), last)


def test_without_memory_for_more_columns_it_holds_what_it_held():
    into, (held,) = filled(9)
    with pytest.raises(MemoryError):
        into.place([columns(0, 0)], 1 << 46)
    assert np.array_equal(into.row(0), held)
    assert into.columns == BLOCK
    step(into, 1)
    assert into.lengths[0] == 10


class Tight(KvPool):
    """A pool on a machine that has no memory left, from some moment on."""

    is_full = False

    def _allocate(self, columns):
        if self.is_full:
            raise MemoryError
        super()._allocate(columns)


def test_without_memory_to_shrink_it_stays_as_large():
    into = Tight(PARTS, HEADS, HEAD_DIM, MAX_ROWS)
    kept = columns(1, 3)
    join(into, (columns(0, 0), columns(0, 5 * BLOCK)), (columns(0, 0), kept))
    into.is_full = True
    into.drop(0)
    assert (into.rows, into.columns) == (1, 5 * BLOCK)
    assert np.array_equal(into.row(0), kept)
    into.is_full = False
    into.drop(0)
    assert into.columns == BLOCK
