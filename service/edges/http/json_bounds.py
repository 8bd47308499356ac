"""Bound a JSON body before it is parsed: its objects take many times its size, and parsing blocks the event loop.

Only images and videos are large. They are cut out, and everything else in a question is small, with few values. A
parser then reads the rest.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from service.core.errors import GlimpseError, InvalidRequest, TooLarge
from service.core.request import ImageSource
from service.edges.http.faults import unknown_field
from service.edges.image_text import read_image, source_of

TRUSTED_BYTES = 2048  # what is no larger cannot hold much
MAX_TEXT_BYTES = 64 * 1024  # besides images
MAX_VALUES = 2000  # strings, lists, objects and commas
BYTES_PER_CHAR = 12  # of a character that is written as two escapes of UTF-16
NAME_BYTES = 100
LONG_IMAGE_BYTES = 1024  # a shorter one stays where it is
SCAN_BYTES = 1024 * 1024  # searched for a quote in 0.1 to 0.3 ms
VALUE_COST_BYTES = 8 * 1024  # what a value costs beside its bytes
VALUES_PER_ITEM = 200  # of a list, on average; a question with every field and 20 turns has about 150
STRUCTURE = re.compile(rb"[\[\]{},]")
MAX_BACKSLASHES = 16 * 1024  # in a row; the longest question can have a quarter of them

# Whether a string is an image: its depth in lists and objects, the field of the outermost object, its own field.
IsImage = Callable[[int, bytes, bytes], bool]


@dataclass(slots=True)
class Question:
    """A body without its large images."""

    body: bytes
    rest: bytes  # JSON, with a name in place of each of them
    images: dict[str, tuple[int, int]] = field(default_factory=dict)  # by name: where it stands, between its quotes

    async def read(self, text: str) -> ImageSource:
        """Read an image that stands in `rest`, by its name or as it is. Raises InvalidRequest."""
        if text not in self.images:
            return source_of(text)
        return await read_image(self.body, *self.images[text], escaped=True)


def is_image_of_vqa(depth: int, field: bytes, _: bytes) -> bool:
    """`image` and `video`, and what is in the lists `images` and `frames`."""
    return (depth, field) in ((1, b"image"), (1, b"video"), (2, b"images"), (2, b"frames"))


async def split(
    body: bytes, max_question_chars: int, known: Iterable[str] = (), is_image: IsImage = is_image_of_vqa
) -> Question:
    """Cut the strings that are images out of a large body. What is no JSON may pass: its parser says so.

    Raises TooLarge, and InvalidRequest at the first field that is not `known`.
    """
    if len(body) <= TRUSTED_BYTES:
        return Question(body, body)
    max_text_bytes = MAX_TEXT_BYTES + BYTES_PER_CHAR * max_question_chars
    return await _Scan(body, max_text_bytes, MAX_VALUES + max_question_chars, list(known), is_image).run()


class _Scan:
    """Goes from quote to quote, so that its time depends on the count of values, and hardly on their length."""

    def __init__(self, body: bytes, max_text_bytes: int, max_values: int, known: list[str], is_image: IsImage) -> None:
        self.body = body
        self.known = known
        self.is_image = is_image
        self.max_text_bytes, self.max_values = max_text_bytes, max_values
        self.text_bytes = self.values = self.depth = 0
        self.field = b""  # of the outermost object
        self.inner = b""  # the innermost field, or the last item of a list
        self.unspent = SCAN_BYTES  # until the next turn of the loop
        self.is_object = body[:NAME_BYTES].lstrip().startswith(b"{")
        self.images: dict[str, tuple[int, int]] = {}

    async def run(self) -> Question:
        place = 0
        while not self.is_too_large():
            start = await self.find_quote(place)
            between = self.between(place, len(self.body) if start < 0 else start)
            if start < 0 or self.is_too_large():
                break
            end = await self.end_of_string(start)
            if end < 0:
                break
            if not between.endswith(b":"):
                self.inner = self.body[start + 1 : min(end, start + 1 + NAME_BYTES)]
            if self.depth == 1 and self.is_object and between.endswith((b"{", b",")):
                self.name(start + 1, end)
            elif self.is_image(self.depth, self.field, self.inner):
                self.image(start + 1, end)
            else:
                self.text_bytes += end - start
            place = end + 1
        if self.is_too_large():
            raise self.fault()
        return Question(self.body, self.rest(), self.images)

    async def find_quote(self, place: int) -> int:
        """The next one, or -1."""
        while place < len(self.body):
            found = self.body.find(b'"', place, place + SCAN_BYTES)
            searched = found if found >= 0 else min(place + SCAN_BYTES, len(self.body))
            self.unspent -= searched - place + VALUE_COST_BYTES
            if self.unspent < 0:
                self.unspent = SCAN_BYTES
                await asyncio.sleep(0)
            if found >= 0:
                return found
            place += SCAN_BYTES
        return -1

    def name(self, start: int, end: int) -> None:
        """Raises InvalidRequest."""
        self.field = self.body[start : min(end, start + NAME_BYTES)]
        self.text_bytes += end - start
        if self.known and b"\\" not in self.field and self.field.decode(errors="replace") not in self.known:
            raise unknown_field(self.field.decode(errors="replace"), self.known)

    def image(self, start: int, end: int) -> None:
        if end - start > LONG_IMAGE_BYTES:
            name = f"image {len(self.images) + 1} of the body, {end - start:,} characters"
            self.images[name] = (start, end)

    def rest(self) -> bytes:
        if not self.images:
            return self.body
        pieces, place = [], 0
        for name, (start, end) in self.images.items():
            pieces += [self.body[place:start], name.encode()]
            place = end
        return b"".join([*pieces, self.body[place:]])

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

    async def end_of_string(self, start: int) -> int:
        """Its closing quote, or -1. A quote after an odd number of backslashes is not the end."""
        while (end := await self.find_quote(start + 1)) >= 0 and self.body[end - 1] == ord("\\"):
            before = self.body[max(start + 1, end - MAX_BACKSLASHES) : end]
            backslashes = len(before) - len(before.rstrip(b"\\"))
            if backslashes == MAX_BACKSLASHES:
                self.text_bytes += self.max_text_bytes
            elif backslashes % 2 == 0:
                break
            self.values += 1
            if self.is_too_large():
                return -1
            start = end
        return end

    def fault(self) -> GlimpseError:
        field = self.field.decode(errors="replace") or None
        if self.values > self.max_values:
            return TooLarge(f"the body has more than {self.max_values:,} values: send fewer", param=field)
        return TooLarge(
            f"the body has more than {self.max_text_bytes:,} bytes besides its images: shorten it", param=field
        )


async def items(body: bytes, most: int) -> list[tuple[int, int]]:
    """Find where each item of a JSON list begins and ends, without parsing any. `body` begins with the list's bracket.

    An item may be anything; its own parser says what is wrong with it. Raises TooLarge if there are more than `most`,
    or more values than so many questions need, and InvalidRequest if the list does not end, or not at the end.
    """
    return await _Items(body, most).run()


class _Items(_Scan):
    """Goes from quote to quote, and over the brackets between them."""

    def __init__(self, body: bytes, most: int) -> None:
        super().__init__(body, len(body), most * VALUES_PER_ITEM, [], is_image_of_vqa)
        self.most = most
        self.begin = 0  # of the item that is being read
        self.end = 0  # of the list, once it is found
        self.found: list[tuple[int, int]] = []

    async def run(self) -> list[tuple[int, int]]:  # type: ignore[override]
        place = 0
        while not self.end:
            start = await self.find_quote(place)
            await self.brackets(place, len(self.body) if start < 0 else start)
            if start < 0 or self.end:
                break
            string_end = await self.end_of_string(start)
            self.values += 1
            self.require_few()
            if string_end < 0:
                break
            place = string_end + 1
        if not self.end or self.body[self.end :].strip():
            why = "something follows the list" if self.end else "the list does not end"
            raise InvalidRequest(f"the body is not valid JSON: {why}", code="invalid_json")
        return self.found

    async def brackets(self, start: int, end: int) -> None:
        """Go over what stands between two strings, and note the items that begin or end there."""
        for begin in range(start, end, SCAN_BYTES):
            for match in STRUCTURE.finditer(self.body, begin, min(end, begin + SCAN_BYTES)):
                self.values += 1
                self.require_few()
                self.turn(match.group(), match.start())
                if self.end:
                    return
            if end - start > SCAN_BYTES:
                await asyncio.sleep(0)

    def turn(self, sign: bytes, place: int) -> None:
        """Raises TooLarge."""
        if sign in b"[{":
            self.depth += 1
            if self.depth == 1:
                self.begin = place + 1
            return
        if sign in b"]}":
            self.depth -= 1
        elif self.depth == 1:
            self.item(place)
        if self.depth == 0:
            if self.found or self.body[self.begin : place].strip():
                self.item(place)
            self.end = place + 1

    def item(self, end: int) -> None:
        if len(self.found) == self.most:
            raise TooLarge(f"the batch has more than {self.most:,} questions: send it in parts")
        self.found.append((self.begin, end))
        self.begin = end + 1

    def require_few(self) -> None:
        """Raises TooLarge."""
        if self.is_too_large():
            raise TooLarge(f"the body has more than {self.max_values:,} values: send fewer questions")
