"""Keys and values of recent prompts, for prompts that begin with the same tokens.

A token is its id and its extra id, as TensorRT-LLM compares them: equal extra ids, which only visual tokens have, mean
equal embeddings. A prompt with a visual token without one is never shared.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from service.core.prompt import Prompt

FloatArray = npt.NDArray[np.floating]

TOKEN_BYTES = 16  # of a key: id and extra id
LEAST_TOKENS = 16  # that two prompts must have in common: fewer are read as fast as they are copied


class PrefixCache:
    """The least recently used prompt goes first where `max_bytes` are full; 0 keeps none. One thread's own."""

    def __init__(self, max_bytes: int, vocab_size: int) -> None:
        self.nbytes = 0
        self._max_bytes = max_bytes
        self._vocab_size = vocab_size
        self._kept: OrderedDict[bytes, FloatArray] = OrderedDict()  # by the whole prompt, oldest first
        self._by_start: dict[bytes, list[bytes]] = {}  # the whole prompts that share their first LEAST_TOKENS

    def __len__(self) -> int:
        return len(self._kept)

    def recall(self, prompt: Prompt) -> FloatArray | None:
        """[parts, heads, n, head_dim] of the prompt's first n tokens: as many as are known, but never all of them.

        It is a view, and holds what the cache may have dropped since."""
        key = self._key(prompt)
        best, most = b"", 0
        for other in self._by_start.get(_start(key), ()):
            tokens = _tokens_in_common(key, other)
            if tokens > most:
                best, most = other, tokens
        most = min(most, prompt.input_ids.size - 1)
        if most < LEAST_TOKENS:
            return None
        self._kept.move_to_end(best)
        return self._kept[best][:, :, :most]

    def keep(self, prompt: Prompt, kv: FloatArray) -> None:
        """A copy of [parts, heads, T, head_dim], unless a prompt that begins with this one is there."""
        key = self._key(prompt)
        nbytes = kv.nbytes + len(key)
        if len(key) <= LEAST_TOKENS * TOKEN_BYTES or nbytes > self._max_bytes:
            return
        akin = self._by_start.get(_start(key), [])
        for other in akin:
            if other.startswith(key):
                self._kept.move_to_end(other)
                return
        for other in [other for other in akin if key.startswith(other)]:
            self._drop(other)
        while self.nbytes + nbytes > self._max_bytes:
            self._drop(next(iter(self._kept)))
        self._kept[key] = kv.copy()
        self._by_start.setdefault(_start(key), []).append(key)
        self.nbytes += nbytes

    def _drop(self, key: bytes) -> None:
        self.nbytes -= self._kept.pop(key).nbytes + len(key)
        akin = self._by_start[_start(key)]
        akin.remove(key)
        if not akin:
            del self._by_start[_start(key)]

    def _key(self, prompt: Prompt) -> bytes:
        """TOKEN_BYTES a token; none for a prompt that is not to be shared."""
        if not self._max_bytes or ((prompt.input_ids >= self._vocab_size) & (prompt.extra_ids == 0)).any():
            return b""
        return np.stack([prompt.input_ids.astype(np.uint64), prompt.extra_ids], axis=1).tobytes()


def _start(key: bytes) -> bytes:
    return key[: LEAST_TOKENS * TOKEN_BYTES]


def _tokens_in_common(key: bytes, other: bytes) -> int:
    """At their beginning."""
    most = min(len(key), len(other))
    differ = np.frombuffer(key[:most], np.uint64) != np.frombuffer(other[:most], np.uint64)
    return int(differ.argmax()) // 2 if differ.any() else most // TOKEN_BYTES
