"""The keys and values of every running row, in the shape in which the decoder's graph reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

BLOCK = 64  # columns by which the pool grows and shrinks


class KvPool:
    """Rows of cache, compact at the front of float32 `arrays` [parts, max_rows, heads, S, head_dim].

    A part is the keys or the values of one layer: its first `rows` rows are contiguous, so the graph reads them without
    a copy. S grows and shrinks with the longest row. Columns past a row's length hold stale but finite numbers: the
    graph masks them, and a weight of 0 times a NaN would be NaN.
    """

    def __init__(self, parts: int, heads: int, head_dim: int, max_rows: int) -> None:
        self.rows = 0
        self.lengths = np.zeros(max_rows, np.int64)  # valid columns of each row
        self._shape = (parts, max_rows, heads, head_dim)
        self._longest = 0
        self._row_index = np.arange(max_rows)
        self._allocate(BLOCK)

    @property
    def columns(self) -> int:
        """S: columns that every row has room for."""
        return int(self.arrays.shape[3])

    def append(self, new: Sequence[FloatArray], lengths: Int64Array) -> None:
        """New last rows from parts [n, heads, T, head_dim], of which `lengths` [n] columns are valid.

        Raises MemoryError, and then holds what it held."""
        columns = new[0].shape[2]
        before, self._longest = self._longest, max(self._longest, int(lengths.max()))
        try:
            self._fit()
        except MemoryError:  # the rows that run need no more than before
            self._longest = before
            raise
        last = self.rows + len(lengths)
        for part, columns_of in zip(self.arrays, new, strict=True):
            part[self.rows : last, :, :columns] = columns_of
        self.lengths[self.rows : last] = lengths
        self.rows = last

    def make_room(self) -> None:
        """For one more column in every row."""
        self._longest += 1
        if self._longest > self.columns:
            self._fit()

    def extend(self, new: FloatArray) -> None:
        """One more column a row, of [parts, rows, heads, 1, head_dim], where `make_room` made it."""
        lengths = self.lengths[: self.rows]
        self._columns_first[self._row_index[: self.rows], lengths] = new[:, :, :, 0].swapaxes(0, 1)
        lengths += 1

    def drop(self, row: int) -> None:
        """Forget a row; the last row takes its place."""
        last = self.rows - 1
        if row != last:
            length = self.lengths[last]
            self.arrays[:, row, :, :length] = self.arrays[:, last, :, :length]
            self.lengths[row] = length
        self.rows = last
        self._longest = int(self.lengths[:last].max(initial=0))
        if 2 * BLOCK + 2 * self._longest <= self.columns:
            self._fit()

    def scrub(self, row: int) -> None:
        """Overwrite a row that is not finite: stale NaNs would reach the row that comes to live there."""
        self.arrays[:, row] = 0

    def _fit(self) -> None:
        """As many blocks of columns as the longest row needs, and every row's cache in them."""
        columns = -(-max(self._longest, 1) // BLOCK) * BLOCK
        if columns != self.columns:
            old = self.arrays
            self._allocate(columns)
            kept = min(columns, old.shape[3])
            self.arrays[:, : self.rows, :, :kept] = old[:, : self.rows, :, :kept]

    def _allocate(self, columns: int) -> None:
        parts, max_rows, heads, head_dim = self._shape
        self.arrays: FloatArray = np.zeros((parts, max_rows, heads, columns, head_dim), np.float32)
        self._columns_first = self.arrays.transpose(1, 3, 0, 2, 4)  # a view: [row, column] selects one token's cache
