"""Batch in flight: a request joins at the next iteration and leaves when done.

This module depends on neither Triton nor ONNX: it takes sequences and returns events. One thread calls `iterate`; any
thread may call `submit` and `stop`. Every accepted sequence ends in exactly one event with `finished` set, or in the
list that `drain` returns.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from service.core.guide import GUIDE
from service.core.prompt import Prompt
from service.core.request import Sampling
from service.text.guides import Compiled
from triton_models.masks import Masks
from triton_models.sampling import Likeliest, Sampler

FloatArray = npt.NDArray[np.floating]

NO_PAST: FloatArray = np.zeros((1, 1, 0, 1), np.float32)


class Decoder(Protocol):
    """The LLM over a KV cache whose rows grow by one token per step.

    Rows are compact: 0 .. rows-1. The past of a prompt is what its first n tokens leave behind for the answer: keys and
    values of a decoder-only LLM's layers, or of the cross-attention of an encoder-decoder. It belongs to the request,
    and `prefill` makes it a row.
    """

    vocab_size: int
    max_rows: int

    @property
    def rows(self) -> int: ...

    def recall(self, prompt: Prompt) -> FloatArray:
        """Return the cached past of the prompt's first n tokens: [parts, heads, n, head_dim].

        n may be 0 and is less than the prompt's length.
        """

    def before_answer(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        """Return the ids that the answer continues, for the repetition penalty."""

    def read(self, prompt: Prompt, past: FloatArray, tokens: int) -> FloatArray:
        """Extend `past` to at least the prompt's first `tokens` tokens, without adding a row.

        A decoder that cannot read in parts reads the whole prompt.
        """

    def prefill(self, prompts: SequenceOf[Prompt], pasts: SequenceOf[FloatArray]) -> FloatArray:
        """Append one row per prompt, each with its known past -> logits [len(prompts), V].

        On error no row is added.
        """

    def step(self, tokens: npt.NDArray[np.int64]) -> FloatArray:
        """Append one token to each row: tokens [rows] -> logits [rows, V]."""

    def drop(self, row: int) -> None:
        """Remove a row; the last row takes its place."""

    def scrub(self, row: int) -> None:
        """Overwrite the row's cache so that the next row in its place cannot read it."""


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one request in the batcher."""

    request_id: str
    prompt: Prompt
    sampling: Sampling
    end_id: int
    guide: Compiled | None = None  # constrains the answer
    owner: Any = None  # the caller's object: the batcher carries it and never reads it
    cancelled: bool = False  # any thread may set it; the sequence ends at the next iteration
    generated: int = 0
    log_prob: float = 0.0  # sum over all tokens so far
    submitted_at: int = 0  # the batcher's iteration number at `submit`
    past: FloatArray = field(default_factory=lambda: NO_PAST)  # keys and values of the prompt's first tokens

    @property
    def unread(self) -> int:
        """Number of tokens that still need a prefill; at least 1, for the token that gives the first logits."""
        return max(1, int(self.prompt.input_ids.size - self.past.shape[2]))


class Event(NamedTuple):
    """One token of one sequence, or the sequence's end without a token.

    An end without a token is a cancellation if `error` is None, otherwise a failure. The event carries all values that
    its receiver needs: the sequence may have generated another token by the time the event is sent.
    """

    sequence: Sequence
    token: int | None
    log_prob: float
    finished: bool
    error: str | None = None
    generated: int = 0  # tokens so far, this one included
    total_log_prob: float = 0.0  # sum over those tokens
    likeliest: Likeliest | None = None  # if the sequence asks for them
    code: str = "INTERNAL"  # of the error, by gRPC's name


def ended(sequence: Sequence, error: str | None = None, code: str = "INTERNAL", untold: int = 0) -> Event:
    """End a sequence without a token. `untold` of its tokens are in no event."""
    return Event(sequence, None, 0.0, True, error, sequence.generated - untold, code=code)


class QueueFull(Exception):
    """The batcher's queue is full."""


