"""Read the body of an HTTP request with a limit on its bytes and time, and parse it if it is a form."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from service.core.errors import Cancelled, InvalidRequest, SlowBody, TooLarge

JSON = "application/json"
FORM = "multipart/form-data"
MAX_PARTS = 64
MAX_NAME_CHARS = 100  # of a field's name in an error


async def read_body(request: Request, max_bytes: int, timeout_s: float, reserve: Callable[[int], None]) -> bytes:
    """Read the whole body, and reserve its bytes with `reserve`.

    If the body declares its length, all bytes are reserved before one is read, else each chunk as it arrives. Raises
    SlowBody, TooLarge, Cancelled, and the errors of `reserve`.
    """
    length = request.headers.get("content-length", "")
    declared = int(length) if length.isdecimal() else 0
    if declared > max_bytes:
        raise _too_large(f"has {declared:,} bytes", max_bytes)
    reserve(declared)
    chunks, read = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                read += len(chunk)
                if read > max_bytes:
                    raise _too_large("is too large", max_bytes)
                if read > declared:
                    reserve(min(len(chunk), read - declared))
                chunks.append(chunk)
    except TimeoutError as exc:
        raise SlowBody(f"only {read:,} bytes of the body came within {timeout_s:g} s: send it again") from exc
    except ClientDisconnect as exc:
        raise Cancelled("the caller went away while sending") from exc
    return b"".join(chunks)


def _too_large(size: str, max_bytes: int) -> TooLarge:
    return TooLarge(
        f"the body {size}, the limit is {max_bytes:,} bytes: send smaller images, or one by one to POST /v1/images",
        param="image",
    )


@dataclass(slots=True)
class FormPart:
    """Hold one field of a form."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)

    @property
    def options(self) -> dict[bytes, bytes]:
        return parse_options_header(self.headers.get(b"content-disposition", b""))[1]

    @property
    def name(self) -> str:
        return self.options.get(b"name", b"").decode(errors="replace")[:MAX_NAME_CHARS]

    @property
    def is_file(self) -> bool:
        return b"filename" in self.options


def parse_form(body: bytes, content_type: str) -> list[FormPart]:
    """Return the parts of a multipart/form-data body, in order. Raises InvalidRequest."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise _bad_form("its content-type names no boundary")
    reader = _FormReader()
    try:
        parser = MultipartParser(boundary, reader.callbacks)  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as exc:
        raise _bad_form(str(exc)) from exc
    if not reader.ended:
        raise _bad_form("it ends before its last boundary")
    return reader.parts


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
        self.callbacks = {
            "on_part_begin": self._part_begin,
            "on_part_data": self._part_data,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_end": self._end,
        }

    def _part_begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise InvalidRequest(f"the form has more than {MAX_PARTS} parts: send fewer images, or each one by its id")
        self.parts.append(FormPart())

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].data += data[start:end]

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
