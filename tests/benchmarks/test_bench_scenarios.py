"""A promise whose figures are missing is told as not met, and the report is not lost."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.bench.load import Arrivals
from benchmarks.bench.report import cancelled_share
from benchmarks.bench.scenarios import (
    Promises,
    capacity_of,
    encoded,
    goodput,
    median_s,
    percentile,
    right,
    share_of_best,
    share_of_single,
)
from benchmarks.bench.side_by_side import Case
from benchmarks.bench.workloads import Workload

CASE, OTHER = (Case(Workload(shape), Arrivals(clients=4), 1.0) for shape in ("cold", "mixed"))


def report(**rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Make a report of CASE: each system's figures, round by round."""
    runs = [
        {"system": system, "workload": CASE.label, "figures": figures}
        for system, each in rounds.items()
        for figures in each
    ]
    return {"runs": runs, "engine": {"requests_per_s": {}}, "failed": {}}


def verdicts(told: dict[str, Any]) -> list[tuple[float | None, bool]]:
    """Judge every kind of promise."""
    promises = Promises(told)
    promises.against("naive", CASE, 1.0)
    promises.against("naive", CASE, 1.0, percentile("end_to_end_ms", "p95"), at_least=False)
    promises.against("naive", CASE, 1.0, goodput)
    promises.against("naive", CASE, 1.0, right)
    promises.between(CASE, OTHER, 1.0, percentile("first_token_ms", "p50"), "first", at_least=False)
    promises.accuracy_kept(CASE, OTHER, 0.02)
    promises.pooled_p95("glimpse", "naive", CASE, 1.0, "new")
    promises.of_limit(CASE, 0.5)
    promises.gateway_cpu(CASE)
    return [(each["found"], each["met"]) for each in promises.into(told)["verdict"]]


def test_nothing_measured_keeps_no_promise():
    assert verdicts(report()) == [(None, False)] * 9


def test_figures_that_a_round_lacks_keep_no_promise():
    few = {"requests_per_s": 2.0, "goodput_per_s": 0.0, "end_to_end_ms": {"n": 3, "p50": 1.0, "max": 2.0},
           "first_token_ms": None, "every_first_token_ms": {"new": []},
           "cpu_ms_a_request": {"worker": 3.0}, "tokens_an_answer": 2.0}  # fmt: skip
    first, *others = verdicts(report(glimpse=[few, few], naive=[few]))
    assert first == (1.0, True)  # over the rounds that both have
    assert others == [(None, False)] * 8


def test_a_load_of_an_unknown_capacity_is_refused():
    with pytest.raises(RuntimeError, match="naive was not measured"):
        capacity_of(report(), "naive", CASE)


def test_one_encode_is_neither_more_nor_none_nor_unknown():
    assert share_of_single([1, 1]) == 1.0
    assert share_of_single([1, 0]) == share_of_single([1, 2]) == 0.5
    assert share_of_single([]) is None
    assert encoded('x 1\nnv_inference_count{model="vision_encoder",version="1"} 7\n') == 7
    with pytest.raises(RuntimeError, match="nv_inference_count"):
        encoded('nv_inference_count{model="llm",version="1"} 7\n')


def test_clients_hang_up_within_the_time_of_an_answer_and_their_share_is_told():
    ended = [{"outcome": "ok", "sent": at, "end": at + took} for at, took in ((0.0, 0.1), (1.0, 0.3), (2.0, 0.2))]
    assert median_s([*ended, {"outcome": "saturated", "sent": 0.0, "end": 9.0}]) == pytest.approx(0.2)
    with pytest.raises(RuntimeError, match="nothing was answered"):
        median_s(ended[:0])
    runs = [{"figures": {"outcomes": each}} for each in ({"ok": 7, "cancelled": 1}, {"ok": 1, "cancelled": 1})]
    assert cancelled_share(runs) == 0.2


def test_a_share_of_the_best_needs_every_case():
    assert share_of_best({"a": 1.0, "b": 4.0}, "a") == 0.25
    assert share_of_best({"a": 1.0, "b": None}, "a") is None
    assert share_of_best({"a": 0.0, "b": 0.0}, "a") is None
