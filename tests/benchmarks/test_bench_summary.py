"""Test a benchmark's figures, ratios, verdicts and picture on made-up results."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmarks.bench.deaths import good_per_s, refusals_s, slowest_refusals
from benchmarks.bench.load import Arrivals, Plan
from benchmarks.bench.measuring import Measurement, Sample
from benchmarks.bench.report import COLOURS, table, text, write
from benchmarks.bench.summary import (
    Verdict,
    first_tokens,
    latencies,
    mixture,
    pooled_ratio,
    profile,
    ratio,
    slowest,
    summary,
)
from benchmarks.bench.systems import SYSTEMS
from benchmarks.bench.workloads import Workload
from benchmarks.figures import command

PLAN = Plan("glimpse", ["http://127.0.0.1:1"], Workload("mixed"), Arrivals(burst=(2, 1.0)), 1.0, 8, "out.json")


def result(at: float, end: float, outcome: str = "ok", **known: object) -> dict:
    """Make a result with 0.1 s to the first token."""
    defaults = {"follow_up": False, "gaps": [0.01], "tokens": 2, "cache": "miss", "visual_tokens": 32, "reduced": False,
                "text_tokens": 13, "vision_tokens": 100, "right": None}  # fmt: skip
    return defaults | {"at": at, "sent": at, "first": at + 0.1, "end": end, "outcome": outcome} | known


def measured(*results: dict) -> Measurement:
    samples = [
        Sample(float(n), {"gateway": 100.0 + n, "llm": 50.0}, {"gateway": 3}, {"gateway": 9}, 1) for n in range(4)
    ]
    return Measurement(PLAN, 2.0, 0.02, {"gateway": 0.3, "llm": 0.6}, samples, list(results), [0.001, 0.003])


def test_summary_counts_what_was_answered():
    figures = summary(
        measured(
            result(0.0, 0.5),
            result(0.0, 2.0, follow_up=True, cache="hit", reduced=True, vision_tokens=64),
            result(0.5, 0.51, "saturated", first=None),
            result(0.5, 0.7, "cancelled", first=None),
        ),
        slo_s=1.0,
    )
    assert figures["outcomes"] == {"ok": 2, "saturated": 1, "cancelled": 1}
    assert figures["requests_per_s"] == 1.0  # two answers in the two seconds until the last one ended
    assert figures["goodput_per_s"] == 0.5  # one of the two in time
    assert figures["tokens_per_s"] == 2.0
    assert figures["first_token_ms"] == {"n": 2, "p50": 100.0, "max": 100.0}
    assert figures["first_token_ms_follow_up"]["n"] == 1
    assert figures["refusal_ms"]["p50"] == pytest.approx(10.0)
    assert figures["cache_hits"] == figures["reduced"] == 0.5
    assert (figures["vision_tokens"], figures["text_tokens"]) == (82, 13)  # means of answered requests
    assert figures["cpu_ms_a_request"] == {"gateway": 150.0, "llm": 300.0, "all": 450.0}
    assert figures["memory_mb"] == {"gateway": 103, "llm": 50, "all": 153}
    assert figures["memory_growth"] == pytest.approx(0.02)
    assert (figures["load_generator_lag_ms"]["p50"], figures["load_generator_lag_ms"]["max"]) == (2.0, 3.0)


def test_right_answers_are_counted_in_time_and_of_those_that_say_that_they_are_reduced():
    figures = summary(
        measured(
            result(0.0, 0.5, right=True),
            result(0.0, 2.0, right=True),  # too late
            result(0.0, 0.5, right=False, reduced=True),
            result(0.0, 0.6, right=True, reduced=True),
            result(0.5, 0.51, "saturated", first=None),
        ),
        slo_s=1.0,
    )
    assert (figures["right_per_s"], figures["accuracy"], figures["accuracy_reduced"]) == (1.0, 0.75, 0.5)
    assert "accuracy" not in summary(measured(result(0.0, 0.5)), slo_s=1.0)


def test_answers_in_time_are_counted_by_kind():
    results = [
        result(0.0, 0.5),
        result(0.0, 2.0),  # too late
        result(0.0, 0.1, "saturated", first=None),
        *(result(0.0, 0.5, follow_up=True) for _ in range(3)),
    ]
    figures = summary(measured(*results), slo_s=1.0)
    assert figures["by_kind"] == {
        "new": {"requests": 3, "answered": 2, "in_time": 1},
        "follow_up": {"requests": 3, "answered": 3, "in_time": 3},
    }
    assert mixture([figures["by_kind"]] * 2) == "in time: 2 of 6 new images, 6 of 6 follow-ups"
    run = {"system": "glimpse", "workload": "mixed", "round": 1, "figures": figures}
    (row,) = table([run])
    assert (row["new_in_time"], row["new_requests"], row["follow_up_answered"]) == (1, 3, 3)
    assert text({"table": [row]}).splitlines()[1].split()[-2:] == ["1/3", "3/3"]


def test_first_tokens_are_of_the_answered_by_kind():
    results = [result(0.0, 0.5), result(1.0, 2.0, follow_up=True), result(0.5, 0.51, "saturated", first=None)]
    assert first_tokens(results) == {"follow_up": [100.0], "new": [100.0]}


def test_a_percentile_of_pooled_rounds_is_not_the_median_of_theirs():
    ours, theirs = [[1.0] * 9, [5.0] * 9], [[2.0] * 9, [2.0] * 9]
    found = pooled_ratio(ours, theirs, 95)
    assert (found.value, found.low, found.high) == (2.5, 0.5, 2.5)


def test_profile_tells_where_the_cores_time_goes():
    figures = summary(measured(result(0.0, 0.5), result(0.0, 2.0)), slo_s=1.0)
    stages = {"qformer": {"ms_a_row": 50.0}, "prefill": {"ms_a_row": 40.0}, "step": {"ms_a_row": 2.0}}
    engine = {"cores": 2, "answer_tokens": 16, "stages": {"follow_up": stages}}
    found = profile([figures, figures], engine, "follow_up")
    assert found["llm"] == {"spent_ms": 300.0, "bare_ms": 140.0}  # two cores: a prefill and fifteen steps
    assert found["gateway"] == {"spent_ms": 150.0, "bare_ms": 0.0}
    assert found["all"] == {"spent_ms": 2000.0, "bare_ms": 240.0}  # two cores, one answer a second
    assert sum(part["spent_ms"] for part in found.values()) == 2 * 2000.0


def test_few_values_have_no_high_percentile():
    assert latencies([0.001] * 19).keys() == {"n", "p50", "max"}
    assert latencies([0.001] * 20).keys() == {"n", "p50", "p95", "max"}
    assert latencies([0.001] * 100).keys() == {"n", "p50", "p95", "p99", "max"}
    assert slowest(latencies([0.001] * 11 + [0.05])) == 50.0
    assert slowest(latencies([0.001] * 199 + [0.05])) < 50.0
    assert slowest(None) is None


def test_nobody_answered_is_no_latency():
    assert latencies([]) is None
    figures = summary(measured(result(0.0, 0.1, "saturated", first=None)), slo_s=1.0)
    assert figures["requests_per_s"] == 0
    assert figures["first_token_ms"] is None


def test_time_in_which_nobody_can_answer_does_not_count():
    results = [result(at, at + 0.5) for at in (0.0, 1.0, 6.0, 7.5)]
    results += [result(2.0, 2.01, "unavailable"), result(2.5, 6.0), result(7.0, 7.1, "deadline")]
    assert good_per_s(results, [], 1.0) == pytest.approx(4 / 8)
    assert good_per_s(results, [(2.0, 6.0)], 1.0) == pytest.approx(4 / 4)
    assert good_per_s(results, [(6.0, 9.0)], 1.0) == pytest.approx(4 / 6)  # the load ended at 8
    assert good_per_s([], [], 1.0) == 0.0
    refused_ms = {"one gateway": {"n": 200, "p50": 9.0, "p95": 50.0, "p99": 60.0, "max": 70.0}, "16 clients": None}
    assert (slowest_refusals(refused_ms).found, slowest_refusals(refused_ms).met) == (60.0, False)
    assert not slowest_refusals({"16 clients": None}).met
    late = measured(*results, result(3.0, 4.0, "saturated"))
    assert refusals_s(late, [(2.0, 6.0)]) == [pytest.approx(0.1)]


def test_a_ratio_is_of_medians_with_the_rounds_spread():
    found = ratio([3.0, 2.0, 4.0], [1.0, 1.0, 2.0])
    assert (found.value, found.low, found.high) == (3.0, 2.0, 3.0)


def test_a_verdict_says_by_how_much():
    assert Verdict("faster", 3.3, 3.0, at_least=True).to_json()["by"] == "+10%"
    missed = Verdict("slower", 0.6, 0.4, at_least=False).to_json()
    assert (missed["met"], missed["by"], missed["wanted"]) == (False, "+50%", "<= 0.4")
    assert Verdict("leaks", 0, 0, at_least=False).met


@pytest.mark.parametrize("at_least", [True, False])
def test_a_promise_that_was_not_measured_is_not_met(at_least: bool):
    told = Verdict("x", None, 3.0, at_least).to_json()
    assert (told["met"], told["found"], told["by"]) == (False, None, "not measured")
    assert "NOT met x: - (" in text({"verdict": [told]})


def test_the_report_is_json_and_a_picture(tmp_path):
    figures = summary(measured(result(0.0, 0.5)), slo_s=1.0)
    runs = [
        {"system": system, "workload": "cold, 4 clients", "round": number, "figures": figures}
        for number in (1, 2)
        for system in ("naive", "glimpse")
    ]
    promise = Verdict("requests/s", 1.0, 3.0, at_least=True).to_json()
    report = {"title": "made up", "machine": {"cpus": 2, "cpu": "abacus"}, "verdict": [promise],
              "runs": runs, "table": table(runs), "engine": {"requests_per_s": {"cold": 5.0}}}  # fmt: skip
    write(tmp_path / "report", report)
    assert json.loads((tmp_path / "report.json").read_text())["table"][0]["rounds"] == 2
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width > 400
    assert "NOT met requests/s" in text(report)


@pytest.mark.parametrize(
    "arrivals", [Arrivals(clients=3), Arrivals(rate=2.5), Arrivals(burst=(2, 1.0))], ids=lambda arrivals: arrivals.label
)
def test_a_plan_reaches_the_load_generator_as_it_is(arrivals):
    plan = Plan("glimpse", ["a", "b"], Workload("mixed", share=0.75), arrivals, 5.0, 8, "x", visual_tokens=(32, 64))
    assert Plan.from_json(plan.to_json()) == plan


def test_every_system_has_a_colour():
    assert COLOURS.keys() == SYSTEMS.keys()


@pytest.mark.parametrize("out", [["--out", "/somewhere/else"], ["--out=/somewhere/else"], []])
@pytest.mark.parametrize("others", [[], ["--seed", "1"]])
def test_a_report_names_its_command_but_no_place_of_this_machine(out, others):
    assert command("glimpse bench", [*others, *out]) == " ".join(["glimpse bench", *others])
    assert command("glimpse bench", [*out, *others]) == " ".join(["glimpse bench", *others])
