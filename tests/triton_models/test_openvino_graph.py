"""OpenVINO computes what ONNX Runtime does, over the same interface."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.support.paths import PROJECT
from tests.triton_models.test_decoder import GRAPH, prompt
from triton_models.decoder import OnnxDecoder
from triton_models.engine import open_engine
from triton_models.session import Graph

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed: pip install -e '.[openvino]'"
)

NEAR = 0.03  # of the greatest value: BF16 has 8 significant bits, and a CPU without it computes in FP32


def test_a_decoder_reads_its_cache_in_place_in_either_library() -> None:
    ours, theirs = (OnnxDecoder(GRAPH, max_rows=4, library=name) for name in ("openvino", "onnxruntime"))
    prompts = [prompt(ours, seed, text) for seed, text in enumerate((3, 40, 7))]
    for decoder in (ours, theirs):
        decoder.prefill(prompts[:2], [decoder.recall(each) for each in prompts[:2]])
    for tokens in ([5, 6], [7, 8]):
        found, expected = (decoder.step(np.array(tokens)) for decoder in (ours, theirs))
        assert np.abs(found - expected).max() < NEAR * np.abs(expected).max()
    found, expected = (decoder.prefill(prompts[2:], [decoder.recall(prompts[2])]) for decoder in (ours, theirs))
    assert np.abs(found - expected).max() < NEAR * np.abs(expected).max()
    found, expected = (decoder.step(np.array([9, 10, 11])).copy() for decoder in (ours, theirs))
    assert np.abs(found - expected).max() < NEAR * np.abs(expected).max()


def test_an_encoder_has_the_same_ends_and_outputs_of_its_own() -> None:
    path = Path(PROJECT / "model_repository" / "vision_encoder" / "1" / "model.onnx")
    ours, theirs = open_engine(path, library="openvino"), Graph(path)
    assert set(ours.inputs) == set(theirs.inputs)
    assert set(ours.outputs) == set(theirs.outputs)
    assert ours.float_type("features") is np.float32
    images = np.random.default_rng(0).integers(0, 255, (2, 1, *theirs.inputs["image"][1:]), np.uint8)
    images.flags.writeable = False  # as Triton's tensors are
    first = ours.run({"image": images[0]}, ["features"])
    kept = first[0].copy()
    ours.run({"image": images[1]}, ["features"])
    np.testing.assert_array_equal(first[0], kept)
    (expected,) = theirs.run({"image": images[0]}, ["features"])
    assert np.abs(kept - expected).max() < NEAR * np.abs(expected).max()
    with pytest.raises(ValueError, match=r"config\.pbtxt has"):
        ours.require(["picture"], ["features"])


def test_another_library_is_refused() -> None:
    with pytest.raises(ValueError, match="onnxruntime or openvino"):
        open_engine(GRAPH, library="tensorflow")
