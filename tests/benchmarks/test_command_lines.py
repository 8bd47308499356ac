"""Benchmarks refuse arguments that they cannot measure with, and a quick try does not replace a published report."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import ablate, confidence, figures, first_answer, fleet, latency, simulate
from benchmarks.ablation import costs
from benchmarks.arguments import above_zero, count
from benchmarks.bench import __main__ as bench
from benchmarks.bench import side_by_side
from benchmarks.bench.load import Arrivals
from benchmarks.bench.models import BUILD
from benchmarks.bench.side_by_side import Case, Comparison, machine, profiles
from benchmarks.bench.summary import summary
from benchmarks.bench.workloads import Workload
from benchmarks.figures import commit, tell
from benchmarks.growth import __main__ as growth
from tests.benchmarks.test_bench_summary import measured, result


@pytest.mark.parametrize("said", ["0", "-1", "1.5", "many", ""])
def test_a_count_is_a_whole_number_of_at_least_one(said: str):
    with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
        count(said)
    assert count("1") == 1


@pytest.mark.parametrize("said", ["0", "-1", "nan", "inf", "soon"])
def test_a_duration_or_rate_is_above_zero(said: str):
    with pytest.raises(argparse.ArgumentTypeError, match="above 0"):
        above_zero(said)
    assert above_zero("0.5") == 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        "--burst 0 1",
        "--burst 4 0",
        "--burst 0.5 1",
        "--rate 0",
        "--clients 0",
        "--rounds 0",
        "--seconds 0",
        "--systems naive,glimpse --workloads mixed,multi_image:2",
    ],
)
def test_a_comparison_refuses_what_it_cannot_measure(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["glimpse bench", *arguments.split()])
    monkeypatch.setattr(bench, "compare", lambda _: pytest.fail("it began"))
    with pytest.raises(SystemExit) as refused:
        bench.main()
    assert refused.value.code == 2
    assert arguments.split(maxsplit=1)[0] in capsys.readouterr().err.split("error:")[1] or "multi_image" in arguments


def test_several_images_are_only_for_systems_that_see_them_all():
    several = [Workload("mixed"), Workload("multi_image")]
    assert bench.unequal(["glimpse", "glimpse-no-cache"], several) == ""
    assert bench.unequal(["naive", "glimpse"], [Workload("mixed")]) == ""
    assert "triton would see the first image alone" in bench.unequal(["glimpse", "triton"], several)


@pytest.mark.parametrize("arrivals", [Arrivals(rate=2.0), Arrivals(burst=(2, 1.0)), Arrivals(clients=1)])
def test_only_closed_loops_of_several_clients_are_profiled(arrivals: Arrivals):
    figures = summary(measured(result(0.0, 0.5)), slo_s=1.0)
    cases = [Case(Workload("cold"), each, 1.0) for each in (arrivals, Arrivals(clients=4))]
    runs = [{"system": "glimpse", "workload": case.label, "figures": figures} for case in cases]
    engine = {"cores": 2, "answer_tokens": 2, "stages": {"cold": {"llm": {"ms_a_row": 1.0}}}}
    found = profiles(Comparison("reference", ("glimpse",), tuple(cases), 1), runs, engine)
    assert list(found) == [cases[1].label]


def test_measured_rounds_outlive_a_failure_after_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise RuntimeError("no engine")

    monkeypatch.setattr(side_by_side, "BUILD", tmp_path / "bench")
    monkeypatch.setattr(side_by_side, "turn", lambda *_: [{"system": "glimpse"}])
    monkeypatch.setattr(side_by_side, "engine_limit", fail)
    with pytest.raises(RuntimeError, match="no engine"):
        side_by_side.compare(Comparison("reference", ("glimpse",), (), 2))
    assert json.loads((tmp_path / "bench" / "runs.json").read_text()) == [{"system": "glimpse"}] * 2


def test_a_report_names_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tell({"a": 1}, tmp_path / "x" / "report.json")
    assert json.loads((tmp_path / "x" / "report.json").read_text()) == {"commit": commit(), "a": 1}
    assert machine()["commit"] == commit()
    monkeypatch.setattr(figures, "__file__", str(tmp_path / "figures.py"))  # no checkout
    assert commit() is None
    monkeypatch.setenv("PATH", "")  # no git
    assert commit() is None


@pytest.mark.parametrize(
    ("parsed", "quick"),
    [
        (ablate.parsed, "--quick"),
        (growth.parsed, "--small"),
        (confidence.parsed, "--scenes 4"),
        (simulate.parsed, "--requests 100"),
        (fleet.parsed, "--requests 100"),
    ],
)
def test_a_quick_try_does_not_replace_a_published_report(parsed: Callable[[list[str]], argparse.Namespace], quick: str):
    assert parsed(quick.split()).out.is_relative_to(BUILD)
    assert parsed(["--out", "benchmarks/results/x"]).out == Path("benchmarks/results/x")


def test_throughput_is_not_that_of_the_cache_of_visual_tokens(monkeypatch: pytest.MonkeyPatch):
    """The clients of benchmarks.latency repeat their questions."""
    told: dict[str, str] = {}

    def gateway(model: object, folder: Path, settings: dict[str, str]) -> None:
        told.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "gateway", gateway)
    monkeypatch.setattr(sys, "argv", ["latency"])
    monkeypatch.setenv("GLIMPSE_LLM_TOKENS", "7")
    with pytest.raises(KeyboardInterrupt):
        latency.main()
    assert (told["VISUAL_CACHE_BYTES"], told["LLM_TOKENS"]) == ("0", "7")


def test_a_server_that_ended_is_not_stopped_again():
    """Else its own error would be hidden."""
    with subprocess.Popen(["true"], start_new_session=True) as process:
        process.wait()
        first_answer.stop(process)


def test_the_allocators_share_when_served_is_read_beside_the_report(tmp_path: Path):
    times = {"relevance_allocator": {"224 view": {"value": 1.0}}, "vision_encoder": {"224 view": {"value": 4.0}}}
    assert costs.shares({"latency_ms": times}, tmp_path) == {"exported graphs": 0.25, "served": None}
    (tmp_path / "stages.json").write_text('{"allocator_over_encoder": {"value": 0.09}}')
    assert costs.shares({"latency_ms": times}, tmp_path)["served"] == 0.09
