"""Run the load generator against a real gateway and check its counts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import httpx
import pytest

from benchmarks.bench.load import WAITED, Arrivals, Plan
from benchmarks.bench.measuring import measure
from benchmarks.bench.models import REFERENCE
from benchmarks.bench.scenes import Scenes
from benchmarks.bench.summary import summary
from benchmarks.bench.systems import Running
from benchmarks.bench.torch_model import TorchModel
from benchmarks.bench.workloads import KNOWN, Workload
from service.admission.scheduler import Claim, Kind, Resource, Scheduler
from service.core.card import LLM_TOKENIZER
from service.triton_server.supervision import EmbeddedTriton
from tests.support.servers import Gateway, StartGateway, free_ports

IN_TIME_S = 60.0  # the tests share their cores


def plan(workload: Workload, arrivals: Arrivals, **more: object) -> Plan:
    told = {"duration_s": IN_TIME_S, "max_tokens": 4, "out": "", "requests": 12, "timeout_s": IN_TIME_S}
    return Plan("", [], workload, arrivals, **told | more)


@pytest.fixture
def running(gateway: Gateway, tmp_path: Path) -> Running:
    return Running("glimpse", (gateway.url,), (gateway.process.pid,), tmp_path)


def test_a_closed_loop_asks_again_when_it_is_answered(running: Running):
    found = measure(running, plan(Workload("mixed"), Arrivals(clients=2), first_new=KNOWN + 1000))
    assert Counter(result["outcome"] for result in found.results) == {"ok": 12}
    assert Counter(result["follow_up"] for result in found.results) == {True: 6, False: 6}
    for result in found.results:
        assert result["cache"] == ("hit" if result["follow_up"] else "miss")
        assert result["at"] <= result["sent"] <= result["first"] <= result["end"]
        assert result["tokens"] >= 1
    assert found.cpu_s["gateway"] > 0
    assert found.samples[0].memory_mb["gateway"] > 20
    assert found.load_lags_s
    assert min(found.load_lags_s) >= 0


def test_the_reference_models_answers_are_scored(running: Running):
    asked = plan(Workload("mixed"), Arrivals(clients=2), first_new=KNOWN + 6000, scored=True, max_tokens=16)
    found = measure(running, asked)
    assert {result["outcome"] for result in found.results} == {"ok"}
    assert sum(result["right"] for result in found.results) >= 9  # of 12; it answers 95 % of these scenes right
    assert summary(found, IN_TIME_S)["accuracy"] >= 0.75


def test_a_dead_gateway_is_passed_over(gateway: Gateway, tmp_path: Path):
    """Ids are asked only where they are known."""
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    up = Running("glimpse", (dead, gateway.url), (gateway.process.pid,), tmp_path)
    begun: list[bool] = []
    found = measure(
        up, plan(Workload("mixed"), Arrivals(clients=2), first_new=KNOWN + 5000), lambda: begun.append(True)
    )
    assert Counter(result["outcome"] for result in found.results) == {"ok": 12}
    assert begun == [True]


def test_an_open_loop_sends_at_its_times(running: Running):
    found = measure(running, plan(Workload("cold"), Arrivals(rate=50.0), first_new=KNOWN + 2000))
    sent = sorted(result["at"] for result in found.results)
    assert len(sent) == 12
    assert all(result["sent"] >= result["at"] - 0.005 for result in found.results)  # a timer may fire up to 5 ms early


def test_clients_that_hang_up_are_told_apart(running: Running, gateway: Gateway):
    workload = Workload("cold", cancels=1.0, cancel_within_s=0.001)
    found = measure(running, plan(workload, Arrivals(clients=4), first_new=KNOWN + 3000))
    assert {result["outcome"] for result in found.results} == {"cancelled"}
    assert httpx.get(f"{gateway.url}/health/live").is_success


def test_refusals_carry_their_reason(start_gateway: StartGateway, triton: EmbeddedTriton, tmp_path: Path):
    url = triton.access.url
    with start_gateway(
        {"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_MAX_REQUESTS_IN_FLIGHT": "4"}
    ) as small:
        up = Running("glimpse", (small.url,), (small.process.pid,), tmp_path)
        found = measure(up, plan(Workload("same"), Arrivals(burst=(50, 60.0)), requests=50, first_new=KNOWN + 4000))
    outcomes = Counter(result["outcome"] for result in found.results)
    assert outcomes["saturated"] > 0
    assert outcomes["ok"] + outcomes["saturated"] == 50


def test_the_vqa_ensemble_is_asked_directly(triton: EmbeddedTriton, tmp_path: Path):
    up = Running("triton", (triton.access.url,), (triton.pid,), tmp_path)
    tokenizer = str(REFERENCE.repository / LLM_TOKENIZER)
    found = measure(up, plan(Workload("cold"), Arrivals(clients=2), requests=4, tokenizer=tokenizer))
    assert Counter(result["outcome"] for result in found.results) == {"ok": 4}
    assert all(1 <= result["tokens"] <= 4 for result in found.results)
    assert found.cpu_s["llm"] >= 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, about itself
def test_pytorch_answers_a_batch_as_one_by_one():
    model, scenes = TorchModel.load(REFERENCE.checkpoint), Scenes.load(3)
    asked = [(scenes.jpeg(number), scenes.rows[number][0].question) for number in range(3)]
    alone = [model.answer([image], [question], 8)[0] for image, question in asked]
    assert model.answer(*zip(*asked, strict=True), 8) == alone
    assert all(text for text, _ in alone)
    assert len(scenes.rows) == 3


def test_a_request_that_expired_in_the_queue_is_recognised_by_its_message():
    scheduler = Scheduler(vision_slots=1, llm_tokens=100)
    claim = Claim(Resource.LLM, 10, Kind.FOLLOW_UP, 0.0, 1.0)
    assert WAITED in scheduler.expired(claim).message
