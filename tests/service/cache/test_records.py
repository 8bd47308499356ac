import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.cache.keys import FeatureKey
from service.cache.records import START, RecordError, pack, unpack
from service.core.card import ModelCard
from service.core.vision import CloserFeatures, Int8Rows, VisionFeatures
from tests.support.fakes import CARD

KEY = FeatureKey("f", 224, "0" * 64)
HALF = replace(CARD, float_type="FP16")
SHAPES = CARD.feature_shapes
FLOATS = {"FP32": np.float32, "FP16": np.float16}


def some_features(card: ModelCard = CARD) -> VisionFeatures:
    """Random bits: NaNs of every kind, infinities, subnormals and negative zeros among them."""
    bits = np.random.default_rng(0)

    def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(FLOATS[card.type_of(name)])
        return np.frombuffer(bits.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)

    return VisionFeatures(*(array(name, shape) for name, shape in SHAPES[224].items()))


def closer_features() -> CloserFeatures:
    return CloserFeatures(np.arange(4 * 1024, dtype=np.float32).reshape(1024, 4))


def bytes_of(key: FeatureKey) -> bytes:
    return pack(key, closer_features() if key.view == 448 else some_features())


def arrays(vision: VisionFeatures) -> list[np.ndarray]:
    return [vision.features, vision.saliency, vision.entropy, vision.texture]


@pytest.mark.parametrize("card", [CARD, HALF])
def test_what_is_packed_comes_back_bit_for_bit(card):
    put = some_features(card)
    got = unpack(pack(KEY, put), KEY, card)
    for one, other in zip(arrays(put), arrays(got), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()


def test_a_closer_view_is_a_record_of_its_own():
    key = replace(KEY, view=448)
    got = unpack(pack(key, closer_features()), key, CARD)
    assert isinstance(got, CloserFeatures)
    assert (got.features == closer_features().features).all()
    with pytest.raises(RecordError, match="shape"):
        unpack(pack(key, CloserFeatures(np.zeros((1028, 4), np.float32))), key, CARD)


def test_an_array_that_lies_strangely_in_memory_comes_back_in_order():
    put = replace(some_features(), features=np.arange(4 * 257, dtype=np.float32).reshape(4, 257).T)
    assert (unpack(pack(KEY, put), KEY, CARD).features == put.features).all()


@pytest.mark.parametrize("card", [CARD, HALF])
@pytest.mark.parametrize("view", [224, 448])
def test_int8_rows_come_back_bit_for_bit_with_their_scales(card, view):
    key, dtype = replace(KEY, view=view), FLOATS[card.float_type]
    rows = Int8Rows.of(np.random.default_rng(0).standard_normal(SHAPES[view]["features"]).astype(dtype))
    put = CloserFeatures(rows) if view == 448 else replace(some_features(card), features=rows)
    record = pack(key, put)
    got = unpack(record, key, card).features
    assert isinstance(got, Int8Rows)
    assert got.dense().dtype == dtype
    assert (got.values == rows.values).all()
    assert (got.scales == rows.scales).all()
    assert b'["features","|i1",' in record


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (Int8Rows(np.zeros((257, 8), np.int8), np.zeros(257, np.float32)), "shape"),
        (Int8Rows(np.zeros((257, 4), np.int8), np.zeros(256, np.float32)), "shape"),
        (Int8Rows(np.zeros((257, 4), np.int8), np.zeros(257, np.float64)), "dtype"),
        (Int8Rows(np.zeros((257, 4), np.int8), np.zeros(257, np.float16)), "dtype"),
        (Int8Rows(np.zeros((257, 4), np.uint8), np.zeros(257, np.float32)), "shape"),  # scales are not expected then
    ],
)
def test_int8_rows_of_other_shapes_and_dtypes_are_not_believed(rows, reason):
    with pytest.raises(RecordError, match=reason):
        unpack(pack(KEY, replace(some_features(), features=rows)), KEY, CARD)


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
        unpack(bytes(record), KEY, CARD)


@given(st.binary(max_size=200))
def test_no_rubbish_is_believed(rubbish):
    with pytest.raises(RecordError):
        unpack(rubbish, KEY, CARD)


@pytest.mark.parametrize(
    "other", [replace(KEY, fingerprint="other"), replace(KEY, view=448), replace(KEY, digest="1" * 64)]
)
def test_a_record_of_another_model_view_or_image_is_not_believed(other):
    with pytest.raises(RecordError, match="key"):
        unpack(bytes_of(other), KEY, CARD)


