"""Run two decoders as one, for two sets of weights of one LLM: each row belongs to one of them.

A checkpoint may have other weights for clips and several images (`clip_weights` of the model card). The keys and values
of one set mean nothing to the other. Each set therefore has its own graph and rows, and the batcher sees the rows of
both as one batch. A step runs each graph that has rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.core.prompt import Prompt
from triton_models.decoder import OnnxDecoder
from triton_models.kv_pool import FloatArray, Int64Array
from triton_models.prefix_cache import PrefixCache


class Row(NamedTuple):
    """Where a row of the whole batch is: one of the decoders, and its row there."""

    decoder: OnnxDecoder
    row: int


class TwoDecoders:
    """The decoder of a `batcher.Batcher`; prompts choose between two others by `clip_weights`.

    Both share one prefix cache, which keeps their prompts apart. Each has a pool for `max_rows` rows, which grows with
    its own rows' lengths.
    """

    def __init__(self, own: OnnxDecoder, clips: OnnxDecoder) -> None:
        self._own, self._clips = own, clips
        self._rows: list[Row] = []
        self._logits = np.zeros((own.max_rows, own.vocab_size), np.float32)
        self.vocab_size, self.hidden_size, self.max_rows = own.vocab_size, own.hidden_size, own.max_rows
        self.prefixes: PrefixCache = own.prefixes

    @property
    def rows(self) -> int:
        return len(self._rows)

    @property
    def columns(self) -> int:
        """Columns of cache allocated for every row of the decoder with the longer ones."""
        return max(self._own.columns, self._clips.columns)

    def recall(self, prompt: Prompt) -> FloatArray:
        return self._of(prompt).recall(prompt)

    def before_answer(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        return self._of(prompt).before_answer(prompt)

    def read(self, prompt: Prompt, past: FloatArray, tokens: int) -> FloatArray:
        return self._of(prompt).read(prompt, past, tokens)

    def prefill(self, prompts: Sequence[Prompt], pasts: Sequence[FloatArray]) -> FloatArray:
        """Append one row per prompt -> logits [len(prompts), V]. On error no row is added."""
        logits = np.zeros((len(prompts), self.vocab_size), np.float32)
        added: dict[int, Row] = {}  # by the prompt's place
        before = {decoder: decoder.rows for decoder in (self._own, self._clips)}
        try:
            for decoder in (self._own, self._clips):
                places = [place for place, prompt in enumerate(prompts) if self._of(prompt) is decoder]
                if places:
                    first = decoder.rows
                    logits[places] = decoder.prefill([prompts[i] for i in places], [pasts[i] for i in places])
                    added |= {place: Row(decoder, first + at) for at, place in enumerate(places)}
        except Exception:
            for decoder, rows in before.items():
                while decoder.rows > rows:
                    decoder.scrub(decoder.rows - 1)  # it may not be finite
                    decoder.drop(decoder.rows - 1)
            raise
        self._rows += [added[place] for place in range(len(prompts))]
        return logits

    def step(self, tokens: Int64Array) -> FloatArray:
        """Append one text token to each row: tokens [rows] -> logits [rows, V], valid until the next step."""
        logits = self._logits[: self.rows]
        for decoder in (self._own, self._clips):
            if decoder.rows:
                places = self._places(decoder)
                logits[places] = decoder.step(tokens[places])
        return logits

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place, here and in its decoder."""
        decoder, own = self._rows[row]
        self._rows[self._rows.index(Row(decoder, decoder.rows - 1))] = Row(decoder, own)
        self._rows[row] = self._rows[-1]
        self._rows.pop()
        decoder.drop(own)  # last: it may have no memory to shrink, and its row is gone all the same

    def scrub(self, row: int) -> None:
        decoder, own = self._rows[row]
        decoder.scrub(own)

    def _of(self, prompt: Prompt) -> OnnxDecoder:
        return self._clips if prompt.clip_weights else self._own

    def _places(self, decoder: OnnxDecoder) -> Int64Array:
        """Rows of the whole batch that are the decoder's, in its order."""
        places = np.zeros(decoder.rows, np.int64)
        for place, (of, row) in enumerate(self._rows):
            if of is decoder:
                places[row] = place
        return places
