"""Tell which tokens guided rows of the batch may draw next.

A thread of its own takes the drawn tokens and computes the next masks while the decoder runs, so that rows without a
guide do not wait for them. If that thread got no core meanwhile, the batcher's thread computes them itself. Only the
batcher's thread calls `Masks`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from dataclasses import dataclass, field
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from service.text.guides import WORD_BITS, Compiled

BoolArray = npt.NDArray[np.bool_]
Int64Array = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class _Row:
    guide: Compiled
    matcher: Any
    taken: list[int] = field(default_factory=list)  # tokens that the matcher took
    token: int | None = None  # drawn, and not taken by the matcher yet
    outgrown: str = ""  # why the shared lexer failed, of a row whose guide was compiled anew
    fault: str = ""  # why no token can come next

    @classmethod
    def of(cls, guide: Compiled) -> _Row:
        return cls(guide, guide.matcher.deep_copy())

    def renew(self) -> None:
        """Let a matcher with a lexer of its own take the same tokens: other rows may have filled the shared one."""
        self.outgrown = self.matcher.get_error().partition("\n")[0]
        self.matcher = self.guide.anew().matcher
        self.matcher.consume_tokens(self.taken)


@dataclass(frozen=True, slots=True)
class Allowed:
    """The guided rows of one draw."""

    rows: Int64Array  # [k], counted from the draw's first row
    tokens: BoolArray  # [k, V]


@dataclass(slots=True)
class Masks:
    """Hold the matcher and the mask of each guided row, compact at the front like the KV cache."""

    max_rows: int
    vocab_size: int
    _rows: list[_Row | None] = field(default_factory=list)
    _guided: int = 0
    _places: Int64Array | None = None  # the guided rows, until rows come or go
    _worker: _Worker | None = None
    _is_working: bool = False

    def append(self, guide: Compiled | None) -> None:
        """Add a last row."""
        self._settle()
        if guide is not None:
            if self._worker is None:
                self._worker = _Worker(self.max_rows, self.vocab_size)
            self._worker.unpack([len(self._rows)], guide.first_mask[np.newaxis])
            self._guided += 1
        self._places = None
        self._rows.append(None if guide is None else _Row.of(guide))

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""
        self._settle()
        last = self._rows.pop()
        gone = self._rows[row] if row < len(self._rows) else last
        self._guided -= gone is not None
        self._places = None
        if row < len(self._rows):
            self._rows[row] = last
            if last is not None and self._worker is not None:
                self._worker.tokens[row] = self._worker.tokens[len(self._rows)]

    def allowed(self, first: int) -> Allowed | None:
        """Return the masks of the guided rows first, first + 1, ...; None if there are none."""
        if not self._guided or self._worker is None:
            return None
        self._settle()
        if self._places is None:
            self._places = np.array([row for row, each in enumerate(self._rows) if each is not None])
        places = self._places[self._places >= first] if first else self._places
        return Allowed(places - first, self._worker.tokens[places]) if places.size else None

    def faults(self, first: int) -> dict[int, str]:
        """Return why a guide allows no token, by the place of its row, counted from `first`."""
        if self._worker is None or not self._worker.has_faults:
            return {}
        return {place: each.fault for place, each in enumerate(self._rows[first:]) if each is not None and each.fault}

    def take(self, first: int, tokens: list[int]) -> None:
        """Note the drawn tokens of the rows first, first + 1, ... Rows that end are dropped before `compute`."""
        if self._guided:
            for each, token in zip(self._rows[first:], tokens, strict=True):
                if each is not None:
                    each.token = token

    def compute(self) -> None:
        """Start computing the next masks of the rows whose tokens were noted."""
        if self._guided and self._worker is not None:
            due = [(row, each) for row, each in enumerate(self._rows) if each is not None and each.token is not None]
            if due:
                self._worker.jobs.put(due)
                self._is_working = True

    def clear(self) -> None:
        """Remove all rows, whatever the worker says of them."""
        with contextlib.suppress(Exception):
            self._settle()
        self._rows.clear()
        self._places = None
        self._guided = 0

    def close(self) -> None:
        """End the worker."""
        self.clear()
        if self._worker is not None:
            self._worker.jobs.put(None)
            self._worker.join()
            self._worker = None

    def _settle(self) -> None:
        if self._is_working and self._worker is not None:
            self._is_working = False
            try:
                due = self._worker.jobs.get_nowait()
            except queue.Empty:  # the worker has taken it
                if (error := self._worker.done.get()) is not None:
                    raise error from None
            else:
                self._worker.advance(due or [])


class _Worker(threading.Thread):
    """Advance matchers and compute masks, one job at a time."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        super().__init__(name="llm-masks", daemon=True)
        words = -(-vocab_size // WORD_BITS)
        self.tokens: BoolArray = np.zeros((max_rows, vocab_size), bool)  # that each row may draw
        self.has_faults = False
        self._masks = np.zeros((max_rows, words), np.int32)
        self.jobs: queue.SimpleQueue[list[tuple[int, _Row]] | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._address = self._masks.ctypes.data
        self._executor = llguidance.LLExecutor(num_threads=1)
        self.start()

    def run(self) -> None:
        while (due := self.jobs.get()) is not None:
            try:
                self.advance(due)
            except Exception as error:  # the batcher's thread raises it
                self.done.put(error)
            else:
                self.done.put(None)

    def advance(self, due: list[tuple[int, _Row]]) -> None:
        """Take the rows' tokens and compute their next masks, without Python's lock."""
        self._executor.consume_token_par([(each.matcher, each.token) for _, each in due if each.token is not None])
        for _, each in due:
            if each.token is not None:
                each.taken.append(each.token)
                each.token = None
        self._mask(due)
        if again := [(row, each) for row, each in due if each.matcher.is_error() and not each.outgrown]:
            for _, each in again:
                each.renew()
            self._mask(again)
        for _, each in due:
            if each.matcher.is_error():
                each.fault = each.outgrown  # what a lexer of its own says is less plain
                self.has_faults = True

    def _mask(self, due: list[tuple[int, _Row]]) -> None:
        wanted = [(each.matcher, place) for place, (_, each) in enumerate(due)]
        self._executor.unsafe_compute_mask_ptr(wanted, self._address, self._masks.strides[0], len(self._masks))
        self.unpack([row for row, _ in due], self._masks[: len(due)])

    def unpack(self, rows: list[int], masks: npt.NDArray[np.int32]) -> None:
        """Keep the masks [k, words] of these rows, one bool a token."""
        bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
        self.tokens[rows] = bits[:, : self.tokens.shape[1]].view(np.bool_)
