"""Read an image that came as text: base64, a data: URL, another URL or an image id."""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import Generator, Iterator, Sequence

import orjson

from service.core.errors import InvalidImage, InvalidRequest
from service.core.request import ImageBytes, ImageId, ImageSource, ImageUrl
from service.edges.slices import SLICE_BYTES, joined

HEAD_BYTES = 4096  # of a text: its kind is said here
BLANKS = b" \t\r\n\f\v"
STANDARD = bytes.maketrans(b"-_", b"+/")  # from the alphabet of URLs
WRONG = re.compile(rb"[^A-Za-z0-9+/_=\s-]")
DIGITS = re.compile(rb"[A-Za-z0-9+/]*")
# What JSON may write in place of a character of base64; longer escapes are left to a parser.
ESCAPES = ((rb"\/", b"/"), (rb"\n", b"\n"), (rb"\r", b"\r"), (rb"\t", b"\t"))
ESCAPE_BYTES = 6  # of the longest escape


class Base64:
    """Decode base64 as callers write it: in both alphabets, wrapped, with or without padding. Takes it in pieces."""

    def __init__(self, before: int) -> None:
        """`before`: how many characters stand before it, for messages."""
        self._place = before
        self._decoded: list[bytes] = []
        self._left = b""  # at most 3 digits
        self._digits = 0  # in all
        self._padding: int | None = None  # where it begins

    def feed(self, piece: bytes) -> None:
        """Raises InvalidImage, which names the first wrong character."""
        if not self._is_plain(piece):
            self._take(self._cleaned(piece))
        self._place += len(piece)

    def end(self) -> Sequence[bytes]:
        """What was decoded, in pieces. Raises InvalidImage."""
        if len(self._left) == 1:
            raise _no_image(f"{self._digits:,} characters are one too many or end too early")
        if self._left:
            self._decoded.append(binascii.a2b_base64(self._left + b"=" * (4 - len(self._left))))
        return self._decoded

    def _is_plain(self, piece: bytes) -> bool:
        """Take it if it is nothing but digits."""
        if b"=" in piece or self._padding is not None:
            return False
        try:
            self._take(piece)
        except binascii.Error:
            return False
        return True

    def _take(self, digits: bytes) -> None:
        """Raises binascii.Error, and then takes nothing."""
        together = self._left + digits
        size = len(together) - len(together) % 4
        left = together[size:]
        if not DIGITS.fullmatch(left):
            raise binascii.Error("no digit")
        self._decoded.append(binascii.a2b_base64(memoryview(together)[:size], strict_mode=True))
        self._left = left
        self._digits += len(digits)

    def _cleaned(self, piece: bytes) -> bytes:
        """Its digits alone, in the standard alphabet. Raises InvalidImage."""
        digits = piece.translate(STANDARD, BLANKS).rstrip(b"=")
        if digits and self._padding is not None:
            raise _wrong("=", self._padding)
        wrong = WRONG.search(piece)
        end = len(piece.rstrip(b"=" + BLANKS))
        inner = piece.find(b"=", 0, end)  # padding stands at the end only
        if wrong is not None and (inner < 0 or wrong.start() < inner):
            raise _wrong(
                piece[wrong.start() : wrong.start() + 4].decode(errors="replace")[0], self._place + wrong.start()
            )
        if inner >= 0:
            raise _wrong("=", self._place + inner)
        if (padding := piece.find(b"=", end)) >= 0 and self._padding is None:
            self._padding = self._place + padding
        return digits


def source_of(text: str) -> ImageSource:
    """Read a short text at once. Raises InvalidRequest."""
    encoded = text.encode()
    reading = _reading(encoded, 0, len(encoded), escaped=False)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            return end.value if isinstance(end.value, ImageId | ImageUrl) else ImageBytes(b"".join(end.value))


async def read_image(text: bytes, start: int = 0, end: int | None = None, *, escaped: bool = False) -> ImageSource:
    """Read `text[start:end]`, UTF-8, in slices. `escaped`: it stands between the quotes of a JSON string.

    Raises InvalidRequest.
    """
    reading = _reading(text, start, len(text) if end is None else end, escaped=escaped)
    while True:
        try:
            next(reading)
        except StopIteration as stop:
            return stop.value if isinstance(stop.value, ImageId | ImageUrl) else ImageBytes(await joined(stop.value))
        await asyncio.sleep(0)


def _reading(
    text: bytes, start: int, end: int, *, escaped: bool
) -> Generator[None, None, ImageId | ImageUrl | Sequence[bytes]]:
    """Yield between slices; return the bytes of an image in pieces. Raises InvalidRequest."""
    pieces = _pieces(text, start, end, escaped=escaped)
    first = next(pieces, b"")
    begin = len(first) - len(first.lstrip())
    head = first[begin : begin + HEAD_BYTES]
    if head.startswith(b"img_") or head[:8].lower().startswith((b"https://", b"http://")):
        name = head.decode(errors="replace").strip()  # an id is short
        if name.startswith("img_"):
            return ImageId(name)
        if len(first) - begin > HEAD_BYTES:
            raise InvalidRequest(
                f"image is a URL of more than {HEAD_BYTES:,} bytes: send a shorter one, or the image's bytes",
                param="image",
            )
        return ImageUrl(name)
    if head[:5].lower() == b"data:":
        kind, comma, _ = head.partition(b",")
        if not comma or kind[-7:].lower() != b";base64":
            raise InvalidRequest("image is a data: URL without base64: send data:image/png;base64,...", param="image")
        begin += len(kind) + 1
    decoder = Base64(begin)
    decoder.feed(first[begin:])
    for piece in pieces:
        yield
        decoder.feed(piece)
    return decoder.end()


def _pieces(text: bytes, start: int, end: int, *, escaped: bool) -> Iterator[bytes]:
    """Raises InvalidRequest."""
    while start < end:
        piece = text[start : min(end, start + SLICE_BYTES)]
        if escaped and any(control in piece for control in (b"\n", b"\r", b"\t")):
            raise InvalidRequest("the body is not valid JSON: image has line breaks or tabs", code="invalid_json")
        if not escaped or b"\\" not in piece:
            start += len(piece)
            yield piece
            continue
        if start + len(piece) < end:
            piece = _without_half_an_escape(piece)
        start += len(piece)
        yield _unescaped(piece)


def _without_half_an_escape(piece: bytes) -> bytes:
    """Cut before the last escape if it may go on behind the piece. A piece of backslashes stays: it is no base64."""
    last = piece.rfind(b"\\", len(piece) - ESCAPE_BYTES)
    return piece if last < 0 else piece[:last].rstrip(b"\\") or piece


def _unescaped(piece: bytes) -> bytes:
    plain = piece
    for escape, meant in ESCAPES:
        plain = plain.replace(escape, meant)
    if b"\\" not in plain:
        return plain
    try:
        text: str = orjson.loads(b'"' + piece + b'"')
    except orjson.JSONDecodeError:
        return piece  # the backslash is then the wrong character
    return text.encode()


def _wrong(character: str, place: int) -> InvalidImage:
    return _no_image(f"its character {place + 1:,} is {character!r}")


def _no_image(why: str) -> InvalidImage:
    return InvalidImage(
        f"image is neither base64, nor a data: URL, nor an image id (img_...): as base64, {why}", param="image"
    )
