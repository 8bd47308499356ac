"""What a message unpacks to is bounded before it is parsed."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.errors import InvalidRequest, TooLarge
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.grpc.wire import MAX_FIELDS, fields_in, require_few_fields

PART = b"\x0a\x00"  # an empty part: two bytes


def test_as_many_fields_as_allowed_and_no_more():
    require_few_fields(PART * MAX_FIELDS)
    with pytest.raises(TooLarge, match="more than 1,024 fields"):
        require_few_fields(PART * (MAX_FIELDS + 1))


def test_the_fields_of_turns_count():
    inner = PART * (MAX_FIELDS // 2)
    turn = pb.AnswerRequest(turns=[pb.Turn.FromString(inner)]).SerializeToString()
    require_few_fields(turn)
    with pytest.raises(TooLarge):
        require_few_fields(turn * 2)


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_frames_of_videos_count(in_turn):
    """Each is two bytes, and dozens in memory."""
    parts = [pb.Part(frames=pb.Frames(frames=[pb.Frame()] * (MAX_FIELDS // 4)))] * 3
    few = pb.AnswerRequest(turns=[pb.Turn(parts=parts)]) if in_turn else pb.AnswerRequest(parts=parts)
    data = few.SerializeToString()
    require_few_fields(data)
    with pytest.raises(TooLarge):
        require_few_fields(data * 2)


def test_a_field_of_another_version_is_not_ignored():
    newer = pb.AnswerRequest(explain=True).SerializeToString() + b"\xf8\x07\x01"  # field 127
    with pytest.raises(InvalidRequest, match="no field number 127") as caught:
        require_few_fields(newer)
    assert caught.value.code == "unknown_field"


def test_nothing_that_a_parser_skips_hides_fields_from_the_count():
    assert len(pb.AnswerRequest.FromString(b"\x0b\x0c" + PART * 3).parts) == 3  # behind a group
    with pytest.raises(InvalidRequest, match="is not a glimpse"):
        require_few_fields(b"\x0b\x0c" + PART * (MAX_FIELDS + 1))


@settings(max_examples=50)
@given(
    st.lists(st.one_of(st.binary(max_size=300), st.text(max_size=30)), max_size=6),
    st.lists(st.text(max_size=5), max_size=3),
    st.integers(1, 2**31 - 1),
    st.floats(0, 5),
)
def test_fields_are_found_where_the_parser_finds_them(parts, stop, max_tokens, temperature):
    message = pb.AnswerRequest(
        parts=[pb.Part(image=part) if isinstance(part, bytes) else pb.Part(text=part) for part in parts],
        stop=stop,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    data = message.SerializeToString()
    require_few_fields(data)
    found = list(fields_in(data, 0, len(data)))
    assert [data[start:end] for number, start, end in found if number == 1] == [
        part.SerializeToString() for part in message.parts
    ]
    assert [data[start:end].decode() for number, start, end in found if number == 11] == stop
    assert len(found) == len(parts) + len(stop) + 2


@given(st.binary(max_size=200))
def test_whatever_the_parser_takes_was_counted_whole(data):
    """Bytes that end the count early must not parse, or they would be a way around it."""
    try:
        require_few_fields(data)
        message = pb.AnswerRequest.FromString(data)
    except (InvalidRequest, TooLarge, DecodeError):
        return
    counted = [number for number, _, _ in fields_in(data, 0, len(data))]
    # More is harmless: a field of another wire type counts, and the parser passes it over.
    assert counted.count(1) >= len(message.parts)
    assert counted.count(2) >= len(message.turns)
