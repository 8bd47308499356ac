"""The bytes of a record, made by hand: each reason for which one is not believed."""

from __future__ import annotations

import orjson
import pytest
from blake3 import blake3

from service.cache.keys import FeatureKey
from service.cache.records import START, RecordError, pack, unpack
from tests.service.cache.test_records import KEY, some_features
from tests.support.fakes import CARD

FIRST = CARD.feature_shapes[224]


def why_not(record: bytes, key: FeatureKey = KEY) -> str:
    """The reason for which a record is not believed."""
    with pytest.raises(RecordError) as caught:
        unpack(record, key, CARD)
    assert str(caught.value) == caught.value.reason
    return caught.value.reason


def sealed(header: bytes, rest: bytes = b"") -> bytes:
    """A record whose checksum is right, whatever it holds."""
    return START.pack(b"GLVF", 1, len(header), blake3(header + rest).digest()) + header + rest


@pytest.mark.parametrize("size", [0, 3, START.size - 1])
def test_what_is_too_short_for_a_start_is_no_record_of_ours(size):
    assert why_not(pack(KEY, some_features())[:size]) == "magic"


def test_a_start_alone_is_a_record_that_was_cut():
    assert why_not(pack(KEY, some_features())[: START.size]) == "checksum"


def test_another_magic_is_told_before_anything_else():
    assert why_not(b"GLVX" + pack(KEY, some_features())[4:]) == "magic"


@pytest.mark.parametrize("change", ["a byte more", "a byte less", "an array less"])
def test_a_whole_record_of_another_length_than_its_arrays_is_not_believed(change):
    """Its checksum is right: only the lengths are not."""
    record = pack(KEY, some_features())
    header_bytes = START.unpack_from(record)[2]
    header, rest = record[START.size : START.size + header_bytes], record[START.size + header_bytes :]
    rest = {"a byte more": rest + b"\0", "a byte less": rest[:-1], "an array less": rest[: -4 * 13 * 256]}[change]
    assert why_not(sealed(header, rest)) == "shape"


def test_arrays_start_at_a_multiple_of_64_bytes_and_say_what_they_are():
    record = pack(KEY, some_features())
    magic, version, header_bytes, checksum = START.unpack_from(record)
    at = START.size + header_bytes
    assert (magic, version, at % 64) == (b"GLVF", 1, 0)
    assert checksum == blake3(record[START.size :]).digest()
    assert len(record) - at == some_features().nbytes
    header = orjson.loads(record[START.size : at])
    assert header == {
        "fingerprint": "f",
        "view": 224,
        "digest": "0" * 64,
        "arrays": [[name, "<f4", list(shape)] for name, shape in FIRST.items()],
    }
    assert at < START.size + len(orjson.dumps(header)) + 64


def test_a_digest_that_is_no_text_is_another_key():
    assert why_not(sealed(b'{"fingerprint":"f","view":224,"digest":1}')) == "key"
