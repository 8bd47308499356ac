"""The LLM as one ONNX graph plus the pool that holds the keys and values of every running row.

B rows, T input columns, L layers, P columns of past, N rows of a prompt embedding table, V the vocabulary's size, H the
hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.core import Prompt
from triton_models.session import open_session

FloatArray = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]

BLOCK = 64  # columns by which the pool grows and shrinks


class OnnxDecoder:
    """Rows of key-value cache, compact at the front of one array, and the graph that extends them.

    The array is float32 [max_rows, L, 2, heads, S, head_dim]: its first B rows are contiguous, so a step hands them to
    the graph without a copy and writes one new column a row in place. S grows and shrinks with the longest row. Columns
    past a row's length hold stale but finite numbers: the graph masks them, and a weight of 0 times a NaN would be NaN.
    """

    def __init__(self, graph: Path, *, max_rows: int, intra_op_threads: int = 1) -> None:
        session = open_session(graph, intra_op_threads)
        shapes = {spec.name: spec.shape for spec in (*session.get_inputs(), *session.get_outputs())}
        _, layers, two, heads, _, head_dim = shapes["past_kv"]
        self._run = session._sess.run  # what Session.run calls after 8 us of checks
        self.vocab_size: int = shapes["logits"][1]
        self.hidden_size: int = shapes["prompt_embedding_table"][2]
        self.max_rows = max_rows
        self.rows = 0
        self._row_shape = (layers, two, heads, head_dim)
        self._pool = self._new_pool(BLOCK)
        self._lengths = np.zeros(max_rows, np.int64)
        self._longest = 0
        self._row_index = np.arange(max_rows)
        self._ids = np.zeros((max_rows, 1), np.int64)
        self._ones = np.ones(max_rows, np.int64)
        self._no_table = np.zeros((max_rows, 1, self.hidden_size), np.float32)

    @property
    def columns(self) -> int:
        """S: columns of cache that every row has room for."""
        return int(self._pool.shape[4])

    def prefill(self, prompts: Sequence[Prompt]) -> FloatArray:
        """Append one row a prompt -> logits [len(prompts), V] after its last token. On error no row is added."""
        rows, lengths = len(prompts), np.array([prompt.input_ids.size for prompt in prompts], np.int64)
        longest = int(lengths.max())
        ids = np.zeros((rows, longest), np.int64)
        table = np.zeros(
            (rows, max(1, *(len(prompt.visual_tokens) for prompt in prompts)), self.hidden_size), np.float32
        )
        for row, prompt in enumerate(prompts):
            ids[row, : prompt.input_ids.size] = prompt.input_ids
            table[row, : len(prompt.visual_tokens)] = prompt.visual_tokens
        layers, two, heads, head_dim = self._row_shape
        no_past = np.zeros((rows, layers, two, heads, 0, head_dim), np.float32)
        logits, new_kv = self._infer(ids, table, no_past, np.zeros(rows, np.int64), lengths)
        before, self._longest = self._longest, max(self._longest, longest)
        try:
            self._fit()
        except MemoryError:  # the rows that run need no more than before
            self._longest = before
            raise
        last = self.rows + rows
        self._pool[self.rows : last, :, :, :, :longest] = new_kv
        self._lengths[self.rows : last] = lengths
        self.rows = last
        return logits

    def step(self, tokens: Int64Array) -> FloatArray:
        """Append tokens [rows] (text ids) to their rows -> logits [rows, V]."""
        rows = self.rows
        self._longest += 1
        if self._longest > self.columns:
            self._fit()
        lengths = self._lengths[:rows]
        ids = self._ids[:rows]
        ids[:, 0] = tokens
        logits, new_kv = self._infer(ids, self._no_table[:rows], self._pool[:rows], lengths, self._ones[:rows])
        self._columns_first[self._row_index[:rows], lengths] = new_kv[:, :, :, :, 0]
        lengths += 1
        return logits

    def drop(self, row: int) -> None:
        """Forget a row; the last row takes its place."""
        last = self.rows - 1
        if row != last:
            length = self._lengths[last]
            self._pool[row, :, :, :, :length] = self._pool[last, :, :, :, :length]
            self._lengths[row] = length
        self.rows = last
        self._longest = int(self._lengths[:last].max(initial=0))
        if 2 * BLOCK + 2 * self._longest <= self.columns:
            self._fit()

    def scrub(self, row: int) -> None:
        """Overwrite a row that is not finite: stale NaNs would reach the row that comes to live there."""
        self._pool[row] = 0

    def _fit(self) -> None:
        """Give the pool as many blocks of columns as the longest row needs, and keep every row's cache."""
        columns = -(-max(self._longest, 1) // BLOCK) * BLOCK
        if columns != self.columns:
            old, self._pool = self._pool, self._new_pool(columns)
            kept = min(columns, old.shape[4])
            self._pool[: self.rows, :, :, :, :kept] = old[: self.rows, :, :, :, :kept]

    def _new_pool(self, columns: int) -> FloatArray:
        layers, two, heads, head_dim = self._row_shape
        pool = np.zeros((self.max_rows, layers, two, heads, columns, head_dim), np.float32)
        self._columns_first = pool.transpose(0, 4, 1, 2, 3, 5)  # a view: [row, column] selects one token's cache
        return pool

    def _infer(
        self, ids: Int64Array, table: FloatArray, past: FloatArray, past_lengths: Int64Array, lengths: Int64Array
    ) -> tuple[FloatArray, FloatArray]:
        feed: dict[str, npt.NDArray[Any]] = {
            "input_ids": ids,
            "prompt_embedding_table": table,
            "past_kv": past,
            "past_lengths": past_lengths,
            "input_lengths": lengths,
        }
        logits, new_kv = self._run(["logits", "new_kv"], feed, None)
        return logits, new_kv
