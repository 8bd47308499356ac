"""Store the KV cache of every running row in the shape that the decoder's graph reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating]
Int64Array = npt.NDArray[np.int64]

BLOCK = 64  # columns by which the pool grows and shrinks


class KvPool:
    """Hold the rows' KV cache in `arrays` [parts, max_rows, heads, S, head_dim], in the graph's float type.

    A part is the keys or the values of one layer. The used rows are the first `rows`; they are contiguous, so the graph
    reads them without a copy. S grows and shrinks with the longest row. Columns past a row's length hold stale but
    finite numbers: the graph masks them, and a weight of 0 times a NaN would be NaN.
    """

    def __init__(
        self, parts: int, heads: int, head_dim: int, max_rows: int, dtype: type[np.floating] = np.float32
    ) -> None:
        self._dtype = dtype
        self.rows = 0
        self.lengths = np.zeros(max_rows, np.int64)  # valid columns of each row
        self._shape = (parts, max_rows, heads, head_dim)
        self._row_index = np.arange(max_rows)
        self.on_move: Callable[[], None] = lambda: None  # called when `arrays` is another array than before
        self._allocate(BLOCK)

    @property
    def columns(self) -> int:
        """Return S, the columns allocated for every row."""
        return int(self.arrays.shape[3])

    def place(self, pasts: Sequence[FloatArray], columns: int) -> FloatArray:
        """Prepare n new rows with room for `columns` columns -> a view [parts, n, heads, S, head_dim].

        Each row begins with its past [parts, heads, p, head_dim]. Raises MemoryError and leaves the pool unchanged.
        """
        self._fit(columns)
        rows = self.arrays[:, self.rows : self.rows + len(pasts)]
        for row, past in enumerate(pasts):
            rows[:, row, :, : past.shape[2]] = past
        return rows

    def append(self, new: Sequence[FloatArray], starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Add the placed rows to the running ones.

        Row i takes `lengths[i]` columns of each part [n, heads, T, head_dim], after its `starts[i]` columns of past.
        """
        rows = self.arrays[:, self.rows : self.rows + len(starts)]
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            for part, columns in zip(rows, new, strict=True):
                part[row, :, start : start + length] = columns[row, :, :length]
            self.lengths[self.rows + row] = start + length
        self.rows += len(starts)

    def make_room(self) -> None:
        """Allocate one more column in every row."""
        self._fit(self._longest() + 1)

    def extend(self, new: FloatArray) -> None:
        """Write one more column per row, [parts, rows, heads, 1, head_dim]. Call `make_room` first."""
        lengths = self.lengths[: self.rows]
        self._columns_first[self._row_index[: self.rows], lengths] = new[:, :, :, 0].swapaxes(0, 1)
        lengths += 1

    def row(self, row: int) -> FloatArray:
        """Return the row's valid columns [parts, heads, length, head_dim], a view."""
        return self.arrays[:, row, :, : self.lengths[row]]

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        last = self.rows - 1
        if row != last:
            length = self.lengths[last]
            self.arrays[:, row, :, :length] = self.arrays[:, last, :, :length]
            self.lengths[row] = length
        self.rows = last
        longest = self._longest()
        if 2 * BLOCK + 2 * longest <= self.columns:
            with contextlib.suppress(MemoryError):  # both exist for a moment: it stays as large
                self._move(longest)

    def scrub(self, row: int) -> None:
        """Overwrite a row that is not finite: stale NaNs would reach the next row in its place."""
        self.arrays[:, row] = 0

    def _longest(self) -> int:
        return int(self.lengths[: self.rows].max(initial=0))

    def _fit(self, columns: int) -> None:
        if columns > self.columns:
            self._move(columns)

    def _move(self, columns: int) -> None:
        """Reallocate to the fewest blocks that hold `columns` columns."""
        old = self.arrays
        self._allocate(-(-max(columns, 1) // BLOCK) * BLOCK)
        kept = min(self.columns, old.shape[3])
        self.arrays[:, : self.rows, :, :kept] = old[:, : self.rows, :, :kept]
        self.on_move()

    def _allocate(self, columns: int) -> None:
        parts, max_rows, heads, head_dim = self._shape
        self.arrays: FloatArray = np.zeros((parts, max_rows, heads, columns, head_dim), self._dtype)
        self._columns_first = self.arrays.transpose(1, 3, 0, 2, 4)  # a view: [row, column] selects one token's cache
