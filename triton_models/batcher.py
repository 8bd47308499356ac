"""In-flight batching: a request joins at the next iteration and leaves when it is done.

Pure of Triton and of ONNX: sequences in, events out. One thread calls `iterate`; any thread may submit and stop. Every
accepted sequence ends in exactly one event with `finished` set, or in what `drain` returns.
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

from service.core.prompt import Prompt
from service.core.request import Sampling
from triton_models.sampling import Sampler

FloatArray = npt.NDArray[np.floating]

NO_PAST: FloatArray = np.zeros((1, 1, 0, 1), np.float32)


class Decoder(Protocol):
    """Rows of cache that grow by a token a step. Rows are compact: 0 .. rows-1."""

    vocab_size: int
    max_rows: int

    @property
    def rows(self) -> int: ...

    def recall(self, prompt: Prompt) -> FloatArray:
        """What is known of the prompt's first tokens, fewer than all: [parts, heads, n, head_dim], n may be 0."""

    def read(self, prompt: Prompt, past: FloatArray, tokens: int) -> FloatArray:
        """From what is known of the prompt to what is to be known of its first `tokens` tokens, without a row."""

    def prefill(self, prompts: SequenceOf[Prompt], pasts: SequenceOf[FloatArray]) -> FloatArray:
        """Append one row a prompt, of which its past is known -> logits [len(prompts), V]. On error no row is added."""

    def step(self, tokens: npt.NDArray[np.int64]) -> FloatArray:
        """Append tokens [rows] -> logits [rows, V]."""

    def drop(self, row: int) -> None:
        """Forget a row; the last row takes its place."""

    def scrub(self, row: int) -> None:
        """Make sure that nothing of the row is left for the next one in its place."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way through the batch."""

    request_id: str
    prompt: Prompt
    sampling: Sampling
    end_id: int
    owner: Any = None  # the caller's own: carried, never read
    cancelled: bool = False  # set by any thread; the sequence ends at the next iteration
    generated: int = 0
    log_prob: float = 0.0  # of all tokens so far
    submitted_at: int = 0  # the batcher's iteration
    past: FloatArray = field(default_factory=lambda: NO_PAST)  # what the decoder knows of the prompt

    @property
    def unread(self) -> int:
        """Tokens of the prompt that the decoder has yet to read."""
        return int(self.prompt.input_ids.size - self.past.shape[2])


class Event(NamedTuple):
    """One token of one sequence, or its end without one: cancelled when `error` is None, else failed.

    It says all there is to tell: when it is told, the sequence may be a token further.
    """

    sequence: Sequence
    token: int | None
    log_prob: float
    finished: bool
    error: str | None = None
    generated: int = 0  # tokens up to this one
    total_log_prob: float = 0.0  # of them all


class QueueFull(Exception):
    """No room for another sequence now."""


class Closed(Exception):
    """The batcher takes no more sequences."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds the work in one iteration and the sequences that wait for one."""

    max_queue: int = 64  # sequences waiting for a row
    max_prefill_tokens: int = 160  # rows x longest rest of a prompt in one prefill: running rows wait for no more
    max_prefill_padding: float = 0.25  # share of a prefill that may be padding
    cancel_check_tokens: int = 4  # a caller is asked every so many tokens whether it still listens


def _nobody(_: Sequence) -> bool:
    return False


