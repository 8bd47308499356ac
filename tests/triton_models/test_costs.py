"""A model's process charges its CPU time to the payers of its requests, and the sum is the process's."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from triton_python_backend_utils import InferenceRequest, MetricFamily

from service.core.payer import NOBODY, OTHERS, PAYER, Payer
from triton_models import costs as costs_module
from triton_models.costs import CPU_SECONDS, GPU_SECONDS, Costs, ServerCpu, payer_of

A, B = Payer("a", "default"), Payer("b", "other")


class World:
    """A model's accounts, with the process's CPU time and the clock in the test's hands."""

    def __init__(self, **options: object) -> None:
        MetricFamily.every.clear()
        self.cpu_s = self.now = 0.0
        self.costs = Costs("m", cpu_s=lambda: self.cpu_s, clock=lambda: self.now, **{"hold_s": 0.0, **options})

    def run(self, cpu_s: float, *shares: tuple[Payer, float], seconds: float = 0.0) -> None:
        self.costs.begin()
        self.cpu_s += cpu_s
        self.now += seconds
        self.costs.end(shares)

    def told(self, name: str = CPU_SECONDS) -> dict[tuple[str, str], float]:
        """Seconds by tenant and part."""
        found: defaultdict[tuple[str, str], float] = defaultdict(float)
        for family, labels, metric in MetricFamily.every:
            if family == name:
                found[labels["tenant"], labels["part"]] += metric.value
        return dict(found)


def asked(rows: int, **parameters: str) -> InferenceRequest:
    return InferenceRequest({"image": np.zeros((rows, 2), np.float32)}, ["features"], **parameters)


def test_a_batch_is_shared_by_the_rows_of_its_requests():
    world = World()
    with world.costs.of([asked(1, **{PAYER: str(A)}), asked(3, **{PAYER: str(B)})]):
        world.cpu_s += 4.0
    world.costs.report()
    assert world.told() == pytest.approx({("a", "m"): 1.0, ("b", "m"): 3.0})


def test_a_request_without_a_payer_is_the_service_s():
    assert payer_of(asked(1)) == NOBODY
    assert payer_of(asked(1, **{PAYER: str(B)})) == B


@pytest.mark.parametrize("told", ["x" * 100_000, 7, True])
def test_a_payer_that_no_gateway_names_has_no_label_and_disturbs_no_batch(told):
    world = World()
    with world.costs.of([asked(1, **{PAYER: told}), asked(1, **{PAYER: str(A)})]):
        world.cpu_s += 2.0
    world.costs.report()
    assert world.told() == pytest.approx({(OTHERS, "m"): 1.0, ("a", "m"): 1.0})


def test_time_beside_the_runs_follows_them_and_idle_time_does_not():
    world = World()
    world.run(1.0, (A, 3.0), (B, 1.0))
    world.cpu_s += 0.4
    world.costs.report()
    assert world.told() == pytest.approx({("a", "m"): 1.05, ("b", "m"): 0.35})
    world.cpu_s += 5.0
    world.costs.report()
    assert world.told()[NOBODY.tenant, "m"] == pytest.approx(5.0)
    world.run(1.0, (A, 1.0))
    world.cpu_s += 5.0
    world.costs.report()
    assert world.told() == pytest.approx({("a", "m"): 3.05, ("b", "m"): 0.35, (NOBODY.tenant, "m"): 9.0})


def test_a_run_that_lasts_is_charged_when_it_ends():
    world = World()
    world.costs.begin()
    world.cpu_s += 2.0
    world.costs.report()
    assert sum(world.told().values()) == 0.0
    world.costs.end([(A, 1.0)])
    world.costs.report()
    assert world.told() == pytest.approx({("a", "m"): 2.0})


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.sampled_from([A, B, NOBODY])), max_size=20))
def test_the_sum_is_the_process_s_time(runs):
    world = World()
    for inside_s, beside_s, payer in runs:
        world.run(inside_s, (payer, 2.0), (B, 1.0))
        world.cpu_s += beside_s
        world.costs.report()
    world.costs.close()
    assert sum(world.told().values()) == pytest.approx(world.cpu_s)


def test_seconds_on_a_gpu_are_those_of_the_clock():
    world = World(on_gpu=True)
    world.run(0.1, (A, 1.0), (B, 1.0), seconds=6.0)
    world.costs.report()
    assert world.told(GPU_SECONDS) == pytest.approx({("a", "m"): 3.0, ("b", "m"): 3.0})


def test_a_model_on_the_cpu_tells_no_seconds_of_a_gpu():
    world = World()
    world.run(0.1, (A, 1.0), seconds=6.0)
    world.costs.close()
    world.costs.close()  # Triton may end a model twice
    assert world.told(GPU_SECONDS) == {}


def test_a_new_series_stays_at_zero_until_prometheus_has_seen_it():
    world = World(hold_s=20.0)
    world.run(1.0, (A, 1.0))
    world.costs.report()
    assert world.told()["a", "m"] == 0.0
    world.now = 20.0
    world.costs.report()
    assert world.told()["a", "m"] == 1.0


def test_payers_are_bounded(monkeypatch):
    monkeypatch.setattr(costs_module, "MOST_PAYERS", 3)
    world = World()
    for number in range(10):
        world.run(1.0, (Payer(f"t{number}", "default"), 1.0))
    world.costs.close()
    assert world.told() == pytest.approx({("t0", "m"): 1, ("t1", "m"): 1, (OTHERS, "m"): 8})


def stat(utime: int, stime: int) -> str:
    return f"7 (triton server) S {' '.join(['0'] * 10)} {utime} {stime} 0 0 0 0 1 0 4711 0\n"


def test_the_server_s_own_time_follows_the_requests_and_is_told_once(tmp_path):
    folder = tmp_path / "7"
    folder.mkdir()
    (folder / "stat").write_text(stat(0, 0))
    world, second = World(server=ServerCpu(tmp_path, 7)), ServerCpu(tmp_path, 7)
    world.costs.report()
    (folder / "stat").write_text(stat(30, 20))
    world.run(1.0, (A, 1.0), (B, 1.0))
    world.costs.report()
    assert second.spent_s() == 0.0
    told = world.told()
    assert told["a", "triton"] == told["b", "triton"] == pytest.approx(25 / costs_module.TICKS_A_SECOND)
    world.costs.close()
    assert second.spent_s() > 0
    second.close()
