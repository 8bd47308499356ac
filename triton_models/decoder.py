"""Run the LLM, one ONNX graph, over the KV cache pool.

B: rows. T: input columns. P: columns of past. N: rows of a prompt embedding table. V: vocabulary size. H: hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.core.prompt import Prompt
from triton_models.bound_step import BoundStep
from triton_models.engine import Array, open_engine
from triton_models.kv_pool import FloatArray, Int64Array, KvPool
from triton_models.prefix_cache import PrefixCache


class OnnxDecoder:
    """Run the LLM over rows that join with a prompt, grow by one token per step and leave.

    The past of a prompt is the keys and values of its first n tokens: [parts, heads, n, head_dim] in the graph's float
    type. A part is the keys or the values of one layer. A step's inputs and outputs are bound to fixed memory: see
    `BoundStep`.
    """

    def __init__(
        self,
        graph: Path,
        *,
        max_rows: int,
        intra_op_threads: int = 1,
        prefix_cache_bytes: int = 0,
        library: str = "onnxruntime",
        provider: str = "cpu",
        device_id: int = 0,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """`prefixes` is a cache to share with a decoder of the same shapes, in place of one of its own."""
        self._engine = open_engine(graph, intra_op_threads, library=library, provider=provider, device_id=device_id)
        self._float = self._engine.float_type("past_key_0")
        shapes: dict[str, Any] = {**self._engine.inputs, **self._engine.outputs}
        parts = [name.removeprefix("past_") for name in shapes if name.startswith(("past_key_", "past_value_"))]
        self._past = [f"past_{part}" for part in parts]
        self._outputs = ["logits", *(f"new_{part}" for part in parts)]
        _, heads, _, head_dim = shapes["past_key_0"]
        self.vocab_size: int = shapes["logits"][1]
        self.hidden_size: int = shapes["prompt_embedding_table"][2]
        self.max_rows = max_rows
        self.prefixes = PrefixCache(prefix_cache_bytes, self.vocab_size) if prefixes is None else prefixes
        self._pool = KvPool(len(parts), heads, head_dim, max_rows, self._float)
        self._no_past = np.zeros((len(parts), heads, 0, head_dim), self._float)
        self._masked = np.zeros((max_rows, heads, 1, head_dim), self._float)  # the graph's input if there is no past
        self._ones = np.ones(max_rows, np.int64)
        self._no_table = np.zeros((max_rows, 1, self.hidden_size), self._float)
        logits = np.zeros((max_rows, self.vocab_size), np.float32)
        new = np.zeros((len(parts), max_rows, heads, 1, head_dim), self._float)
        self._step = BoundStep(self._engine, [self._pool], self._outputs, logits, new, self._step_inputs)

    @property
    def rows(self) -> int:
        return self._pool.rows

    @property
    def columns(self) -> int:
        """Columns of cache allocated for every row."""
        return self._pool.columns

    def recall(self, prompt: Prompt) -> FloatArray:
        """Return the past of the prompt's first n tokens from the prefix cache.

        n is less than the prompt's length, and 0 if the cache has no usable prefix.
        """
        known = self.prefixes.recall(prompt)
        return self._no_past if known is None else known

    def before_answer(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        """Return the prompt's own ids: the answer continues them."""
        return prompt.input_ids

    def read(self, prompt: Prompt, past: FloatArray, tokens: int) -> FloatArray:
        """Extend `past` to the prompt's first `tokens` tokens, without adding a row.

        `tokens` must exceed the columns of `past`.
        """
        start = past.shape[2]
        part = replace(prompt, input_ids=prompt.input_ids[:tokens])
        _, *new = self._read([part], [start], past[:, np.newaxis] if start else None)
        return np.concatenate([past, np.concatenate(new)], axis=2)

    def prefill(self, prompts: Sequence[Prompt], pasts: Sequence[FloatArray]) -> FloatArray:
        """Append one row per prompt -> logits [len(prompts), V] after its last token.

        Every past is shorter than its prompt. On error no row is added.
        """
        starts = [past.shape[2] for past in pasts]
        totals = [prompt.input_ids.size for prompt in prompts]
        rows = self._pool.place(pasts, max(totals))
        logits, *new = self._read(prompts, starts, rows if any(starts) else None)
        first = self.rows
        self._pool.append(new, starts, [total - start for total, start in zip(totals, starts, strict=True)])
        for row, prompt in enumerate(prompts):
            with contextlib.suppress(MemoryError):  # the answer needs no cache
                if np.isfinite(logits[row]).all():
                    self.prefixes.keep(prompt, self._pool.row(first + row))
        return logits

    def step(self, tokens: Int64Array) -> FloatArray:
        """Append one text token to each row: tokens [rows] -> logits [rows, V].

        The logits are valid until the next step.
        """
        return self._step(tokens)

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        self._pool.drop(row)

    def scrub(self, row: int) -> None:
        """Overwrite a row that is not finite, so that the next row in its place reads no NaN."""
        self._pool.scrub(row)

    def _read(self, prompts: Sequence[Prompt], starts: Sequence[int], past: FloatArray | None) -> list[FloatArray]:
        """Run the graph on the prompts from `starts` on -> logits [B, V], parts [B, heads, T, head_dim].

        `past` is [parts, B, heads, P, head_dim] with `starts` valid columns, or None if all `starts` are 0.
        """
        rest = [prompt.input_ids[start:] for prompt, start in zip(prompts, starts, strict=True)]
        rows, lengths = len(rest), [ids.size for ids in rest]
        ids = np.zeros((rows, max(lengths)), np.int64)
        visual_tokens = max(1, *(len(prompt.visual_tokens) for prompt in prompts))
        table = np.zeros((rows, visual_tokens, self.hidden_size), self._float)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = rest[row]
            table[row, : len(prompt.visual_tokens)] = prompt.visual_tokens
        parts = [self._masked[:rows]] * len(self._past) if past is None else past
        feeds: dict[str, Array] = {
            "input_ids": ids,
            "prompt_embedding_table": table,
            "past_lengths": np.array(starts, np.int64),
            "input_lengths": np.array(lengths, np.int64),
            **dict(zip(self._past, parts, strict=True)),
        }
        found: list[FloatArray] = self._engine.run(feeds, self._outputs)
        return found

    def _step_inputs(self) -> dict[str, Array]:
        return {
            "prompt_embedding_table": self._no_table,
            "past_lengths": self._pool.lengths,
            "input_lengths": self._ones,
            **dict(zip(self._past, self._pool.arrays, strict=True)),
        }
