"""A decoder's step over every row, with inputs and outputs bound to fixed memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from triton_models.engine import Array, Engine
from triton_models.kv_pool import FloatArray, Int64Array, KvPool


class BoundStep:
    """Append one token to each row. The graph is bound once for each number of rows, until a pool's arrays move.

    On the CPU the step reads the pools in place; a GPU gets a copy of all inputs at each step. It overwrites the last
    step's logits and new columns.
    """

    def __init__(
        self,
        engine: Engine,
        pools: Sequence[KvPool],
        outputs: Sequence[str],
        logits: FloatArray,
        new: FloatArray,
        inputs: Callable[[], Mapping[str, Array]],
    ) -> None:
        """The first of `pools` grows by the tokens; every pool's arrays are bound.

        `outputs` names the logits [max_rows, V], then the parts of `new`, [parts, max_rows, heads, 1, head_dim].
        `inputs` returns the graph's inputs but for `input_ids`, each of at least as many rows as are bound.
        """
        self._engine, self._pool, self._inputs = engine, pools[0], inputs
        self._ids = np.zeros((len(logits), 1), np.int64)
        self._logits, self._new = logits, new
        self._outputs = dict(zip(outputs, [logits, *new], strict=True))
        self._bindings: dict[int, Callable[[], None]] = {}  # by number of rows
        for pool in pools:
            pool.on_move = self._bindings.clear

    def __call__(self, tokens: Int64Array) -> FloatArray:
        """tokens [rows] -> logits [rows, V], valid until the next step."""
        rows = self._pool.rows
        self._pool.make_room()
        self._ids[:rows, 0] = tokens
        self._binding(rows)()
        self._pool.extend(self._new[:, :rows])
        return self._logits[:rows]

    def _binding(self, rows: int) -> Callable[[], None]:
        if rows not in self._bindings:
            inputs = {"input_ids": self._ids, **self._inputs()}
            self._bindings[rows] = self._engine.bind(
                {name: array[:rows] for name, array in inputs.items()},
                {name: array[:rows] for name, array in self._outputs.items()},
            )
        return self._bindings[rows]
