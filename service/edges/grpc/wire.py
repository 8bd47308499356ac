"""Bound what a message unpacks to, before it is parsed.

A sub-message of two bytes takes dozens in memory. So a message within the limit of bytes could unpack to many times
that limit.
"""

from __future__ import annotations

from collections.abc import Iterator

from service.core.errors import InvalidRequest, TooLarge
from service.edges.grpc.stubs import vqa_pb2 as pb

MAX_FIELDS = 1024  # of a question and its turns, repeated ones counted each time
PARTS = pb.AnswerRequest.PARTS_FIELD_NUMBER
TURNS = pb.AnswerRequest.TURNS_FIELD_NUMBER
PARTS_OF_TURN = pb.Turn.PARTS_FIELD_NUMBER
FRAMES = pb.Part.FRAMES_FIELD_NUMBER
KNOWN = frozenset(field.number for field in pb.AnswerRequest.DESCRIPTOR.fields)


def require_few_fields(data: bytes) -> None:
    """Check the encoded fields of an AnswerRequest. What is cut off is left to the parser.

    Raises TooLarge, and InvalidRequest for a field that this version does not know or that no proto3 message has.
    """
    count = 0
    for number, start, end in fields_in(data, 0, len(data)):
        if number not in KNOWN:
            raise InvalidRequest(
                f"there is no field number {number} in this server's AnswerRequest: leave it out, or use a newer "
                "server",
                code="unknown_field",
            )
        inner: Iterator[object] = iter(())
        if number == TURNS:
            inner = _fields_of_turn(data, start, end)
        elif number == PARTS:
            inner = _frames_of_part(data, start, end)
        for _ in inner:
            count = _one_more(count)
        count = _one_more(count)


def _fields_of_turn(data: bytes, at: int, end: int) -> Iterator[object]:
    """Yield once for each field of a turn and for each frame in it."""
    for number, start, stop in fields_in(data, at, end):
        yield number
        if number == PARTS_OF_TURN:
            yield from _frames_of_part(data, start, stop)


def _frames_of_part(data: bytes, at: int, end: int) -> Iterator[object]:
    """Yield once for each frame of a part. Its other fields make no messages, and each takes the place of another."""
    for number, start, stop in fields_in(data, at, end):
        if number == FRAMES:
            yield number
            yield from fields_in(data, start, stop)


def _one_more(count: int) -> int:
    if count == MAX_FIELDS:
        raise TooLarge(f"the message has more than {MAX_FIELDS:,} fields: send fewer parts, turns or stop strings")
    return count + 1


def fields_in(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each encoded field, and where its content begins and ends. Raises InvalidRequest."""
    while at < end:
        key, at = varint(data, at)
        match key & 7:
            case 0:
                start, (_, at) = at, varint(data, at)
            case 1:
                start, at = at, at + 8
            case 2:
                size, start = varint(data, at)
                at = start + size
            case 5:
                start, at = at, at + 4
            case _:  # a group, which a parser skips: proto3 has none
                raise InvalidRequest(
                    "the message is not a glimpse.v1.AnswerRequest: generate your client from this server's proto",
                    code="invalid_message",
                )
        yield key >> 3, start, min(at, end)


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a varint -> its value and where it ends. One that is cut off ends behind the data."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    return 0, len(data)
