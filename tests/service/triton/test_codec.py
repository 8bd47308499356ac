"""A request is written as protobuf reads it, and its tensors are copied once."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from service.core.payer import Payer, current
from service.triton import codec

TENSORS = {
    "features": np.arange(2 * 257 * 8, dtype=np.float32).reshape(2, 257, 8),
    "half": np.arange(130, dtype=np.float16).reshape(1, 130),  # a length of two bytes
    "turned": np.arange(12, dtype=np.int32).reshape(3, 4).T,
    "nothing": np.zeros((1, 0), np.uint8),
    "yes": np.array([[True]]),
    "ids": np.array([[2**63 + 5]], np.uint64),
    "scalar": np.array(7, np.int32),
}


def read(wire: bytes) -> Any:
    return service_pb2.ModelInferRequest.FromString(wire)


def test_a_request_holds_each_tensor_as_protobuf_would_write_it():
    found = read(codec.request("see", TENSORS, "a1"))
    assert (found.model_name, found.id) == ("see", "a1")
    assert [each.name for each in found.inputs] == list(TENSORS)
    for told, content, array in zip(found.inputs, found.raw_input_contents, TENSORS.values(), strict=True):
        assert tuple(told.shape) == array.shape
        assert content == array.tobytes()


def test_texts_have_their_lengths_before_them():
    found = read(codec.request("llm", {"stop_words": np.array([[b"ab", "ä".encode()]], np.object_)}))
    assert found.raw_input_contents == [b"\2\0\0\0ab\2\0\0\0\xc3\xa4"]


def test_a_request_says_who_pays_and_that_a_stream_tells_its_end():
    token = current.set(Payer("acme", "default"))
    try:
        found = read(codec.request("llm", {"input_ids": np.zeros((1, 3), np.int32)}, for_tensorrt_llm=True))
    finally:
        current.reset(token)
    assert found.parameters["triton_enable_empty_final_response"].bool_param
    assert found.parameters["glimpse_payer"].string_param
    assert "sequence_length" in [each.name for each in found.outputs]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 3_000_000])
def test_a_length_has_as_many_bytes_as_it_needs(size: int):
    found = read(codec.request("attend", {"features": np.ones(size, np.uint8)}))
    assert [len(each) for each in found.raw_input_contents] == [size]


def test_the_tensors_are_copied_once():
    features = np.zeros((1, 257, 768), np.float32)
    tracemalloc.start()
    try:
        wire = codec.request("attend", {"features": features})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert features.nbytes < len(wire) < most < 1.1 * features.nbytes