class Closed(Exception):
    """The batcher accepts no more sequences."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the queue and on the work of one iteration."""

    max_queue: int = 64  # sequences waiting for a row
    max_prefill_tokens: int = 160  # rows x longest unread prompt in one prefill; bounds how long running rows wait
    max_prefill_padding: float = 0.25  # share of a prefill that may be padding
    cancel_check_tokens: int = 4  # tokens between two checks whether the caller has gone


def _nobody(_: Sequence) -> bool:
    return False


class Batcher:
    """Hold the queue and the running rows, and run one iteration at a time.

    `is_abandoned` returns whether a sequence's caller has gone. It may be slow (0.1 ms in Triton). It is therefore
    called every `cancel_check_tokens` tokens, after they were handed out, and before the prefill of a sequence that
    had to wait.
    """

    def __init__(self, decoder: Decoder, limits: Limits, is_abandoned: Callable[[Sequence], bool] = _nobody) -> None:
        self._decoder = decoder
        self._limits = limits
        self._is_abandoned = is_abandoned
        self._sampler = Sampler(decoder.max_rows, decoder.vocab_size)
        self._masks = Masks(decoder.max_rows, decoder.vocab_size)
        self._waiting: deque[Sequence] = deque()
        self._joining: list[Sequence] = []  # in this iteration's prefill, until they are rows
        self._running: list[Sequence] = []  # running[i] owns the decoder's row i
        self._tokens = np.zeros(decoder.max_rows, np.int64)  # each row's next input token
        self._left = np.zeros(decoder.max_rows, np.int64)  # tokens each row may still generate
        self._end_ids = np.zeros(decoder.max_rows, np.int64)
        self._to_ask: list[Sequence] = []  # due for a check whether their callers have gone
        self.iterations = 0  # calls of `iterate`, with or without a run of the decoder
        self.tokens = 0
        self.prefix_hits = 0  # prompts whose first tokens were in the prefix cache
        self.prefix_tokens = 0  # tokens of those prompts that needed no prefill
        self.read: list[tuple[Sequence, int]] = []  # the last iteration's sequences, each with the tokens it read
        self._prefilled = False  # the last iteration was a prefill, so the running rows go next
        self._closed = False
        self._work = threading.Condition()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull, Closed."""
        with self._work:
            if self._closed:
                raise Closed("the model is being unloaded")
            if len(self._waiting) >= self._limits.max_queue:
                raise QueueFull(f"Exceeds maximum queue size {self._limits.max_queue}")
            sequence.submitted_at = self.iterations
            self._waiting.append(sequence)
            self._work.notify()

    def stop(self, request_id: str) -> int:
        """Cancel the sequences with that id at the next iteration -> their number."""
        with self._work:
            everyone = (*self._waiting, *self._joining, *self._running)
            stopped = [each for each in everyone if each.request_id == request_id]
            for sequence in stopped:
                sequence.cancelled = True
        return len(stopped)

    def wait(self) -> bool:
        """Block until there is work (True) or the batcher is closed (False)."""
        with self._work:
            self._work.wait_for(lambda: self._closed or self._running or self._waiting)
            return not self._closed

    def close(self) -> None:
        """Refuse further sequences and wake the loop."""
        with self._work:
            self._closed = True
            self._work.notify_all()

    def drain(self) -> list[Sequence]:
        """Remove and return the unfinished sequences. Call it after the loop has ended."""
        left = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        self._masks.close()
        return left

    def iterate(self) -> list[Event]:
        """Run the decoder once, for a prefill or a step -> events.

        Prefills and steps alternate while both have work. It never raises: an error outside the decoder fails every
        sequence that took part in the iteration.
        """
        self.read = []
        with self._work:
            everyone = [*self._running, *self._waiting]
        try:
            events = self._iterate()
        except Exception as error:
            return self._reset(everyone, error)
        if self._joining:  # prefills that failed, and sequences whose callers have gone
            self._end_joining(self._joining)
        return events

    def _end_joining(self, group: SequenceOf[Sequence], running: SequenceOf[Sequence] = ()) -> None:
        """Take the group out of the iteration's prefill, and add the new rows."""
        with self._work:
            self._joining = [each for each in self._joining if each not in group]
            self._running += running

    def _iterate(self) -> list[Event]:
        self.iterations += 1
        events = self._reap()
        group = [] if self._prefilled and self._running else self._admit()
        gone = [each for each in group if each.submitted_at < self.iterations - 1 and self._is_abandoned(each)]
        if gone:
            events += [ended(each) for each in gone]
            group = [each for each in group if each not in gone]
        self._prefilled = bool(group)
        if group and group[0].unread > self._limits.max_prefill_tokens:
            events += self._read_on(group[0])
        elif group:
            events += self._prefill(group)
        elif self._running:
            events += self._step()
        return events

    def _reset(self, everyone: list[Sequence], error: Exception) -> list[Event]:
        """Empty the rows -> a failed event for each sequence that is no longer in the queue.

        The iteration's own events are lost.
        """
        while self._decoder.rows:
            self._decoder.scrub(self._decoder.rows - 1)
            self._decoder.drop(self._decoder.rows - 1)
        with self._work:
            # A sequence submitted during the iteration and admitted at once is in the batch, but not in `everyone`.
            had_a_part = dict.fromkeys((*everyone, *self._joining, *self._running))
            failed = [each for each in had_a_part if each not in self._waiting]
            self._running.clear()
            self._joining = []
        self._to_ask.clear()
        self._sampler.rows = 0
        self._masks.clear()
        return [ended(each, f"the batch failed: {error}") for each in failed]

    def _reap(self) -> list[Event]:
        """Remove cancelled sequences from the rows and the queue."""
        for sequence in self._to_ask:
            if self._is_abandoned(sequence):  # never reset it to False: `stop` may set it at the same time
                sequence.cancelled = True
        self._to_ask.clear()
        with self._work:
            gone = [each for each in self._waiting if each.cancelled]
            for sequence in gone:
                self._waiting.remove(sequence)
        for row in reversed(range(len(self._running))):
            if self._running[row].cancelled:
                gone.append(self._running[row])
                self._drop(row)
        return [ended(each) for each in gone]

    def _admit(self) -> list[Sequence]:
        """Take the head of the queue and the sequences behind it that fit into the same prefill.

        A prompt that is longer than one prefill is taken alone.
        """
        with self._work:
            room = self._decoder.max_rows - len(self._running)
            limits = self._limits
            group: list[Sequence] = []
            longest = total = 0
            for sequence in self._waiting:
                if len(group) == room or longest * (len(group) + 1) > limits.max_prefill_tokens:
                    break
                first = sequence.past is NO_PAST
                known = self._decoder.recall(sequence.prompt) if first else sequence.past
                unread = max(1, sequence.prompt.input_ids.size - known.shape[2])
                most = max(longest, unread)
                cells = most * (len(group) + 1)
                padding = 1 - (total + unread) / cells
                if not group or (cells <= limits.max_prefill_tokens and padding <= limits.max_prefill_padding):
                    group.append(sequence)
                    longest, total = most, total + unread
                    sequence.past = known
                    if first:
                        self.prefix_hits += known.shape[2] > 0
                        self.prefix_tokens += known.shape[2]
            for sequence in group:
                self._waiting.remove(sequence)
            self._joining = group
            return group

    def _read_on(self, sequence: Sequence) -> list[Event]:
        """Read one part of a long prompt; the sequence stays at the head of the queue."""
        self.read = [(sequence, self._limits.max_prefill_tokens)]
        tokens = sequence.past.shape[2] + self._limits.max_prefill_tokens
        try:
            sequence.past = self._decoder.read(sequence.prompt, sequence.past, tokens)
        except Exception as error:
            return [ended(sequence, f"prefill failed: {error}")]
        with self._work:
            self._joining = []
            self._waiting.appendleft(sequence)
        return []

    def _prefill(self, group: list[Sequence]) -> list[Event]:
        self.read += [(each, each.unread) for each in group]
        try:
            logits = self._decoder.prefill([each.prompt for each in group], [each.past for each in group])
        except Exception as error:  # whatever it was, it ends these sequences and not the loop
            if len(group) > 1:
                return [event for each in group for event in self._prefill([each])]
            return [ended(group[0], f"prefill failed: {error}")]
        first = len(self._running)
        for row, sequence in enumerate(group, first):
            sequence.past = NO_PAST  # the sequence's row holds it now
            self._sampler.append(sequence.sampling, self._decoder.before_answer(sequence.prompt))
            self._masks.append(sequence.guide)
            self._left[row] = sequence.sampling.max_tokens
            self._end_ids[row] = sequence.end_id
        self._end_joining(group, group)
        return self._draw(logits, first)

    def _step(self) -> list[Event]:
        rows = len(self._running)
        self.read = [(each, 1) for each in self._running]
        try:
            logits = self._decoder.step(self._tokens[:rows])
        except Exception as error:  # whatever it was, it ends these sequences and not the loop
            failed = self._running.copy()
            for row in reversed(range(rows)):
                self._decoder.scrub(row)
                self._drop(row)
            return [ended(each, f"decode step failed: {error}") for each in failed]
        return self._draw(logits, 0)

    def _draw(self, logits: npt.NDArray[np.float32], first: int) -> list[Event]:
        """Draw the next token of rows first, first+1, ... and drop the finished rows."""
        rows = slice(first, len(self._running))
        tokens, log_probs = self._sampler.draw(logits, first, self._masks.allowed(first))
        self._masks.take(first, tokens.tolist())
        self._tokens[rows] = tokens
        self._left[rows] -= 1
        self.tokens += len(tokens)
        faults = self._faults(log_probs, first)
        finished = (tokens == self._end_ids[rows]) | (self._left[rows] <= 0)
        finished[list(faults)] = True
        likeliest = self._sampler.likeliest(logits, first)
        events = []
        for place, (sequence, token, log_prob, done) in enumerate(
            zip(self._running[rows], tokens.tolist(), log_probs.tolist(), finished.tolist(), strict=True)
        ):
            sequence.generated += 1
            sequence.log_prob += log_prob
            if not done and sequence.generated % self._limits.cancel_check_tokens == 0:
                self._to_ask.append(sequence)
            told = (sequence.generated, sequence.log_prob, likeliest.get(place))
            events.append(Event(sequence, token, log_prob, done, None, *told))
        if finished.any():
            for index in reversed(np.flatnonzero(finished).tolist()):
                if index in faults:
                    error, code = faults[index]
                    events[index] = ended(events[index].sequence, error, code, untold=1)
                    self._decoder.scrub(first + index)
                self._drop(first + index)
        self._masks.compute()
        return events

    def _faults(self, log_probs: FloatArray, first: int) -> dict[int, tuple[str, str]]:
        """Return why rows cannot go on, and the error's code, by their places from `first` on."""
        faults = dict.fromkeys(
            np.flatnonzero(~np.isfinite(log_probs)).tolist(), ("the model's logits are not finite", "INTERNAL")
        )
        return faults | {
            place: (f"{GUIDE} became too complex as the answer grew ({why}): simplify it", "INVALID_ARGUMENT")
            for place, why in self._masks.faults(first).items()
        }

    def _drop(self, row: int) -> None:
        """Remove row `row`; the last row takes its place in all arrays."""
        last = len(self._running) - 1
        self._decoder.drop(row)
        self._sampler.drop(row)
        self._masks.drop(row)
        for column in (self._tokens, self._left, self._end_ids):
            column[row] = column[last]
        self._running[row] = self._running[last]
        self._running.pop()
