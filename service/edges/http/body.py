"""Read the body of an HTTP request with a limit on its bytes and time, and parse it if it is a form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from service.core.errors import Cancelled, InvalidRequest, SlowBody, TooLarge
from service.edges.http.encoding import encoding_of
from service.edges.slices import SLICE_BYTES, Pieces
from service.pipeline import Reservation

JSON = "application/json"
FORM = "multipart/form-data"
BOM = b"\xef\xbb\xbf"  # of UTF-8, which some editors write
MAX_PARTS = 64
MAX_BOUNDARIES = 2 * MAX_PARTS  # in a form's body, with those that only look like one
MAX_PADDING = 64  # blanks after a boundary
MAX_NAME_CHARS = 100  # of a field's name in an error


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """What a request's body may hold, and how long it may take to arrive."""

    max_body_bytes: int  # of a question
    max_image_bytes: int
    timeout_s: float
    grace_s: float = 10.0  # for the first bytes
    min_bytes_per_s: int = 1024  # after the grace, on average

    def patience_s(self, came: int) -> float:
        """How long after its start a body may last if so many bytes have come."""
        return min(self.timeout_s, self.grace_s + came / self.min_bytes_per_s)


def declared_bytes(headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """Return how many bytes a body is said to have; None if nothing is said."""
    told = next((value for name, value in headers if name == b"content-length"), b"")
    return int(told) if told.isdigit() else None


async def read_body(request: Request, max_bytes: int, limits: BodyLimits, reservation: Reservation) -> list[bytes]:
    """The whole body, unpacked, in the pieces in which it came. Reserves what has come, not what is announced. The
    request is charged to its tenant's quota first.

    Raises QuotaExceeded, SlowBody, TooLarge, UnsupportedEncoding, InvalidRequest, Overloaded, ShuttingDown, Cancelled.
    """
    declared = declared_bytes(request.scope["headers"]) or 0
    encoding = encoding_of(request.headers.get("content-encoding", ""))
    if declared > max_bytes:
        raise _too_large(f"has {declared:,} bytes", max_bytes)
    reservation.require_bytes(declared)
    await reservation.account.enter()
    loop = asyncio.get_running_loop()
    pieces = Pieces()
    started, came, held = loop.time(), 0, 0
    try:
        async with reservation.until_end(), asyncio.timeout(limits.patience_s(0)) as patience:
            async for chunk in request.stream():
                came += len(chunk)
                for piece in encoding.unpack(chunk):
                    held += len(piece)
                    if max(came, held) > max_bytes:
                        raise _too_large("is too large", max_bytes)
                    reservation.reserve_bytes(len(piece))
                    pieces.add(piece)
                    if piece is not chunk:
                        await asyncio.sleep(0)  # unpacking takes time: let others run
                if came != declared:
                    patience.reschedule(started + limits.patience_s(came))
    except TimeoutError as exc:
        waited_s = loop.time() - started
        raise SlowBody(f"only {came:,} bytes of the body came within {waited_s:.2g} s: try again") from exc
    except ClientDisconnect as exc:
        raise Cancelled("the caller went away while sending") from exc
    encoding.end()
    return pieces.all()


async def read_small_body(request: Request, max_bytes: int, limits: BodyLimits) -> bytes:
    """Read an administrator's body, which is small: nothing is reserved, so that it is read under load too.

    Raises SlowBody, TooLarge, UnsupportedEncoding, InvalidRequest, Cancelled.
    """
    encoding = encoding_of(request.headers.get("content-encoding", ""))
    body = bytearray()
    try:
        async with asyncio.timeout(limits.grace_s):
            async for chunk in request.stream():
                for piece in encoding.unpack(chunk):
                    body += piece
                    if len(body) > max_bytes:
                        raise TooLarge(f"the body is over {max_bytes:,} bytes: change fewer variants at once")
    except TimeoutError as exc:
        raise SlowBody(f"the body did not come within {limits.grace_s:g} s: try again") from exc
    except ClientDisconnect as exc:
        raise Cancelled("the caller went away while sending") from exc
    encoding.end()
    return bytes(body)


def _too_large(size: str, max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the body {size}, the limit is {max_bytes:,} bytes: send smaller images, or one by one to POST /v1/images",
        param="image",
    )


@dataclass(slots=True)
class FormPart:
    """Hold one field of a form."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    content: Pieces = field(default_factory=Pieces)

    @property
    def data(self) -> bytes:
        """All of it; for what is small. `joined(content.all())` is for files."""
        return b"".join(self.content.all())

    @property
    def options(self) -> dict[bytes, bytes]:
        return parse_options_header(self.headers.get(b"content-disposition", b""))[1]

    @property
    def name(self) -> str:
        return self.options.get(b"name", b"").decode(errors="replace")[:MAX_NAME_CHARS]

    @property
    def is_file(self) -> bool:
        return b"filename" in self.options


async def parse_form(body: Sequence[bytes], content_type: str) -> list[FormPart]:
    """Return the parts of a multipart/form-data body, which comes in pieces. Raises InvalidRequest."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise _bad_form("its content-type names no boundary")
    reader, boundaries = _FormReader(), _Boundaries(boundary)
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        for piece in body:
            for start in range(0, len(piece), SLICE_BYTES):
                part = piece[start : start + SLICE_BYTES]
                boundaries.take(part)
                parser.write(part)
                if len(piece) >= SLICE_BYTES:
                    await asyncio.sleep(0)
        parser.finalize()
    except FormParserError as exc:
        raise _bad_form(str(exc)) from exc
    if not reader.ended:
        raise _bad_form("it ends before its last boundary")
    return reader.parts


class _Boundaries:
    """Count the boundaries of a form, and what looks like one.

    The parser takes other bytes at once, but goes byte by byte over these and over blanks after them.
    """

    def __init__(self, boundary: bytes) -> None:
        self._boundary = b"\r\n--" + boundary
        self._count = 0
        self._rest = b""  # may hold the beginning of one

    def take(self, piece: bytes) -> None:
        """Raises InvalidRequest."""
        window, place = self._rest + piece, 0
        end = max(0, len(window) - MAX_PADDING - 1)  # what begins later may go on in the next piece
        while (found := window.find(self._boundary, place, end)) >= 0:
            place = found + len(self._boundary)
            self._count += 1
            if self._count == MAX_BOUNDARIES:
                raise _too_many_parts()
            padding = window[place : place + MAX_PADDING + 1]
            if len(padding) > MAX_PADDING and not padding.strip(b" \t"):
                raise _bad_form(f"it has more than {MAX_PADDING} blanks after a boundary")
        self._rest = window[max(place, end - len(self._boundary) + 1, 0) :]


def _too_many_parts() -> InvalidRequest:
    return InvalidRequest(f"the form has more than {MAX_PARTS} parts: send fewer images, or each one by its id")


def _bad_form(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the body is not valid multipart/form-data ({why}): let your client build the form", code="invalid_form"
    )


class _FormReader:
    """Collect the parts of a form from python_multipart's callbacks."""

    def __init__(self) -> None:
        self.parts: list[FormPart] = []
        self.ended = False
        self._header = (bytearray(), bytearray())

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """For one parser. Kept here, they would make a cycle: the body would stay until the garbage collector runs."""
        return {
            "on_part_begin": self._part_begin,
            "on_part_data": self._part_data,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise _too_many_parts()
        self.parts.append(FormPart())

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].content.add(data[start:end])

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self.parts[-1].headers[name.lower()] = value
        self._header = (bytearray(), bytearray())

    def _end(self) -> None:
        self.ended = True
