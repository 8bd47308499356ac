"""Vision features as bytes, which another process, another version or a damaged memory may have written.

    magic, 4 bytes | version, u16 | header's length, u16 | blake3 of all that follows, 32 bytes
    header: JSON with the key and each array's dtype and shape, padded with spaces
    the arrays, in the order of VisionFeatures' or, of a closer view, CloserFeatures' fields, C order, little-endian;
    features that are int8 are followed by their scales

Everything is checked before it is believed; what was packed comes back bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
from blake3 import blake3

from service.cache.features import FeatureKey, Features
from service.core.vision import CLOSER_SIZE, IMAGE_SIZE, CloserFeatures, Int8Rows, VisionFeatures

MAGIC = b"GLVF"
VERSION = 1
START = struct.Struct("<4sHH32s")
ALIGNED = 64  # bytes: the arrays start at a multiple of it
OF_VIEW: Mapping[int, type[Any]] = {IMAGE_SIZE: VisionFeatures, CLOSER_SIZE: CloserFeatures}
FLOATS = ("<f4", "<f2")
INT8 = "|i1"
SCALES = "features_scales"

Shapes = Mapping[int, Mapping[str, tuple[int, ...]]]  # by view, the arrays' by name
Reason = Literal["magic", "version", "checksum", "key", "shape"]


class RecordError(ValueError):
    """The bytes are no record for this key."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


def pack(key: FeatureKey[Features], features: Features) -> bytes:
    arrays: dict[str, npt.NDArray[Any]] = {name: np.ascontiguousarray(array) for name, array in _parts(key, features)}
    header = orjson.dumps(
        {
            "fingerprint": key.fingerprint,
            "view": key.view,
            "digest": key.digest,
            "arrays": [[name, array.dtype.str, array.shape] for name, array in arrays.items()],
        }
    )
    header += b" " * (-(START.size + len(header)) % ALIGNED)
    body = b"".join([header, *(array.tobytes() for array in arrays.values())])
    return START.pack(MAGIC, VERSION, len(header), blake3(body).digest()) + body


def unpack(record: bytes, key: FeatureKey[Features], shapes: Shapes) -> Features:
    """Read-only arrays over the record's own memory. Raises RecordError where anything does not fit."""
    if len(record) < START.size or record[: len(MAGIC)] != MAGIC:
        raise RecordError("magic")
    _, version, header_bytes, checksum = START.unpack_from(record)
    if version != VERSION:
        raise RecordError("version")
    body = memoryview(record)[START.size :]
    if blake3(body).digest() != checksum:
        raise RecordError("checksum")
    try:
        header = orjson.loads(body[:header_bytes])
        _require_key(header, key)
        found = _arrays(record, START.size + header_bytes, header["arrays"], shapes[key.view])
        if SCALES in found:
            found["features"] = Int8Rows(found["features"], found.pop(SCALES))
        features: Features = OF_VIEW[key.view](**found)
    except RecordError:
        raise
    except (LookupError, TypeError, ValueError) as exc:  # whole, but not of our making
        raise RecordError("shape") from exc
    return features


def _require_key(header: Mapping[str, Any], key: FeatureKey[Features]) -> None:
    """Raises RecordError."""
    if FeatureKey(header["fingerprint"], header["view"], header["digest"]) != key:
        raise RecordError("key")


def _parts(key: FeatureKey[Features], features: Features) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for name in (each.name for each in fields(OF_VIEW[key.view])):
        part = getattr(features, name)
        if isinstance(part, Int8Rows):
            yield name, part.values
            yield SCALES, part.scales
        else:
            yield name, part


def _arrays(
    record: bytes, at: int, told: list[tuple[str, str, list[int]]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The arrays from byte `at` on. Raises RecordError."""
    expected: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [
        (name, shape, FLOATS) for name, shape in shapes.items()
    ]
    if told[0][1] == INT8:
        rows = shapes["features"]
        expected[:1] = [("features", rows, (INT8,)), (SCALES, rows[:1], FLOATS)]
    if [name for name, _, _ in told] != [name for name, _, _ in expected]:
        raise RecordError("shape")
    found = {}
    for (name, shape, dtypes), (_, dtype, told_shape) in zip(expected, told, strict=True):
        count = int(np.prod(shape))
        if tuple(told_shape) != shape or dtype not in dtypes or at + count * int(dtype[-1]) > len(record):
            raise RecordError("shape")
        found[name] = np.frombuffer(record, dtype, count, at).reshape(shape)
        at += found[name].nbytes
    if at != len(record):
        raise RecordError("shape")
    return found