def test_a_record_of_another_version_is_not_believed():
    record = bytearray(pack(KEY, some_features()))
    record[4:6] = struct.pack("<H", 2)
    with pytest.raises(RecordError, match="version"):
        unpack(bytes(record), KEY, CARD)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"features": np.zeros((257, 8), np.float32)}, "shape"),
        ({"saliency": np.zeros((16, 16), np.float32)}, "shape"),
        ({"entropy": np.zeros(256, np.float64)}, "dtype"),
        ({"texture": np.zeros((13, 16, 16), ">f4")}, "dtype"),
        ({"texture": np.zeros((13, 16, 16), np.int32)}, "dtype"),
        *(({name: np.zeros(shape, np.float16)}, "dtype") for name, shape in SHAPES[224].items()),
    ],
)
def test_other_shapes_and_dtypes_are_not_believed(change, reason):
    with pytest.raises(RecordError, match=reason):
        unpack(pack(KEY, replace(some_features(), **change)), KEY, CARD)


@pytest.mark.parametrize(("card", "other"), [(CARD, HALF), (HALF, CARD)])
def test_a_record_of_a_model_with_another_float_type_is_not_believed(card, other):
    closer = replace(KEY, view=448)
    with pytest.raises(RecordError, match="dtype"):
        unpack(pack(KEY, some_features(other)), KEY, card)
    with pytest.raises(RecordError, match="dtype"):
        unpack(pack(closer, CloserFeatures(np.zeros((1024, 4), FLOATS[other.float_type]))), closer, card)


@pytest.mark.parametrize("name", ["saliency", "entropy"])
def test_what_is_fp32_in_every_model_is_not_believed_as_fp16(name):
    with pytest.raises(RecordError, match="dtype"):
        unpack(pack(KEY, replace(some_features(HALF), **{name: np.zeros(256, np.float16)})), KEY, HALF)


def sealed(record: bytes, header_bytes: int, body: bytes) -> bytes:
    """With a right checksum."""
    magic, version, _, _ = START.unpack_from(record)
    return START.pack(magic, version, header_bytes, blake3(body).digest()) + body


@pytest.mark.parametrize("grow", [-10_000, -4, -1, 1, 4, 64])
def test_a_record_that_is_too_short_or_too_long_is_not_believed_with_a_right_checksum_either(grow):
    record = pack(KEY, some_features())
    header_bytes, body = START.unpack_from(record)[2], record[START.size :]
    assert sealed(record, header_bytes, body) == record
    changed = body[:grow] if grow < 0 else body + bytes(grow)
    with pytest.raises(RecordError, match="shape"):
        unpack(sealed(record, header_bytes, changed), KEY, CARD)


@settings(deadline=None)
@given(st.integers(0, 2**16 - 1))
def test_a_record_with_another_length_of_its_header_is_not_believed(header_bytes):
    record = pack(KEY, some_features())
    assume(header_bytes != START.unpack_from(record)[2])
    with pytest.raises(RecordError):
        unpack(sealed(record, header_bytes, record[START.size :]), KEY, CARD)


@settings(deadline=None)
@given(st.text(max_size=100))
def test_arrays_start_at_a_multiple_of_64_bytes(fingerprint):
    key = replace(KEY, fingerprint=fingerprint)
    features = some_features()
    record = pack(key, features)
    start = START.size + START.unpack_from(record)[2]
    assert start % 64 == 0
    assert record[start:].startswith(features.features.tobytes())
    assert len(record) == start + features.nbytes


@pytest.mark.parametrize("header", [b"", b"{}", b"[1]", b"{", b'{"fingerprint":"f","view":224,"digest":1}', b"\xff"])
def test_a_whole_record_that_is_not_ours_is_not_believed(header):
    record = START.pack(b"GLVF", 1, len(header), blake3(header).digest()) + header
    with pytest.raises(RecordError):
        unpack(record, KEY, CARD)


@pytest.mark.parametrize("rows", ['["features"]', '["features","<f4",[257,4],1]', '"ab"', "[]", "1"])
def test_rows_that_are_not_ours_are_not_believed(rows):
    header = f'{{"fingerprint":"f","view":224,"digest":"{"0" * 64}","arrays":[{rows}]}}'.encode()
    record = START.pack(b"GLVF", 1, len(header), blake3(header).digest()) + header
    with pytest.raises(RecordError, match="shape"):
        unpack(record, KEY, CARD)