class Batcher:
    """The queue, the running rows and the loop's body.

    `is_abandoned` tells whether a sequence's caller has gone. It may be slow (0.1 ms in Triton), so it is asked every
    `cancel_check_tokens` tokens, after they were handed out, and before the prefill of a sequence that had to wait.
    """

    def __init__(self, decoder: Decoder, limits: Limits, is_abandoned: Callable[[Sequence], bool] = _nobody) -> None:
        self._decoder = decoder
        self._limits = limits
        self._is_abandoned = is_abandoned
        self._sampler = Sampler(decoder.max_rows, decoder.vocab_size)
        self._waiting: deque[Sequence] = deque()
        self._joining: list[Sequence] = []  # in the prefill of this iteration
        self._running: list[Sequence] = []  # running[i] owns the decoder's row i
        self._tokens = np.zeros(decoder.max_rows, np.int64)  # what each row says next to the decoder
        self._left = np.zeros(decoder.max_rows, np.int64)  # tokens each row may still generate
        self._end_ids = np.zeros(decoder.max_rows, np.int64)
        self._to_ask: list[Sequence] = []  # whether their callers still listen
        self.iterations = 0  # runs of the decoder, and turns without one
        self.tokens = 0
        self.prefix_hits = 0  # prompts whose beginning was known
        self.prefix_tokens = 0  # of those, the tokens that were not read again
        self._prefilled = False  # the last iteration was a prefill: now it is the running rows' turn
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
        """End the sequences with that id at the next iteration -> how many there were."""
        with self._work:
            everyone = (*self._waiting, *self._joining, *self._running)
            stopped = [each for each in everyone if each.request_id == request_id]
            for sequence in stopped:
                sequence.cancelled = True
        return len(stopped)

    def wait(self) -> bool:
        """Block until there is work -> True, or the batcher is closed -> False."""
        with self._work:
            self._work.wait_for(lambda: self._closed or self._running or self._waiting)
            return not self._closed

    def close(self) -> None:
        """Take no more sequences and wake the loop."""
        with self._work:
            self._closed = True
            self._work.notify_all()

    def drain(self) -> list[Sequence]:
        """After the loop has ended: the sequences that got no end."""
        left = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        return left

    def iterate(self) -> list[Event]:
        """One run of the decoder, a prefill or a step; they alternate while both have work.

        Never raises: whatever goes wrong outside the decoder fails every sequence that had a part in it.
        """
        with self._work:
            everyone = [*self._running, *self._waiting]
        try:
            return self._iterate()
        except Exception as error:
            return self._reset(everyone, error)

    def _iterate(self) -> list[Event]:
        self.iterations += 1
        events = self._reap()
        group = [] if self._prefilled and self._running else self._admit()
        gone = [each for each in group if each.submitted_at < self.iterations - 1 and self._is_abandoned(each)]
        if gone:
            events += [Event(each, None, 0.0, True) for each in gone]
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
        """Empty the rows -> a failed event for everyone who waits no more: the iteration's own events are lost."""
        while self._decoder.rows:
            self._decoder.scrub(self._decoder.rows - 1)
            self._decoder.drop(self._decoder.rows - 1)
        with self._work:
            # Who was submitted meanwhile and admitted at once is in the batch, but not in `everyone`.
            had_a_part = dict.fromkeys((*everyone, *self._joining, *self._running))
            failed = [each for each in had_a_part if each not in self._waiting]
            self._running.clear()
            self._joining = []
        self._to_ask.clear()
        self._sampler.rows = 0
        return [Event(each, None, 0.0, True, f"the batch failed: {error}") for each in failed]

    def _reap(self) -> list[Event]:
        """Take the cancelled sequences out of the rows and the queue."""
        for sequence in self._to_ask:
            if self._is_abandoned(sequence):  # never the other way: `stop` may set it meanwhile
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
        return [Event(each, None, 0.0, True) for each in gone]

    def _admit(self) -> list[Sequence]:
        """The head of the queue and those behind it that fit beside it in one prefill.

        The rest of a longer prompt than a prefill takes comes alone."""
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
                unread = sequence.prompt.input_ids.size - known.shape[2]
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
        """A part of a long prompt; it stays the head of the queue."""
        tokens = sequence.past.shape[2] + self._limits.max_prefill_tokens
        try:
            sequence.past = self._decoder.read(sequence.prompt, sequence.past, tokens)
        except Exception as error:
            return [Event(sequence, None, 0.0, True, f"prefill failed: {error}")]
        with self._work:
            self._joining = []
            self._waiting.appendleft(sequence)
        return []

    def _prefill(self, group: list[Sequence]) -> list[Event]:
        try:
            logits = self._decoder.prefill([each.prompt for each in group], [each.past for each in group])
        except Exception as error:  # whatever it was, it ends these sequences and not the loop
            if len(group) > 1:
                return [event for each in group for event in self._prefill([each])]
            return [Event(group[0], None, 0.0, True, f"prefill failed: {error}")]
        first = len(self._running)
        for row, sequence in enumerate(group, first):
            sequence.past = NO_PAST  # its row has it now
            self._sampler.append(sequence.sampling, sequence.prompt.input_ids)
            self._left[row] = sequence.sampling.max_tokens
            self._end_ids[row] = sequence.end_id
        with self._work:
            self._running += group
            self._joining = []
        return self._draw(logits, first)

    def _step(self) -> list[Event]:
        rows = len(self._running)
        try:
            logits = self._decoder.step(self._tokens[:rows])
        except Exception as error:  # whatever it was, it ends these sequences and not the loop
            failed = self._running.copy()
            for row in reversed(range(rows)):
                self._decoder.scrub(row)
                self._drop(row)
            return [Event(each, None, 0.0, True, f"decode step failed: {error}") for each in failed]
        return self._draw(logits, 0)

    def _draw(self, logits: npt.NDArray[np.float32], first: int) -> list[Event]:
        """The next token of rows first, first+1, ...; those that are done leave."""
        rows = slice(first, len(self._running))
        tokens, log_probs = self._sampler.draw(logits, first)
        self._tokens[rows] = tokens
        self._left[rows] -= 1
        self.tokens += len(tokens)
        finite = np.isfinite(log_probs)
        finished = (tokens == self._end_ids[rows]) | (self._left[rows] <= 0) | ~finite
        events = []
        for sequence, token, log_prob, done in zip(
            self._running[rows], tokens.tolist(), log_probs.tolist(), finished.tolist(), strict=True
        ):
            sequence.generated += 1
            sequence.log_prob += log_prob
            if not done and sequence.generated % self._limits.cancel_check_tokens == 0:
                self._to_ask.append(sequence)
            events.append(Event(sequence, token, log_prob, done, None, sequence.generated, sequence.log_prob))
        if finished.any():
            for index in reversed(np.flatnonzero(finished).tolist()):
                if not finite[index]:
                    events[index] = Event(events[index].sequence, None, 0.0, True, "the model's logits are not finite")
                    self._decoder.scrub(first + index)
                self._drop(first + index)
        return events

    def _drop(self, row: int) -> None:
        """Row `row` leaves; the last row takes its place everywhere."""
        last = len(self._running) - 1
        self._decoder.drop(row)
        self._sampler.drop(row)
        for column in (self._tokens, self._left, self._end_ids):
            column[row] = column[last]
        self._running[row] = self._running[last]
        self._running.pop()
