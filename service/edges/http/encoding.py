"""A body's content-encoding: none or gzip, unpacked piece by piece, so that little data cannot become much at once."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from service.core.errors import InvalidRequest, UnsupportedEncoding

PIECE_BYTES = 256 * 1024  # unpacked in about 1 ms


class Plain:
    """A body as it is."""

    def unpack(self, chunk: bytes) -> Iterator[bytes]:
        yield chunk

    def end(self) -> None:
        """Nothing can be missing."""


class Gzip:
    """One gzip stream."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def unpack(self, chunk: bytes) -> Iterator[bytes]:
        """Pieces of at most PIECE_BYTES. Raises InvalidRequest."""
        while chunk:
            try:
                piece = self._stream.decompress(chunk, PIECE_BYTES)
            except zlib.error as exc:
                raise _bad_gzip("is not gzip data") from exc
            if self._stream.unused_data:
                raise _bad_gzip("goes on after its gzip data")
            chunk = self._stream.unconsumed_tail
            yield piece

    def end(self) -> None:
        """Raises InvalidRequest if the end is missing."""
        if not self._stream.eof:
            raise _bad_gzip("ends before its gzip data does")


def encoding_of(name: str) -> Plain | Gzip:
    """`name` is the header content-encoding. Raises UnsupportedEncoding."""
    match name.strip().lower():
        case "" | "identity":
            return Plain()
        case "gzip" | "x-gzip":
            return Gzip()
        case other:
            raise UnsupportedEncoding(
                f"content-encoding {other[:40]!r} is not read here: send the body as it is, or with gzip",
                param="content-encoding",
            )


def _bad_gzip(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"the body {what}, but its content-encoding is gzip: send gzip data, or leave the header out",
        param="content-encoding",
        code="invalid_encoding",
    )
