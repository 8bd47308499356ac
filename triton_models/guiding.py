"""Compile the guides of requests beside the decoding thread, then pass the requests on to the batcher."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from service.core.errors import InvalidRequest
from service.core.guide import require_small
from service.text.guides import Guides
from service.text.prompt import load_tokenizer, token_bytes
from triton_models.batcher import Closed, QueueFull, Sequence

UNLOADING = "the model is being unloaded"


class Guiding:
    """Compile on a thread of its own, one guide at a time, in the order of arrival.

    The tokenizer is read at the start, because that takes seconds for a large vocabulary.
    """

    def __init__(
        self,
        tokenizer: Path,
        vocab_size: int,
        end_id: int,
        *,
        max_waiting: int,
        submit: Callable[[Sequence], None],
        refuse: Callable[[Sequence, Exception], None],
        is_abandoned: Callable[[Sequence], bool],
    ) -> None:
        """`submit` takes a sequence with its compiled guide; `refuse` ends one that cannot be taken.

        `is_abandoned` returns whether a sequence's caller has gone. Its guide is not compiled then.
        """
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_id = end_id
        self._max_waiting = max_waiting
        self._submit = submit
        self._refuse = refuse
        self._is_abandoned = is_abandoned
        self._waiting: deque[Sequence] = deque()
        self._compiling: Sequence | None = None
        self._is_closed = False
        self._work = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="llm-guides", daemon=True)
        self._thread.start()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence whose `sampling.guide` is set. Raises InvalidRequest, QueueFull, Closed."""
        if sequence.end_id != self._end_id:
            raise InvalidRequest(
                f"end_id is {sequence.end_id}, and a guided answer ends with {self._end_id}: send that", param="end_id"
            )
        with self._work:
            if self._is_closed:
                raise Closed(UNLOADING)
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(f"Exceeds maximum queue size {self._max_waiting}")
            self._waiting.append(sequence)
            self._work.notify()

    def stop(self, request_id: str) -> None:
        """Cancel the sequences with that id; the batcher then ends them."""
        with self._work:
            for sequence in (*self._waiting, *([self._compiling] if self._compiling else [])):
                if sequence.request_id == request_id:
                    sequence.cancelled = True

    def close(self) -> None:
        """End the thread after the guide that it compiles now. Sequences that still wait are refused."""
        with self._work:
            self._is_closed = True
            self._work.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            guides = self._guides()
        except Exception as error:  # told to each guided request; others need no tokenizer
            self._fail_all(RuntimeError(f"the tokenizer {self._tokenizer.name} cannot be read: {error}"))
            return
        while (sequence := self._next()) is not None:
            if self._is_closed:
                self._refuse(sequence, Closed(UNLOADING))
                continue
            try:
                if (guide := sequence.sampling.guide) is not None and not sequence.cancelled:
                    sequence.guide = guides.known(guide)
                    if sequence.guide is None and self._is_abandoned(sequence):
                        sequence.cancelled = True  # the batcher ends it
                    elif sequence.guide is None:
                        require_small(guide)  # clients of Triton send their own
                        sequence.guide = guides.compile(guide)
                self._submit(sequence)
            except Exception as error:  # whatever it was, it ends this sequence and not the thread
                self._refuse(sequence, error)

    def _fail_all(self, error: Exception) -> None:
        while (sequence := self._next()) is not None:
            self._refuse(sequence, error)

    def _next(self) -> Sequence | None:
        with self._work:
            self._compiling = None
            self._work.wait_for(lambda: self._waiting or self._is_closed)
            self._compiling = self._waiting.popleft() if self._waiting else None
            return self._compiling

    def _guides(self) -> Guides:
        """Read the tokens' bytes. A vocabulary may have fewer or more ids than the model has scores."""
        tokenizer = load_tokenizer(self._tokenizer)
        spelled = token_bytes(tokenizer)[: self._vocab_size]
        padding = [b""] * (self._vocab_size - len(spelled))
        return Guides(
            [*spelled, *padding], self._end_id, lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        )
