"""What is measured, under which names, and that no caller can make it grow without bound."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from prometheus_client import Histogram, generate_latest

from service.edges.http.application import http_api
from service.telemetry.metrics import Metrics
from tests.support.fakes import House, png
from tests.support.servers import Gateway

NAMED = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "stage_seconds",
    "requests",
    "refusals",
    "requests_waiting",
    "requests_running",
    "admitted_cost",
    "resource_used",
    "vision_tokens",
    "visual_tokens",
    "relevance_entropy_ratio",
    "tension_ratio",
    "feature_cache_lookups",
    "feature_cache_evictions",
    "feature_cache_bytes",
    "redis_errors",
    "redis_breaker_open",
    "fidelity_level",
    "fidelity_changes",
    "reduced_answers",
    "tokens_saved",
}
OBJECTIVES_S = {0.2, 0.5, 1.0, 2.0}


def wrong_with(text: str) -> str:
    """What promtool (Debian's package prometheus) says; nothing is good."""
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert done.stdout or done.stderr or done.returncode == 0
    return done.stdout + done.stderr


def told(house: House) -> str:
    return generate_latest(house.metrics.registry).decode()


def series(house: House) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    return {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in house.metrics.registry.collect()
        for sample in family.samples
        if not sample.name.startswith("glimpse_tenant_")
    }


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    yield house
    house.reader.close()


def caller(house: House) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(http_api(house.edge)), base_url="http://localhost")


async def test_what_is_named_is_declared_under_our_prefix():
    names = {family.name for family in Metrics().registry.collect()}
    assert {f"glimpse_{name}" for name in NAMED} <= names
    assert all(name.startswith(("glimpse_", "process_")) for name in names)


async def test_what_people_promise_is_a_bound_of_a_bucket():
    histograms = [metric for metric in vars(Metrics()).values() if isinstance(metric, Histogram)]
    in_seconds = [metric for metric in histograms if metric._name.endswith("_seconds")]
    assert len(in_seconds) >= 5
    assert all(set(metric._kwargs["buckets"]) >= OBJECTIVES_S for metric in in_seconds)


@pytest.mark.needs("promtool")
async def test_promtool_finds_nothing_wrong_before_and_after_questions(house):
    assert wrong_with(told(house)) == ""
    async with caller(house) as http:
        for question in ("what?", "which?", ""):
            await http.post("/v1/vqa", files={"image": png()}, data={"question": question})
    assert wrong_with(told(house)) == ""
    assert "no help text" in wrong_with("glimpse_bad 1\n")


@pytest.mark.needs("promtool")
async def test_promtool_finds_nothing_wrong_with_what_a_gateway_and_the_llm_tell(gateway: Gateway, triton):
    async with httpx.AsyncClient() as http:
        assert wrong_with((await http.get(f"{gateway.url}/metrics")).text) == ""
        lines = (await http.get(f"http://127.0.0.1:{triton.access.ports.metrics}/metrics")).text.splitlines(
            keepends=True
        )
    of_the_llm = "".join(line for line in lines if "glimpse_llm_" in line)
    assert of_the_llm.count("# HELP") == 6
    assert wrong_with(of_the_llm) == ""


def asking(word: str) -> list[tuple[str, str, dict[str, object]]]:
    """Requests with a word of the caller's in every place that there is: method, path and the rest."""
    image = base64.b64encode(png()).decode()
    vqa = "/v1/vqa"
    return [
        (word.upper(), vqa, {}),
        ("GET", f"/{word}", {}),
        ("GET", f"{vqa}/{word}?{word}={word}", {}),
        ("GET", vqa, {}),
        ("POST", vqa, {"content": word, "headers": {"content-type": f"{word}/{word}"}}),
        ("POST", vqa, {"content": word, "headers": {"content-type": "application/json"}}),
        ("POST", vqa, {"json": {"image": image, "question": word}, "headers": {"x-request-id": word}}),
        ("POST", vqa, {"json": {"image": image, "question": word}, "headers": {"x-tenant-id": word}}),
        ("POST", vqa, {"json": {"image": image, "question": "?", word: word}}),
        ("POST", vqa, {"json": {"image": image, "question": "?", "max_tokens": word}}),
        ("POST", vqa, {"json": {"image": image, "question": "?", "stop": word}}),
        ("POST", vqa, {"json": {"image": f"img_{word}", "question": "?"}}),
        ("POST", vqa, {"json": {"image": word, "question": "?"}}),
        ("POST", "/v1/images", {"content": word}),
        ("POST", "/v1/images", {"files": {word: word.encode()}}),
    ]


def others(text: str) -> str:
    """Without the metrics of tenants, whose labels are bounded: tests/service/telemetry/test_costs.py."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("glimpse_tenant_"))


async def test_no_caller_can_add_a_series(house):
    async with caller(house) as http:
        for word in ("nevermore", "evergreen"):
            for method, path, more in asking(word):
                await http.request(method, path, **more)
            assert word not in others(told(house)).lower()
            if word == "nevermore":
                before = series(house)
    assert series(house) == before
    assert len(before) < 1500  # with all buckets


def test_what_a_gateway_without_keys_and_variants_need_not_read_counts_as_read():
    """Alerts tell of a 0."""
    told = {family.name: [each.value for each in family.samples] for family in Metrics().registry.collect()}
    assert told["glimpse_keys_readable"] == told["glimpse_variants_readable"] == [1.0]


def test_a_series_is_found_by_its_labels_and_made_anew_after_its_removal():
    metrics = Metrics()
    metrics.requests.labels("ok", "left").inc()
    assert metrics.requests.labels("ok", "left") is metrics.requests.labels(outcome="ok", variant="left")
    metrics.end_variant("left")
    assert b'variant="left"' not in generate_latest(metrics.registry)
    metrics.requests.labels("ok", "left").inc(2)
    assert b'glimpse_requests_total{outcome="ok",variant="left"} 2.0' in generate_latest(metrics.registry)
    with pytest.raises(ValueError, match="label count"):
        metrics.requests.labels("ok")
