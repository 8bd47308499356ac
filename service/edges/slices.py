"""Work on large bodies in slices, so that everything else on the event loop waits for one slice and not for all."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

SLICE_BYTES = 128 * 1024  # base64 of this is decoded in 0.3 ms; a multiple of 4
INLINE_JOIN_BYTES = 1024 * 1024  # joined in less time than a thread takes to start


async def joined(pieces: Sequence[bytes]) -> bytes:
    """All pieces as one. Python lets go of its lock while it joins many bytes, so a thread does that."""
    if len(pieces) == 1:
        return pieces[0]
    if sum(map(len, pieces)) <= INLINE_JOIN_BYTES:
        return b"".join(pieces)
    return await asyncio.to_thread(b"".join, pieces)


class Pieces:
    """Bytes that come bit by bit, kept in slices, however small the bits are."""

    def __init__(self) -> None:
        self._whole: list[bytes] = []
        self._rest = bytearray()
        self.nbytes = 0

    def add(self, data: bytes) -> None:
        self.nbytes += len(data)
        self._rest += data
        if len(self._rest) >= SLICE_BYTES:
            self._whole.append(bytes(self._rest))
            self._rest.clear()

    def all(self) -> list[bytes]:
        return [*self._whole, bytes(self._rest)] if self._rest else self._whole
