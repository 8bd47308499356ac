import struct
from dataclasses import replace

import numpy as np
import orjson
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from service.cache.features import FeatureKey
from service.cache.records import START, RecordError, pack, unpack
from service.core.vision import CloserFeatures, Int8Rows, VisionFeatures
from tests.support.fakes import CARD

KEY = FeatureKey("f", 224, "0" * 64)
SHAPES = CARD.feature_shapes
FIRST = SHAPES[224]


def some_features(dtype: type = np.float32) -> VisionFeatures:
    """Random bits: NaNs of every kind, infinities, subnormals and negative zeros among them."""
    bits = np.random.default_rng(0)
    return VisionFeatures(
        *(
            np.frombuffer(bits.bytes(int(np.prod(s)) * np.dtype(dtype).itemsize), dtype).reshape(s)
            for s in FIRST.values()
        )
    )


def closer_features() -> CloserFeatures:
    return CloserFeatures(np.arange(4 * 1024, dtype=np.float32).reshape(1024, 4))


def bytes_of(key: FeatureKey) -> bytes:
    return pack(key, closer_features() if key.view == 448 else some_features())


def why_not(record: bytes, key: FeatureKey = KEY) -> str:
    """The reason for which a record is not believed."""
    with pytest.raises(RecordError) as caught:
        unpack(record, key, SHAPES)
    assert str(caught.value) == caught.value.reason
    return caught.value.reason


def sealed(header: bytes, rest: bytes = b"") -> bytes:
    """A record whose checksum is right, whatever it holds."""
    return START.pack(b"GLVF", 1, len(header), blake3(header + rest).digest()) + header + rest


def arrays(vision: VisionFeatures) -> list[np.ndarray]:
    return [vision.features, vision.saliency, vision.entropy, vision.texture]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_is_packed_comes_back_bit_for_bit(dtype):
    put = some_features(dtype)
    got = unpack(pack(KEY, put), KEY, SHAPES)
    for one, other in zip(arrays(put), arrays(got), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()


def test_a_closer_view_is_a_record_of_its_own():
    key = replace(KEY, view=448)
    got = unpack(pack(key, closer_features()), key, SHAPES)
    assert isinstance(got, CloserFeatures)
    assert (got.features == closer_features().features).all()
    assert why_not(pack(key, CloserFeatures(np.zeros((1028, 4), np.float32))), key) == "shape"


def test_an_array_that_lies_strangely_in_memory_comes_back_in_order():
    put = replace(some_features(), features=np.arange(4 * 257, dtype=np.float32).reshape(4, 257).T)
    assert (unpack(pack(KEY, put), KEY, SHAPES).features == put.features).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("view", [224, 448])
def test_int8_rows_come_back_bit_for_bit_with_their_scales(dtype, view):
    key = replace(KEY, view=view)
    rows = Int8Rows.of(np.random.default_rng(0).standard_normal(SHAPES[view]["features"]).astype(dtype))
    put = CloserFeatures(rows) if view == 448 else replace(some_features(dtype), features=rows)
    record = pack(key, put)
    got = unpack(record, key, SHAPES).features
    assert isinstance(got, Int8Rows)
    assert got.dense().dtype == dtype
    assert (got.values == rows.values).all()
    assert (got.scales == rows.scales).all()
    assert b'["features","|i1",' in record


@pytest.mark.parametrize(
    "rows",
    [
        Int8Rows(np.zeros((257, 8), np.int8), np.zeros(257, np.float32)),
        Int8Rows(np.zeros((257, 4), np.int8), np.zeros(256, np.float32)),
        Int8Rows(np.zeros((257, 4), np.int8), np.zeros(257, np.float64)),
        Int8Rows(np.zeros((257, 4), np.uint8), np.zeros(257, np.float32)),
    ],
)
def test_int8_rows_of_other_shapes_and_dtypes_are_not_believed(rows):
    assert why_not(pack(KEY, replace(some_features(), features=rows))) == "shape"


@given(st.data())
def test_no_changed_cut_or_grown_record_is_believed(data):
    record = bytearray(pack(KEY, some_features()))
    match data.draw(st.sampled_from(["flip", "cut", "grow"])):
        case "flip":
            at = data.draw(st.integers(0, len(record) - 1) | st.integers(0, START.size))
            record[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del record[data.draw(st.integers(0, len(record) - 1)) :]
        case "grow":
            record += data.draw(st.binary(min_size=1, max_size=100))
    with pytest.raises(RecordError):
        unpack(bytes(record), KEY, SHAPES)


@given(st.binary(max_size=200))
def test_no_rubbish_is_believed(rubbish):
    with pytest.raises(RecordError):
        unpack(rubbish, KEY, SHAPES)


@pytest.mark.parametrize(
    "other", [replace(KEY, fingerprint="other"), replace(KEY, view=448), replace(KEY, digest="1" * 64)]
)
def test_a_record_of_another_model_view_or_image_is_not_believed(other):
    assert why_not(bytes_of(other)) == "key"


def test_a_record_of_another_version_is_not_believed():
    record = bytearray(pack(KEY, some_features()))
    record[4:6] = struct.pack("<H", 2)
    assert why_not(bytes(record)) == "version"


@pytest.mark.parametrize(
    "change",
    [
        {"features": np.zeros((257, 8), np.float32)},
        {"saliency": np.zeros((16, 16), np.float32)},
        {"entropy": np.zeros(256, np.float64)},
        {"texture": np.zeros((13, 16, 16), ">f4")},
    ],
)
def test_other_shapes_and_dtypes_are_not_believed(change):
    assert why_not(pack(KEY, replace(some_features(), **change))) == "shape"


@pytest.mark.parametrize("header", [b"", b"{}", b"[1]", b"{", b"\xff"])
def test_a_whole_record_that_is_not_ours_is_not_believed(header):
    assert why_not(sealed(header)) == "shape"


@pytest.mark.parametrize("rows", ['["features"]', '["features","<f4",[257,4],1]', '"ab"', "[]", "1"])
def test_rows_that_are_not_ours_are_not_believed(rows):
    header = f'{{"fingerprint":"f","view":224,"digest":"{"0" * 64}","arrays":[{rows}]}}'.encode()
    assert why_not(sealed(header)) == "shape"


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
