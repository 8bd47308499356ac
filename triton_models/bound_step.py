"""A decoder's step over every row, with inputs and outputs bound to fixed memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from triton_models.engine import Array, Engine
from triton_models.kv_pool import FloatArray, Int64Array, KvPool


class BoundStep:
    """Append one token to each row. The graph is bound once for each number of rows, until a pool's arrays move.

    The step reads the pools in place and overwrites the last step's logits and new columns.
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
        self._engine, self._pools, self._inputs = engine, pools, inputs
        self._ids = np.zeros((len(logits), 1), np.int64)
        self._logits, self._new = logits, new
        self._outputs = dict(zip(outputs, [logits, *new], strict=True))
        self._bindings: dict[int, Callable[[], None]] = {}  # by number of rows
        self._bound = [pool.arrays for pool in pools]

    def __call__(self, tokens: Int64Array) -> FloatArray:
        """tokens [rows] -> logits [rows, V], valid until the next step."""
        pool = self._pools[0]
        rows = pool.rows
        pool.make_room()
        self._ids[:rows, 0] = tokens
        self._binding(rows)()
        pool.extend(self._new[:, :rows])
        return self._logits[:rows]

    def _binding(self, rows: int) -> Callable[[], None]:
        if any(bound is not pool.arrays for bound, pool in zip(self._bound, self._pools, strict=True)):
            self._bindings.clear()
            self._bound = [pool.arrays for pool in self._pools]
        if rows not in self._bindings:
            inputs = {"input_ids": self._ids, **self._inputs()}
            self._bindings[rows] = self._engine.bind(
                {name: array[:rows] for name, array in inputs.items()},
                {name: array[:rows] for name, array in self._outputs.items()},
            )
        return self._bindings[rows]
