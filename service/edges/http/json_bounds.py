"""Bound a body of JSON before objects are made of it: those take many times its size, and time in which nothing runs.

Only images are large. Everything else in a question is small, and there are few values.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from service.core.errors import GlimpseError, InvalidRequest, TooLarge

TRUSTED_BYTES = 2048  # what is no larger cannot hold much
MAX_TEXT_BYTES = 64 * 1024  # besides images
MAX_VALUES = 2000  # strings, lists, objects and commas
BYTES_PER_CHAR = 12  # of a character that is written as two escapes of UTF-16
NAME_BYTES = 100

# Whether a string is an image: its depth in lists and objects, the field of the outermost object, its own field.
IsImage = Callable[[int, bytes, bytes], bool]


def is_image_of_vqa(depth: int, field: bytes, _: bytes) -> bool:
    """`image`, and what is in the list `images`."""
    return (depth, field) in ((1, b"image"), (2, b"images"))


def require_small(
    body: bytes | bytearray,
    max_question_chars: int,
    known: Iterable[str] = (),
    is_image: IsImage = is_image_of_vqa,
) -> None:
    """All but the strings that are images. What is no JSON may pass: its parser says so.

    Raises TooLarge, or InvalidRequest for a field that is not `known`.
    """
    if len(body) <= TRUSTED_BYTES:
        return
    limits = MAX_TEXT_BYTES + BYTES_PER_CHAR * max_question_chars, MAX_VALUES + max_question_chars
    _Scan(body, *limits, is_image).run(known)


class _Scan:
    """Goes from quote to quote, so that its time depends on the count of values, and hardly on their length."""

    def __init__(self, body: bytes | bytearray, max_text_bytes: int, max_values: int, is_image: IsImage) -> None:
        self.body = body
        self.is_image = is_image
        self.max_text_bytes, self.max_values = max_text_bytes, max_values
        self.text_bytes = self.values = self.depth = 0
        self.field = b""  # of the outermost object
        self.name = b""  # of the innermost field

    def run(self, known: Iterable[str]) -> None:
        place = 0
        while not self.is_too_large():
            start = self.body.find(b'"', place)
            between = self.between(place, len(self.body) if start < 0 else start)
            if start < 0 or self.is_too_large():
                break
            end = self.end_of_string(start)
            if end < 0:
                break
            is_name = not between.endswith(b":")  # or an item of a list
            if is_name:
                self.name = bytes(self.body[start + 1 : min(end, start + 1 + NAME_BYTES)])
                if self.depth == 1:
                    self.field = self.name
            if (is_name and self.depth == 1) or not self.is_image(self.depth, self.field, self.name):
                self.text_bytes += end - start
            place = end + 1
        if self.is_too_large():
            raise self.fault(known)

    def is_too_large(self) -> bool:
        return self.text_bytes > self.max_text_bytes or self.values > self.max_values

    def between(self, start: int, end: int) -> bytes | bytearray:
        """What stands between two strings."""
        self.text_bytes += end - start + 2
        if self.text_bytes > self.max_text_bytes:
            return b""
        between = self.body[start:end]
        opened = between.count(b"{") + between.count(b"[")
        self.depth += opened - between.count(b"}") - between.count(b"]")
        self.values += 1 + opened + between.count(b",")
        return between.rstrip()

    def end_of_string(self, start: int) -> int:
        """Its closing quote, or -1. A quote after an odd number of backslashes is not the end."""
        while (end := self.body.find(b'"', start + 1)) >= 0 and self.body[end - 1] == ord("\\"):
            before = self.body[start + 1 : end]
            if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
                break
            self.values += 1
            if self.is_too_large():
                return -1
            start = end
        return end

    def fault(self, known: Iterable[str]) -> GlimpseError:
        field, names = self.field.decode(errors="replace"), list(known)
        if names and field and field not in names:
            near = difflib.get_close_matches(field, names, n=1)
            mend = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(names)}"
            return InvalidRequest(f"there is no field {field!r}: {mend}", param=field, code="unknown_field")
        if self.values > self.max_values:
            return TooLarge(f"the body has more than {self.max_values:,} values: send fewer", param=field or None)
        return TooLarge(
            f"the body has more than {self.max_text_bytes:,} bytes besides its images: shorten it", param=field or None
        )
