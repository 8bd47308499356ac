"""Summarise one measurement in figures and compare rounds. Pure functions."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.bench.measuring import Measurement

Result = dict[str, Any]
LEAST_MS = 0.05  # a profile leaves out processes that take less per answer
LEAST = ((50, 1), (95, 20), (99, 100))  # percentiles, and the values that each needs
KINDS = {"new": "new images", "follow_up": "follow-ups"}
REFUSALS = frozenset({"saturated", "tenant_share", "deadline", "shutting_down", "overloaded"})


def summary(measured: Measurement, slo_s: float) -> dict[str, Any]:
    """Compute the figures of one measurement.

    Latencies are milliseconds of answered requests. Goodput counts answers within `slo_s` of their scheduled sending
    time, of both kinds together; `by_kind` tells them apart. All latencies include how late the load generator itself
    was; `load_generator_lag_ms` tells that.
    """
    ok = [result for result in measured.results if result["outcome"] == "ok"]
    refused = [result for result in measured.results if result["outcome"] in REFUSALS]
    span_s = max((result["end"] for result in measured.results), default=measured.elapsed_s)
    good = sum(result["end"] - result["at"] <= slo_s for result in ok)
    answered = max(len(ok), 1)
    cpu_ms = {role: round(seconds * 1e3 / answered, 2) for role, seconds in measured.cpu_s.items()}
    memory = _most(sample.memory_mb for sample in measured.samples)
    held = [sum(sample.memory_mb.values()) for sample in measured.samples]
    quarter = max(1, len(held) // 4)
    return {
        "requests": len(measured.results),
        "outcomes": dict(Counter(result["outcome"] for result in measured.results)),
        "requests_per_s": round(len(ok) / span_s, 3),
        "tokens_per_s": round(sum(result["tokens"] for result in ok) / span_s, 2),
        "goodput_per_s": round(good / span_s, 3),
        "slo_s": slo_s,
        "by_kind": by_kind(measured.results, slo_s),
        "first_token_ms": latencies(result["first"] - result["at"] for result in ok),
        "first_token_ms_follow_up": latencies(result["first"] - result["at"] for result in ok if result["follow_up"]),
        "first_token_ms_new": latencies(result["first"] - result["at"] for result in ok if not result["follow_up"]),
        "inter_token_ms": latencies(gap for result in ok for gap in result["gaps"]),
        "end_to_end_ms": latencies(result["end"] - result["at"] for result in ok),
        "refusal_ms": latencies(result["end"] - result["sent"] for result in refused),
        "tokens_an_answer": round(sum(result["tokens"] for result in ok) / answered, 2),
        "text_tokens": round(sum(result["text_tokens"] for result in ok) / answered, 2),
        "vision_tokens": round(sum(result["vision_tokens"] for result in ok) / answered, 2),
        "cache_hits": _share(result["cache"] == "hit" for result in ok if result["cache"]),
        "reduced": _share(result["reduced"] for result in ok),
        "cpu_ms_a_request": cpu_ms | {"all": round(sum(cpu_ms.values()), 2)},
        "load_generator_cpu_ms_a_request": round(measured.load_cpu_s * 1e3 / answered, 2),
        "load_generator_lag_ms": latencies(measured.load_lags_s),
        "memory_mb": {role: round(held) for role, held in memory.items()} | {"all": round(sum(memory.values()))},
        "memory_growth": round(max(held[-quarter:]) / max(held[:quarter]) - 1, 4),
    } | scored(ok, slo_s, span_s)


def by_kind(results: Iterable[Result], slo_s: float) -> dict[str, dict[str, int]]:
    """Count the requests of each kind: all, those answered, and those answered in time.

    Under overload follow-ups are answered more often than new images, so the answers are another mixture than the load.
    """
    found = {kind: {"requests": 0, "answered": 0, "in_time": 0} for kind in KINDS}
    for result in results:
        counts = found["follow_up" if result["follow_up"] else "new"]
        is_answered = result["outcome"] == "ok"
        counts["requests"] += 1
        counts["answered"] += is_answered
        counts["in_time"] += is_answered and result["end"] - result["at"] <= slo_s
    return found


def mixture(rounds: Sequence[dict[str, dict[str, int]]]) -> str:
    """Say how many requests of each kind were answered in time, over all rounds."""
    told = []
    for kind, name in KINDS.items():
        in_time, requests = (sum(each[kind][what] for each in rounds) for what in ("in_time", "requests"))
        if requests:
            told.append(f"{in_time:,} of {requests:,} {name}")
    return f"in time: {', '.join(told)}"


def scored(ok: Sequence[Result], slo_s: float, span_s: float) -> dict[str, float | None]:
    """Count the right answers among the answered requests; nothing if they were not scored.

    `right_per_s` counts those within `slo_s`. `accuracy` is the share of right answers among all, and among those that
    say that they are reduced.
    """
    known = [result for result in ok if result["right"] is not None]
    if not known:
        return {}
    in_time = sum(result["right"] for result in known if result["end"] - result["at"] <= slo_s)
    return {
        "right_per_s": round(in_time / span_s, 3),
        "accuracy": _share(result["right"] for result in known),
        "accuracy_reduced": _share(result["right"] for result in known if result["reduced"]),
    }


def first_tokens(results: Iterable[Result]) -> dict[str, list[float]]:
    """Return the first token time in ms of every answered request, in order, by kind."""
    ok = [result for result in results if result["outcome"] == "ok"]
    return {
        kind: [round((result["first"] - result["at"]) * 1e3, 1) for result in ok if result["follow_up"] is follow_up]
        for kind, follow_up in (("follow_up", True), ("new", False))
    }


def latencies(seconds: Iterable[float]) -> dict[str, float] | None:
    """Return percentiles in ms, or None if there are no values.

    Too few values have no `p95` or no `p99`: it would be their maximum, or nearly.
    """
    found = np.fromiter(seconds, float) * 1e3
    if not found.size:
        return None
    told = {f"p{share}": round(float(np.percentile(found, share)), 2) for share, least in LEAST if found.size >= least}
    return {"n": int(found.size), **told, "max": round(float(found.max()), 2)}


def slowest(figures: dict[str, float] | None) -> float | None:
    """Return the p99 of such percentiles, or the maximum if they have none; None if there were no values."""
    return figures.get("p99", figures["max"]) if figures else None


def _share(said: Iterable[bool]) -> float | None:
    answers = list(said)
    return round(sum(answers) / len(answers), 3) if answers else None


def _most(samples: Iterable[dict[str, float]]) -> dict[str, float]:
    most: dict[str, float] = {}
    for sample in samples:
        for role, held in sample.items():
            most[role] = max(most.get(role, 0.0), held)
    return most


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ratio of medians over the rounds; `low` and `high` are the extremes of the rounds' own ratios."""

    value: float
    low: float
    high: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compare figures measured in turn; the rounds are paired."""
    each = [one / other for one, other in zip(ours, theirs, strict=True)]
    value = statistics.median(ours) / statistics.median(theirs)
    return Ratio(round(value, 3), round(min(each), 3), round(max(each), 3))


def pooled_ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], percentile: float) -> Ratio:
    """Compare a percentile over all rounds' values together.

    In one short round, the percentile depends on a few slow requests.
    """
    each = [np.percentile(one, percentile) / np.percentile(other, percentile)
            for one, other in zip(ours, theirs, strict=True)]  # fmt: skip
    value = np.percentile(np.concatenate(ours), percentile) / np.percentile(np.concatenate(theirs), percentile)
    return Ratio(round(float(value), 3), round(float(min(each)), 3), round(float(max(each)), 3))


def profile(rounds: Sequence[dict[str, Any]], engine: dict[str, Any], workload: str) -> dict[str, dict[str, float]]:
    """Split the cores' time per answer under full load: milliseconds by process.

    Beside each process is the time that its graphs take at the bare engine limit. `idle` is unused core time.
    """
    cores, stages = engine["cores"], engine["stages"][workload]
    bare: Counter[str] = Counter()
    for stage, found in stages.items():
        times = engine["answer_tokens"] - 1 if stage == "step" else 1
        bare["llm" if stage in ("prefill", "step") else stage] += times * found["ms_a_row"] * cores

    def median(figure: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(figure(figures) for figures in rounds)

    roles = {role for figures in rounds for role in figures["cpu_ms_a_request"]} - {"all"}
    spent = {role: median(lambda figures, role=role: figures["cpu_ms_a_request"].get(role, 0.0)) for role in roles}
    spent["load generator"] = median(lambda figures: figures["load_generator_cpu_ms_a_request"])
    whole = cores * 1e3 / median(lambda figures: figures["requests_per_s"])
    spent["idle"] = max(whole - sum(spent.values()), 0.0)
    order = sorted((role for role, ms in spent.items() if ms >= LEAST_MS), key=spent.__getitem__, reverse=True)
    return {role: {"spent_ms": round(spent[role], 2), "bare_ms": round(bare[role], 2)} for role in order} | {
        "all": {"spent_ms": round(whole, 2), "bare_ms": round(sum(bare.values()), 2)}
    }


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise and what was found."""

    promise: str
    found: float | None  # None: not measured, so not met
    wanted: float
    at_least: bool  # else at most
    note: str = ""

    @property
    def met(self) -> bool:
        if self.found is None:
            return False
        return self.found >= self.wanted if self.at_least else self.found <= self.wanted

    def to_json(self) -> dict[str, Any]:
        return {
            "promise": self.promise,
            "wanted": f"{'>=' if self.at_least else '<='} {self.wanted:g}",
            "found": None if self.found is None else round(self.found, 4),
            "met": self.met,
            "by": self._by(),
            "note": self.note,
        }

    def _by(self) -> str:
        if self.found is None:
            return "not measured"
        return f"{self.found / self.wanted - 1:+.0%}" if self.wanted else f"{self.found:+g}"
