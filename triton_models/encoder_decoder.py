"""Run an encoder-decoder LLM: the encoder once for each prompt, the decoder over two KV cache pools.

B: rows. T: columns of a prompt. S: columns of the longest prompt. P: columns of past. N: rows of a prompt embedding
table. V: vocabulary size. H: hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.core.prompt import Prompt
from triton_models.bound_step import BoundStep
from triton_models.engine import Array, open_engine
from triton_models.kv_pool import FloatArray, Int64Array, KvPool
from triton_models.prefix_cache import PrefixCache


class OnnxEncoderDecoder:
    """Run the LLM over rows that join with a prompt, grow by one token per step and leave, as `OnnxDecoder` does.

    The past of a prompt is what the encoder makes of it: keys and values of the decoder's cross-attention, [parts,
    heads, T, head_dim]. A part is the keys or the values of one layer. The encoder reads in both directions, so there
    is no past of a prompt's first tokens, and prompts that begin alike share nothing.

    A row's first step reads the start token. Its cross-attention's keys and values stay as they are until it leaves;
    those of the answer's tokens grow. A step's inputs and outputs are bound to fixed memory, as in `OnnxDecoder`.
    """

    def __init__(
        self,
        graph: Path,
        encoder: Path,
        start_id: int,
        *,
        max_rows: int,
        intra_op_threads: int = 1,
        provider: str = "cpu",
        device_id: int = 0,
    ) -> None:
        """`start_id` is the token with which every answer begins; it is not part of the answer."""
        self._encoder, self._engine = (
            open_engine(path, intra_op_threads, provider=provider, device_id=device_id) for path in (encoder, graph)
        )
        self._start_id = start_id
        self._float = self._engine.float_type("past_key_0")
        shapes: dict[str, Any] = {**self._engine.inputs, **self._engine.outputs, **self._encoder.inputs}
        parts = [name.removeprefix("past_") for name in shapes if name.startswith(("past_key_", "past_value_"))]
        self._past, self._read = [f"past_{part}" for part in parts], [f"cross_{part}" for part in parts]
        self._outputs = ["logits", *(f"new_{part}" for part in parts)]
        _, heads, _, head_dim = shapes["past_key_0"]
        self.vocab_size: int = shapes["logits"][1]
        self.hidden_size: int = shapes["prompt_embedding_table"][2]
        self.max_rows = max_rows
        self.prefixes = PrefixCache(0, self.vocab_size)  # keeps nothing
        self._pool, self._cross = (KvPool(len(parts), heads, head_dim, max_rows, self._float) for _ in range(2))
        self._no_past = np.zeros((len(parts), heads, 0, head_dim), self._float)
        self._masked = np.zeros((max_rows, heads, 1, head_dim), self._float)  # the graph's input if there is no past
        self._starts = np.full((max_rows, 1), start_id, np.int64)
        self._none = np.zeros(max_rows, np.int64)
        logits = np.zeros((max_rows, self.vocab_size), np.float32)
        new = np.zeros((len(parts), max_rows, heads, 1, head_dim), self._float)
        self._step = BoundStep(self._engine, [self._pool, self._cross], self._outputs, logits, new, self._step_inputs)

    @property
    def rows(self) -> int:
        return self._pool.rows

    @property
    def columns(self) -> int:
        """Columns of cache allocated for every row, for its prompt and for its answer."""
        return self._cross.columns + self._pool.columns

    def recall(self, _: Prompt) -> FloatArray:
        """Return no past: nothing is kept."""
        return self._no_past

    def before_answer(self, _: Prompt) -> npt.NDArray[np.int32]:
        """Return the start token: the answer continues nothing else."""
        return np.array([self._start_id], np.int32)

    def read(self, prompt: Prompt, past: FloatArray, tokens: int) -> FloatArray:
        """Run the encoder on the whole prompt, whatever `tokens` is, without adding a row."""
        del past, tokens
        return np.concatenate(self._encode([prompt]))

    def prefill(self, prompts: Sequence[Prompt], pasts: Sequence[FloatArray]) -> FloatArray:
        """Append one row per prompt -> logits [len(prompts), V] after the start token.

        A past is empty, or the whole prompt's. On error no row is added.
        """
        totals = [prompt.input_ids.size for prompt in prompts]
        if any(past.shape[2] for past in pasts):
            pairs = zip(prompts, pasts, strict=True)
            pasts = [past if past.shape[2] else self.read(prompt, past, 0) for prompt, past in pairs]
            new = [self._masked] * len(self._past)  # of which no column is taken
        else:
            new = self._encode(prompts)
        rows = len(prompts)
        starts = [past.shape[2] for past in pasts]
        self._cross.place(pasts, max(totals))
        self._cross.append(new, starts, [total - start for total, start in zip(totals, starts, strict=True)])
        try:
            logits, *first = self._start(rows)
            self._pool.place([self._no_past] * rows, 1)
        except BaseException:
            for _ in prompts:
                self._cross.drop(self._cross.rows - 1)
            raise
        self._pool.append(first, [0] * rows, [1] * rows)
        return logits

    def step(self, tokens: Int64Array) -> FloatArray:
        """Append one token of the answer to each row: tokens [rows] -> logits [rows, V].

        The logits are valid until the next step.
        """
        return self._step(tokens)

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        self._pool.drop(row)
        self._cross.drop(row)

    def scrub(self, row: int) -> None:
        """Overwrite a row that is not finite, so that the next row in its place reads no NaN."""
        self._pool.scrub(row)
        self._cross.scrub(row)

    def _encode(self, prompts: Sequence[Prompt]) -> list[FloatArray]:
        """Run the encoder -> parts [B, heads, T, head_dim], of which a row's prompt fills the first columns."""
        rows, lengths = len(prompts), [prompt.input_ids.size for prompt in prompts]
        ids = np.zeros((rows, max(lengths)), np.int64)
        visual_tokens = max(1, *(len(prompt.visual_tokens) for prompt in prompts))
        table = np.zeros((rows, visual_tokens, self.hidden_size), self._float)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = prompt.input_ids
            table[row, : len(prompt.visual_tokens)] = prompt.visual_tokens
        feeds: dict[str, Array] = {
            "input_ids": ids,
            "prompt_embedding_table": table,
            "input_lengths": np.array(lengths, np.int64),
        }
        found: list[FloatArray] = self._encoder.run(feeds, self._read)
        return found

    def _start(self, rows: int) -> list[FloatArray]:
        """Run the decoder on the last rows' start tokens -> logits [B, V], parts [B, heads, 1, head_dim]."""
        last = slice(self._cross.rows - rows, self._cross.rows)
        feeds: dict[str, Array] = {
            "input_ids": self._starts[:rows],
            "past_lengths": self._none[:rows],
            "cross_lengths": self._cross.lengths[last],
            **dict.fromkeys(self._past, self._masked[:rows]),
            **dict(zip(self._read, self._cross.arrays[:, last], strict=True)),
        }
        found: list[FloatArray] = self._engine.run(feeds, self._outputs)
        return found

    def _step_inputs(self) -> dict[str, Array]:
        return {
            "past_lengths": self._pool.lengths,
            "cross_lengths": self._cross.lengths,
            **dict(zip(self._past, self._pool.arrays, strict=True)),
            **dict(zip(self._read, self._cross.arrays, strict=True)),
        }
