"""Run an LLM that sees images by cross-attention (IDEFICS), over two KV cache pools: of its text, and of its images.

B: rows. T: text columns. S: visual columns. V: vocabulary size. D: width of a visual token. C: layers of
cross-attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.core.prompt import Prompt
from triton_models.bound_step import BoundStep
from triton_models.engine import Array, open_engine
from triton_models.kv_pool import FloatArray, Int64Array, KvPool
from triton_models.prefix_cache import PrefixCache


@dataclass(frozen=True, slots=True)
class Columns:
    """A prompt's columns, split into its text and its visual tokens."""

    is_visual: npt.NDArray[np.bool_]  # [T + S]
    text: Int64Array  # [T], ids
    starts: Int64Array  # [T]: a text column sees the visual columns from here on
    ends: Int64Array  # [T]: and before here; none if both are equal
    visual: FloatArray  # [S, D]

    @classmethod
    def of(cls, prompt: Prompt, vocab_size: int, end_id: int) -> Columns:
        """Split a prompt.

        A text column sees the last unbroken run of visual tokens before it, which is one image in the prompts of
        IdeficsProcessor. After an `end_id` it sees none, up to the next image.
        """
        ids = prompt.input_ids.astype(np.int64)
        visual = ids >= vocab_size
        place = np.arange(ids.size)
        before = np.cumsum(visual)  # visual columns up to each column
        begins = visual & ~np.concatenate([[False], visual[:-1]])
        starts = np.maximum.accumulate(np.where(begins, before - 1, 0))
        last_image = np.maximum.accumulate(np.where(visual, place, -1))
        ended = np.concatenate([[False], ids[:-1] == end_id])
        last_end = np.maximum.accumulate(np.where(ended, place, -1))
        ends = np.where(last_end > last_image, starts, before)
        return cls(visual, ids[~visual], starts[~visual], ends[~visual], prompt.visual_tokens[ids[visual] - vocab_size])


