"""A few hundred mutants of each kind, sent to a real gateway in front of a real Triton."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from benchmarks.fuzz import bodies, clips, decoders, images
from benchmarks.fuzz.campaign import Campaign, Make, Target, run
from benchmarks.fuzz.pictures import files
from benchmarks.fuzz.sending import Mutant, request
from tests.support.servers import Gateway

CONNECTIONS = 4


@pytest.fixture(scope="module")
def target(gateway: Gateway) -> Target:
    url = urlsplit(gateway.url)
    return Target(url.hostname or "", url.port or 80, gateway.process.pid, gateway.log_path)


@pytest.fixture(scope="module")
def image_ids(gateway: Gateway) -> Sequence[str]:
    names = ("PNG colours", "JPEG baseline")
    return [httpx.post(f"{gateway.url}/v1/images", content=files()[name]).json()["id"] for name in names]


async def sent(make: Make, count: int, target: Target, folder: Path) -> Campaign:
    """Fails if anything is wrong."""
    campaign = Campaign(1, folder)
    wrong = await run(make, count, target, campaign, CONNECTIONS)
    assert (campaign.faults, wrong) == ([], [])
    assert campaign.outcomes.total() == count
    return campaign


async def test_mutated_images_are_answered_or_refused(target, tmp_path):
    campaign = await sent(images.mutant, 300, target, tmp_path)
    assert campaign.outcomes["200"] > 30
    assert campaign.outcomes["400 invalid_image"] > 100


async def test_mutated_clips_and_documents_are_answered_or_refused(target, tmp_path):
    campaign = await sent(clips.mutant, 150, target, tmp_path)
    assert campaign.outcomes["200"] > 15
    assert campaign.outcomes["400 invalid_image"] > 30


async def test_mutated_bodies_are_answered_or_refused(target, image_ids, tmp_path):
    campaign = await sent(partial(bodies.mutant, image_ids=image_ids), 300, target, tmp_path)
    assert campaign.outcomes["200"] > 20
    for code in ("invalid_json", "invalid_form", "unknown_field"):
        assert campaign.outcomes[f"400 {code}"] > 3


async def test_a_service_that_fails_is_told_of(target, tmp_path):
    """Against a path that does not answer in the shape of the API's errors."""

    def make(seed: int, number: int) -> Mutant:
        return Mutant(request("/docs/swagger-ui.css", b"", "text/plain", "range: bytes=9-", method="GET"), ("none",))

    campaign = Campaign(1, tmp_path)
    gone = Target(target.host, 1, target.pid, target.log)  # nobody listens there
    await run(make, 2, gone, campaign, 1)
    assert [fault["fault"] for fault in campaign.faults] == ["hung up", "hung up"]


async def test_mutated_images_leave_decoding_processes_alive(tmp_path):
    report = await decoders.run(2, 300, tmp_path)
    assert report["faults"] == []
    assert report["outcomes"]["decoded"] > 30
    assert report["outcomes"]["InvalidImage"] > 100
