"""Vision features as bytes. Another process, another version or damaged memory may have written them.

    magic, 4 bytes | version, u16 | length of the header, u16 | blake3 of everything after it, 32 bytes
    header: JSON with the key and the dtype and shape of each array, padded with spaces
    the arrays in C order, little-endian, in the order of the fields of VisionFeatures or, for a closer view,
    CloserFeatures; int8 features are followed by their scales

A record is used only if all of it fits the key and the model card. Unpacked features equal the packed ones bit for bit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
from blake3 import blake3

from service.cache.keys import FeatureKey, Features
from service.core.card import ModelCard
from service.core.vision import CLOSER_SIZE, IMAGE_SIZE, CloserFeatures, Int8Rows, VisionFeatures

MAGIC = b"GLVF"
VERSION = 1
START = struct.Struct("<4sHH32s")
ALIGNED = 64  # bytes; the arrays start at a multiple of it
OF_VIEW: Mapping[int, type[Any]] = {IMAGE_SIZE: VisionFeatures, CLOSER_SIZE: CloserFeatures}
FLOATS = {"FP32": "<f4", "FP16": "<f2"}  # NumPy's dtype by Triton's type
INT8 = "|i1"
SCALES = "features_scales"

Array = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
Reason = Literal["magic", "version", "checksum", "key", "shape", "dtype"]


class RecordError(ValueError):
    """The bytes are not a record of this key."""

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


def unpack(record: bytes, key: FeatureKey[Features], card: ModelCard) -> Features:
    """Return read-only arrays over the memory of the record. Raises RecordError if anything does not fit."""
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
        told: list[Array] = [(name, dtype, tuple(shape)) for name, dtype, shape in header["arrays"]]
        _require_arrays(told, key.view, card)
        found = _arrays(record, START.size + header_bytes, told)
        if SCALES in found:
            found["features"] = Int8Rows(found["features"], found.pop(SCALES))
        features: Features = OF_VIEW[key.view](**found)
    except RecordError:
        raise
    except (LookupError, TypeError, ValueError) as exc:  # undamaged, but written by something else
        raise RecordError("shape") from exc
    return features


def _require_key(header: Mapping[str, Any], key: FeatureKey[Features]) -> None:
    """Raise RecordError unless the header has this key."""
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


def _require_arrays(told: list[Array], view: int, card: ModelCard) -> None:
    """Raise RecordError unless the arrays have the names, shapes and dtypes of the model card."""
    floats = [(name, FLOATS[card.type_of(name)], shape) for name, shape in card.feature_shapes[view].items()]
    (_, dtype, rows), *others = floats  # features come first in both views
    rounded = [("features", INT8, rows), (SCALES, dtype, rows[:1]), *others]
    expected = rounded if told and told[0][1] == INT8 else floats
    if [(name, shape) for name, _, shape in told] != [(name, shape) for name, _, shape in expected]:
        raise RecordError("shape")
    if told != expected:
        raise RecordError("dtype")


def _arrays(record: bytes, at: int, told: list[Array]) -> dict[str, Any]:
    """Return the arrays from byte `at` on. Raises RecordError or ValueError unless they fill the record exactly."""
    found = {}
    for name, dtype, shape in told:
        found[name] = np.frombuffer(record, dtype, math.prod(shape), at).reshape(shape)
        at += found[name].nbytes
    if at != len(record):
        raise RecordError("shape")
    return found
