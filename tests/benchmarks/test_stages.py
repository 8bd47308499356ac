"""Test the arithmetic of the stages benchmark, and run it once on the real chain."""

from __future__ import annotations

import base64
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.stages import between, counters, graph_ms, measure, never_seen, summary
from build_engines.evaluation.accuracy import SCENES
from service.triton_server.supervision import EmbeddedTriton
from tests.support.paths import PROJECT
from tests.support.servers import Gateway


def test_only_what_was_served_in_between_counts():
    before = {"vision_encoder": (10, 100.0), "llm": (5, 7.0)}
    after = {"vision_encoder": (14, 148.0), "llm": (5, 7.0), "qformer": (2, 3.0)}
    assert between(before, after, 2) == {"vision_encoder": (4, 48.0), "qformer": (2, 3.0)}
    assert between(before, after, 3) == {"vision_encoder": (4, 48.0)}


def test_the_allocators_share_is_of_the_same_rounds():
    told = summary([{"vision_encoder": (2, 10.0), "relevance_allocator": (1, 0.5 + step / 10)} for step in range(3)])
    assert told["allocator_over_encoder"] == {"value": 0.06, "low": 0.05, "high": 0.07}
    assert told["met"] is True


def test_a_stranger_at_the_server_is_noticed():
    with pytest.raises(ValueError, match="nobody else"):
        summary([{"vision_encoder": (1, 10.0), "relevance_allocator": (1, 1.0)}, {"vision_encoder": (1, 10.0)}])


def test_no_two_images_are_the_same_bytes_and_all_show_the_scene():
    drawn = [base64.b64decode(never_seen(SCENES / "new_003.webp")) for _ in range(3)]
    shown = [np.asarray(Image.open(BytesIO(image))) for image in drawn]
    assert len(set(drawn)) == 3
    assert np.array_equal(shown[0], shown[1])


@pytest.mark.slow
def test_each_graph_is_timed_alone():
    assert all(took > 0 for took in graph_ms(PROJECT / "model_repository").values())


def test_the_served_chain_tells_what_each_model_costs(gateway: Gateway, triton: EmbeddedTriton):
    triton_url = f"http://127.0.0.1:{triton.access.ports.metrics}"
    told = measure(gateway.url, triton_url, clients=1, rounds=2, requests=2, detail="low")
    assert {"vision_encoder", "relevance_allocator", "qformer", "llm"} <= set(told["compute_ms"])
    assert all(figure["value"] > 0 for figure in told["compute_ms"].values())
    with httpx.Client(base_url=triton_url) as client:
        assert counters(client)["vision_encoder"][0] >= 6