class OnnxCrossDecoder:
    """Run the LLM over rows that join with a prompt, grow by one token per step and leave, as `OnnxDecoder` does.

    The past of a prompt has a column for each of its tokens, as that of `OnnxDecoder`: [parts, heads, n, head_dim]. A
    word's column holds its keys and values of every layer. A visual token's holds those of the C layers of
    cross-attention in its first 2 C parts, and zeros. They depend on nothing else, so an image may be read in pieces.

    In the pools text and visual tokens are apart. A row's cross-attention reads the row's last image, which stays the
    same until it leaves. A step's inputs and outputs are bound to fixed memory, as in `OnnxDecoder`.
    """

    def __init__(
        self,
        graph: Path,
        reader: Path,
        end_id: int,
        *,
        max_rows: int,
        intra_op_threads: int = 1,
        prefix_cache_bytes: int = 0,
        provider: str = "cpu",
        device_id: int = 0,
    ) -> None:
        """`reader` is the graph that makes keys and values of visual tokens. After `end_id` a text sees no image."""
        self._reader, self._engine = (
            open_engine(path, intra_op_threads, provider=provider, device_id=device_id) for path in (reader, graph)
        )
        self._end_id = end_id
        self._float = self._engine.float_type("past_key_0")
        shapes: dict[str, Any] = {**self._engine.inputs, **self._engine.outputs, **self._reader.inputs}
        parts = [name.removeprefix("past_") for name in shapes if name.startswith(("past_key_", "past_value_"))]
        self._past = [f"past_{part}" for part in parts]
        self._seen = [name for name in shapes if name.startswith(("cross_key_", "cross_value_"))]
        self._outputs = ["logits", *(f"new_{part}" for part in parts)]
        _, heads, _, head_dim = shapes["past_key_0"]
        self.vocab_size: int = shapes["logits"][1]
        self.hidden_size: int = shapes["prompt_embedding_table"][2]
        self.max_rows = max_rows
        self.prefixes = PrefixCache(prefix_cache_bytes, self.vocab_size)
        self._pool = KvPool(len(parts), heads, head_dim, max_rows, self._float)
        self._images = KvPool(len(self._seen), heads, head_dim, max_rows, self._float)
        self._no_past = np.zeros((len(parts), heads, 0, head_dim), self._float)
        self._masked = np.zeros((max_rows, heads, 1, head_dim), self._float)  # the graph's input if there is none
        self._no_image = np.zeros((len(self._seen), heads, 1, head_dim), self._float)  # the same
        self._ones = np.ones(max_rows, np.int64)
        self._starts, self._ends = np.zeros((2, max_rows, 1), np.int64)  # of each row's last image
        logits = np.zeros((max_rows, self.vocab_size), np.float32)
        new = np.zeros((len(parts), max_rows, heads, 1, head_dim), self._float)
        self._step = BoundStep(self._engine, [self._pool, self._images], self._outputs, logits, new, self._step_inputs)

    @property
    def rows(self) -> int:
        return self._pool.rows

    @property
    def columns(self) -> int:
        """Columns of cache allocated for every row, for its text and for its images."""
        return self._images.columns + self._pool.columns

    def recall(self, prompt: Prompt) -> FloatArray:
        """Return the past of the prompt's first n tokens from the prefix cache.

        n is less than the prompt's length, and 0 if the cache has no usable prefix.
        """
        known = self.prefixes.recall(prompt)
        return self._no_past if known is None else known

    def before_answer(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        """Return the prompt's words: the answer continues them."""
        return prompt.input_ids[prompt.input_ids < self.vocab_size]

    def read(self, prompt: Prompt, past: FloatArray, tokens: int) -> FloatArray:
        """Extend `past` to the prompt's first `tokens` tokens, without adding a row.

        `tokens` must exceed the columns of `past`.
        """
        start, columns = past.shape[2], self._columns(prompt)
        known, new = columns.is_visual[:start], columns.is_visual[start:tokens]
        text, images = past[:, :, ~known], past[: len(self._seen), :, known]
        (added,) = self._look([columns.visual[images.shape[2] :][: np.count_nonzero(new)]])
        images = np.concatenate([images, added], axis=2)
        words = slice(text.shape[2], text.shape[2] + np.count_nonzero(~new))
        found = self._no_past
        if words.start < words.stop:
            seen = images if images.shape[2] else self._no_image
            _, *parts = self._run([columns], [words], text[:, np.newaxis], seen[:, np.newaxis])
            found = np.concatenate(parts)
        return np.concatenate([past, self._joined(new, found, added)], axis=2)

    def prefill(self, prompts: Sequence[Prompt], pasts: Sequence[FloatArray]) -> FloatArray:
        """Append one row per prompt -> logits [len(prompts), V] after its last token, which is a word.

        Every past is shorter than its prompt. On error no row is added.
        """
        split = [self._columns(prompt) for prompt in prompts]
        known = [each.is_visual[: past.shape[2]] for each, past in zip(split, pasts, strict=True)]
        texts = [past[:, :, ~visual] for past, visual in zip(pasts, known, strict=True)]
        images = [past[: len(self._seen), :, visual] for past, visual in zip(pasts, known, strict=True)]
        first, rows = self.rows, len(prompts)
        added = self._look([each.visual[past.shape[2] :] for each, past in zip(split, images, strict=True)])
        self._images.place(images, max(len(each.visual) for each in split))
        for past, new in zip(images, added, strict=True):
            self._images.append(list(new[:, np.newaxis]), [past.shape[2]], [new.shape[2]])
        try:
            words = [slice(text.shape[2], each.text.size) for text, each in zip(texts, split, strict=True)]
            placed = self._pool.place(texts, max(each.text.size for each in split))
            seen = self._images.arrays[:, first : first + rows]
            logits, *parts = self._run(split, words, placed, seen)
        except BaseException:
            for _ in prompts:
                self._images.drop(self._images.rows - 1)
            raise
        self._pool.append(parts, [each.start for each in words], [each.stop - each.start for each in words])
        for row, (prompt, columns) in enumerate(zip(prompts, split, strict=True)):
            self._starts[first + row], self._ends[first + row] = columns.starts[-1], columns.ends[-1]
            with contextlib.suppress(MemoryError):  # the answer needs no cache
                if np.isfinite(logits[row]).all():
                    pair = self._pool.row(first + row), self._images.row(first + row)
                    self.prefixes.keep(prompt, self._joined(columns.is_visual, *pair))
        return logits

    def step(self, tokens: Int64Array) -> FloatArray:
        """Append one word to each row: tokens [rows] -> logits [rows, V]. It sees what the prompt's last word saw.

        The logits are valid until the next step.
        """
        return self._step(tokens)

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        last = self.rows - 1
        self._starts[row], self._ends[row] = self._starts[last], self._ends[last]
        self._pool.drop(row)
        self._images.drop(row)

    def scrub(self, row: int) -> None:
        """Overwrite a row that is not finite, so that the next row in its place reads no NaN."""
        self._pool.scrub(row)
        self._images.scrub(row)

    def _columns(self, prompt: Prompt) -> Columns:
        return Columns.of(prompt, self.vocab_size, self._end_id)

    def _look(self, visual: Sequence[FloatArray]) -> list[FloatArray]:
        """Make keys and values of visual tokens, [n, D] each -> [2 C, heads, n, head_dim] each."""
        lengths = [len(rows) for rows in visual]
        if not any(lengths):
            return [self._no_past[: len(self._seen)]] * len(visual)
        table = np.zeros((len(visual), max(lengths), self.hidden_size), self._float)
        for row, tokens in enumerate(visual):
            table[row, : len(tokens)] = tokens
        found = np.stack(self._reader.run({"prompt_embedding_table": table}, self._seen))
        return [found[:, row, :, :length] for row, length in enumerate(lengths)]

    def _joined(self, is_visual: npt.NDArray[np.bool_], text: FloatArray, images: FloatArray) -> FloatArray:
        """Put the columns of text and of visual tokens in the prompt's order: a past."""
        parts, heads, _, head_dim = text.shape
        past = np.zeros((parts, heads, is_visual.size, head_dim), self._float)
        past[:, :, ~is_visual] = text
        past[: len(images), :, is_visual] = images
        return past

    def _run(
        self, split: Sequence[Columns], words: Sequence[slice], past: FloatArray, images: FloatArray
    ) -> list[FloatArray]:
        """Run the decoder on some words of each prompt -> logits [B, V], parts [B, heads, T, head_dim].

        `past` is [parts, B, heads, P, head_dim], of which the words before each slice are valid. `images` are [2 C, B,
        heads, S, head_dim].
        """
        rows, lengths = len(split), [each.stop - each.start for each in words]
        ids, starts, ends = np.zeros((3, rows, max(lengths)), np.int64)
        for row, (columns, part) in enumerate(zip(split, words, strict=True)):
            ids[row, : lengths[row]] = columns.text[part]
            starts[row, : lengths[row]] = columns.starts[part]
            ends[row, : lengths[row]] = columns.ends[part]
        read = past if any(part.start for part in words) else [self._masked[:rows]] * len(self._past)
        feeds: dict[str, Array] = {
            "input_ids": ids,
            "past_lengths": np.array([part.start for part in words], np.int64),
            "input_lengths": np.array(lengths, np.int64),
            "image_starts": starts,
            "image_ends": ends,
            **dict(zip(self._past, read, strict=True)),
            **dict(zip(self._seen, images, strict=True)),
        }
        found: list[FloatArray] = self._engine.run(feeds, self._outputs)
        return found

    def _step_inputs(self) -> dict[str, Array]:
        return {
            "past_lengths": self._pool.lengths,
            "input_lengths": self._ones,
            "image_starts": self._starts,
            "image_ends": self._ends,
            **dict(zip(self._past, self._pool.arrays, strict=True)),
            **dict(zip(self._seen, self._images.arrays, strict=True)),
        }
