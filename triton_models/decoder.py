"""The LLM as one ONNX graph over the pool of keys and values.

B rows, T input columns, P columns of past, N rows of a prompt embedding table, V the vocabulary's size, H the hidden
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from service.core import Prompt
from triton_models.kv_pool import FloatArray, Int64Array, KvPool
from triton_models.session import Array, open_session


class OnnxDecoder:
    """Rows that join with a prompt, grow by a token a step and leave.

    A step is bound to fixed places in memory, once for each number of rows: it reads the pool where it lies and writes
    its logits and new columns where the last one did.
    """

    def __init__(self, graph: Path, *, max_rows: int, intra_op_threads: int = 1) -> None:
        self._session = open_session(graph, intra_op_threads)
        shapes = {spec.name: spec.shape for spec in (*self._session.get_inputs(), *self._session.get_outputs())}
        parts = [name.removeprefix("past_") for name in shapes if name.startswith(("past_key_", "past_value_"))]
        self._past = [f"past_{part}" for part in parts]
        self._outputs = ["logits", *(f"new_{part}" for part in parts)]
        _, heads, _, head_dim = shapes["past_key_0"]
        self.vocab_size: int = shapes["logits"][1]
        self.hidden_size: int = shapes["prompt_embedding_table"][2]
        self.max_rows = max_rows
        self._pool = KvPool(len(parts), heads, head_dim, max_rows)
        self._nothing = np.zeros((max_rows, heads, 1, head_dim), np.float32)  # a past of length 0: its column is masked
        self._ids = np.zeros((max_rows, 1), np.int64)
        self._ones = np.ones(max_rows, np.int64)
        self._no_table = np.zeros((max_rows, 1, self.hidden_size), np.float32)
        self._logits = np.zeros((max_rows, self.vocab_size), np.float32)
        self._new = np.zeros((len(parts), max_rows, heads, 1, head_dim), np.float32)
        self._bindings: dict[int, onnxruntime.IOBinding] = {}  # of a step, by rows
        self._bound: FloatArray = self._pool.arrays

    @property
    def rows(self) -> int:
        return self._pool.rows

    @property
    def columns(self) -> int:
        """Columns of cache that every row has room for."""
        return self._pool.columns

    def prefill(self, prompts: Sequence[Prompt]) -> FloatArray:
        """Append one row a prompt -> logits [len(prompts), V] after its last token. On error no row is added."""
        rows, lengths = len(prompts), np.array([prompt.input_ids.size for prompt in prompts], np.int64)
        ids = np.zeros((rows, int(lengths.max())), np.int64)
        table = np.zeros(
            (rows, max(1, *(len(prompt.visual_tokens) for prompt in prompts)), self.hidden_size), np.float32
        )
        for row, prompt in enumerate(prompts):
            ids[row, : prompt.input_ids.size] = prompt.input_ids
            table[row, : len(prompt.visual_tokens)] = prompt.visual_tokens
        feeds: dict[str, Array] = {
            "input_ids": ids,
            "prompt_embedding_table": table,
            "past_lengths": np.zeros(rows, np.int64),
            "input_lengths": lengths,
            **dict.fromkeys(self._past, self._nothing[:rows]),
        }
        logits, *new = self._session.run(self._outputs, feeds)
        self._pool.append(new, lengths)
        return np.asarray(logits, np.float32)

    def step(self, tokens: Int64Array) -> FloatArray:
        """Append tokens [rows] (text ids) to their rows -> logits [rows, V], valid until the next step."""
        rows = self.rows
        self._pool.make_room()
        self._ids[:rows, 0] = tokens
        self._session.run_with_iobinding(self._binding(rows))
        self._pool.extend(self._new[:, :rows])
        return self._logits[:rows]

    def drop(self, row: int) -> None:
        """Forget a row; the last row takes its place."""
        self._pool.drop(row)

    def scrub(self, row: int) -> None:
        """Leave nothing of a row that is not finite for the one that comes to live there."""
        self._pool.scrub(row)

    def _binding(self, rows: int) -> onnxruntime.IOBinding:
        if self._bound is not self._pool.arrays:
            self._bindings.clear()
            self._bound = self._pool.arrays
        if rows not in self._bindings:
            self._bindings[rows] = self._bind(rows)
        return self._bindings[rows]

    def _bind(self, rows: int) -> onnxruntime.IOBinding:
        """Prefixes of arrays that stay where they are: the binding knows their addresses only."""
        inputs: dict[str, Array] = {
            "input_ids": self._ids,
            "prompt_embedding_table": self._no_table,
            "past_lengths": self._pool.lengths,
            "input_lengths": self._ones,
            **dict(zip(self._past, self._bound, strict=True)),
        }
        binding = self._session.io_binding()
        for name, array in inputs.items():
            there = array[:rows]
            binding.bind_input(name, "cpu", 0, there.dtype.type, there.shape, there.ctypes.data)
        for name, array in zip(self._outputs, [self._logits, *self._new], strict=True):
            there = array[:rows]
            binding.bind_output(name, "cpu", 0, there.dtype.type, there.shape, there.ctypes.data)
        return binding
