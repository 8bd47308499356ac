"""Run named measurements and compare the results with their promises.

versus      glimpse against naive, litserve and triton; the bare engine limit
repeat      the first question about an image against later ones; repeated images against triton
request_mix 4 new images and 12 follow-ups against 16 new images; follow-ups against one queue in order of arrival
one_encode  50 requests for one new image at once, through one gateway and through two that share a Redis
overload    three times the service's capacity, with elastic fidelity and without
deaths      three times the capacity while a gateway and a Triton are killed
soak        every workload in turn, with clients that hang up
parts       glimpse with each of its parts switched off
"""

from __future__ import annotations

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import httpx

from benchmarks.bench.deaths import deaths
from benchmarks.bench.load import Arrivals
from benchmarks.bench.measuring import measure, sample
from benchmarks.bench.models import BUILD, ready
from benchmarks.bench.processes import DECODER
from benchmarks.bench.report import table
from benchmarks.bench.side_by_side import Case, Comparison, compare, machine, plan, rounds_of, say
from benchmarks.bench.summary import Verdict, mixture, pooled_ratio, ratio, summary
from benchmarks.bench.systems import SYSTEMS, Running, running, two_gateways
from benchmarks.bench.workloads import Workload
from service.core.card import ModelCard

CLIENTS = 16
BURST = 50  # requests for one new image at once
WARM_UP_IMAGES = 2  # images of the warm-up if a workload needs no known ones
OVERLOAD_S = 60.0
STEADY = 5  # the open loop's duration, in durations of another measurement: its p95 needs more requests
SLICE_S = 30.0  # duration of one workload in the soak
SOAK_CLIENTS = 8  # the soak looks for leaks, not speed, so the machine may have other work
EARLY = 0.25  # first share of the soak, in which memory may grow
SETTLE_S = 15.0
CACHES = ("FEATURE_CACHE_BYTES", "VISUAL_CACHE_BYTES", "IMAGE_STORE_BYTES")
THREADS_OF_A_POOL = 8  # threads that a pool may start late
HELD = r"^(glimpse_(?:admitted_cost|requests_waiting|requests_running|resource_used|requests_in_flight)\S*) (\S+)$"
Figures = dict[str, Any]


def rate(figures: Figures) -> float:
    return float(figures["requests_per_s"])


def goodput(figures: Figures) -> float:
    return float(figures["goodput_per_s"])


def each_kind(figures: Figures) -> dict[str, dict[str, int]]:
    return figures["by_kind"]


def right(figures: Figures) -> float:
    return float(figures["right_per_s"])


def decoder_cpu(figures: Figures) -> float:
    return float(figures["cpu_ms_a_request"].get(DECODER, 0.0))


def percentile(what: str, which: str) -> Callable[[Figures], float]:
    return lambda figures: float(figures[what][which])


class Promises:
    """Compare systems in a report and collect verdicts."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.verdicts: list[Verdict] = []
        self._report = report

    def against(
        self,
        other: str,
        case: Case,
        wanted: float,
        figure: Callable[[Figures], float] = rate,
        what: str = "requests/s",
        at_least: bool = True,
        system: str = "glimpse",
        note: str = "",
    ) -> None:
        """Judge `system`'s figure as a multiple of `other`'s."""
        ours, theirs = (rounds_of(self._report, name, case, figure) for name in (system, other))
        rounds = min(len(ours), len(theirs))
        if rounds:
            found = ratio(ours[:rounds], theirs[:rounds])
            promise = f"{what} of {system} / {other}, {case.label}"
            told = "; ".join(filter(None, (f"rounds {found.low:g} to {found.high:g}", note)))
            self.verdicts.append(Verdict(promise, found.value, wanted, at_least, told))

    def between(self, one: Case, other: Case, wanted: float, figure: Callable[[Figures], float], what: str,
                at_least: bool) -> None:  # fmt: skip
        """Judge Glimpse's figure in one case as a multiple of its figure in the other."""
        ours, theirs = (rounds_of(self._report, "glimpse", case, figure) for case in (one, other))
        if ours and theirs:
            found = ratio(ours, theirs)
            promise = f"{what}, {one.label} / {other.label}"
            self.verdicts.append(
                Verdict(promise, found.value, wanted, at_least, f"rounds {found.low:g} to {found.high:g}")
            )

    def accuracy_kept(self, case: Case, unloaded: Case, wanted: float) -> None:
        """Judge how far the accuracy of Glimpse's answers lies below its accuracy in another case."""
        here, there = (
            rounds_of(self._report, "glimpse", each, lambda figures: float(figures["accuracy"]))
            for each in (case, unloaded)
        )
        if here and there:
            lost = statistics.median(there) - statistics.median(here)
            promise = f"share of right answers lost, {case.label} against {unloaded.label}"
            self.verdicts.append(Verdict(promise, lost, wanted, False, f"{here} against {there}"))

    def pooled_p95(self, system: str, other: str, case: Case, wanted: float, kind: str) -> None:
        """Judge the first-token p95 of one kind of request, over all rounds together."""
        ours, theirs = (
            rounds_of(self._report, name, case, lambda figures: figures["every_first_token_ms"][kind])
            for name in (system, other)
        )
        if ours and len(ours) == len(theirs):
            found = pooled_ratio(ours, theirs, 95)
            promise = f"first token p95 of {kind} of {system} / {other}, {case.label}"
            note = f"rounds {found.low:g} to {found.high:g}, {sum(map(len, ours))} requests each"
            self.verdicts.append(Verdict(promise, found.value, wanted, False, note))

    def of_limit(self, case: Case, wanted: float) -> None:
        limit = self._report["engine"]["requests_per_s"][case.workload.shape]
        found = rounds_of(self._report, "glimpse", case, rate)
        if found:
            share = statistics.median(found) / limit
            promise = f"share of the bare engine limit, {case.label}"
            self.verdicts.append(Verdict(promise, share, wanted, True, f"of {limit:.2f} requests/s"))

    def gateway_cpu(self, case: Case) -> None:
        def over(figures: Figures) -> float:
            return float(figures["cpu_ms_a_request"].get("gateway", 0.0)) - 0.2 * float(figures["tokens_an_answer"])

        found = rounds_of(self._report, "glimpse", case, over)
        if found:
            promise = f"gateway CPU a request less 0.2 ms a token, ms, {case.label}"
            decoding = statistics.median(rounds_of(self._report, "glimpse", case, decoder_cpu))
            note = f"its decoders take {decoding:g} ms besides"
            self.verdicts.append(Verdict(promise, statistics.median(found), 2.0, False, note))

    def into(self, report: dict[str, Any]) -> dict[str, Any]:
        report["verdict"] = [verdict.to_json() for verdict in self.verdicts]
        return report


def versus(model: str, seconds: float, rounds: int) -> dict[str, Any]:
    return versus_base(seconds, rounds) if model == "base" else versus_reference(seconds, rounds)


def versus_base(seconds: float, rounds: int) -> dict[str, Any]:
    many = Arrivals(clients=CLIENTS)
    mixed, cold = Case(Workload("mixed"), many, seconds), Case(Workload("cold"), many, seconds)
    follow_up = Case(Workload("follow_up"), many, seconds, only=("glimpse",))
    repeat = Case(Workload("repeat"), many, seconds, only=("triton", "glimpse"), warm_repeats=32)
    systems = ("naive", "litserve", "triton", "glimpse")
    report = compare(Comparison("base", systems, (mixed, cold, repeat, follow_up), rounds))
    promises = Promises(report)
    promises.against("naive", mixed, 3.0)
    promises.against("naive", cold, 2.0)
    for case in (mixed, cold):
        promises.against("naive", case, 0.4, percentile("end_to_end_ms", "p95"), "end to end p95", at_least=False)
    promises.against("litserve", mixed, 1.5)
    promises.against("triton", repeat, 1.6)
    promises.of_limit(follow_up, 0.85)
    promises.of_limit(cold, 0.85)
    promises.gateway_cpu(mixed)
    return promises.into(report)


def repeat(model: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure repeated images.

    One client sends an image again with all its bytes. Then many clients ask after most images were sent before.
    """
    cases = [Case(Workload(shape), Arrivals(clients=1), seconds, only=("glimpse",), warm_repeats=1) for shape in
             ("same", "cold")]  # fmt: skip
    many = Case(Workload("repeat"), Arrivals(clients=CLIENTS), seconds, warm_repeats=100)
    report = compare(Comparison(model, ("triton", "glimpse"), (*cases, many), rounds, engine=False))
    promises = Promises(report)
    promises.against("triton", many, 1.6)
    for what, which, wanted in (("first_token_ms", "p50", 0.6), ("first_token_ms", "p99", 1.0),
                                ("inter_token_ms", "p50", 1.0)):  # fmt: skip
        promises.between(*cases, wanted, percentile(what, which), f"{what} {which}", at_least=False)
    return promises.into(report)


def versus_reference(seconds: float, rounds: int) -> dict[str, Any]:
    many, one = Arrivals(clients=CLIENTS), Arrivals(clients=1)
    mixed, cold, follow_up = (Case(Workload(shape), many, seconds) for shape in ("mixed", "cold", "follow_up"))
    cold_alone, follow_up_alone = (Case(Workload(shape), one, seconds / 2) for shape in ("cold", "follow_up"))
    report = compare(
        Comparison("reference", ("naive", "litserve", "triton", "glimpse"),
                   (mixed, cold, follow_up, cold_alone, follow_up_alone), rounds)
    )  # fmt: skip
    promises = Promises(report)
    promises.against("naive", mixed, 1.5)
    promises.of_limit(follow_up, 0.5)
    promises.of_limit(cold, 0.5)
    promises.gateway_cpu(mixed)
    slower = [
        ours - theirs
        for ours, theirs in zip(
            *(rounds_of(report, name, cold_alone, percentile("end_to_end_ms", "p50")) for name in ("glimpse", "naive")),
            strict=False,
        )
    ]
    if slower:
        note = f"rounds {min(slower):.1f} to {max(slower):.1f}"
        promise = "ms that one client's cold question takes longer than naive's"
        promises.verdicts.append(Verdict(promise, statistics.median(slower), 8.0, False, note))
    promises.against(
        "naive", follow_up_alone, 1.0, percentile("end_to_end_ms", "p50"), "end to end p50", at_least=False
    )
    return promises.into(report)


def parts(model: str, seconds: float, rounds: int) -> dict[str, Any]:
    many = Arrivals(clients=CLIENTS)
    cases = tuple(Case(Workload(shape), many, seconds, warm_repeats=16 if shape == "repeat" else 0) for shape in
                  ("mixed", "repeat", "follow_up"))  # fmt: skip
    ours = tuple(name for name in SYSTEMS if name.startswith("glimpse"))
    return compare(Comparison(model, ours, cases, rounds, engine=False)) | {"verdict": []}


def request_mix(model: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure the capacity, then an open loop at 80 % of it: the scheduler against one queue in order of arrival.

    Both run without elastic fidelity. It would reduce the work of requests that waited longer, so the comparison would
    measure the work and not its order. By default the encoder has more slots than it fills, and under this load no
    request waits for a slot. Both are therefore also compared with two vision slots. The open loop lasts STEADY times
    `seconds`, and p95 is taken over all rounds together. With 12 s and 2 rounds, about 160 follow-ups count, 8 of them
    slower than p95.
    """
    many = Arrivals(clients=CLIENTS)
    full, new = (
        Case(workload, many, seconds, only=("glimpse",))
        for workload in (Workload("mixed", share=0.75), Workload("cold"))
    )
    half = Case(Workload("mixed"), many, seconds, only=("glimpse-no-fidelity",))
    first = compare(Comparison(model, ("glimpse", "glimpse-no-fidelity"), (full, new, half), rounds, engine=False))
    capacity = statistics.median(rounds_of(first, "glimpse-no-fidelity", half, rate))
    steady = Case(Workload("mixed"), Arrivals(rate=0.8 * capacity), STEADY * seconds)
    pairs = (("glimpse-no-fidelity", "fifo"), ("glimpse-door", "fifo-door"))
    report = compare(Comparison(model, tuple(chain(*pairs)), (steady,), rounds, engine=False, every_first_token=True))
    report["systems"] = first["systems"] | report["systems"]
    report["runs"] = first["runs"] + report["runs"]
    report["table"] = table(report["runs"])
    report["capacity_requests_per_s"] = capacity
    promises = Promises(report)
    promises.between(full, new, 1.5, rate, "requests/s", at_least=True)
    for pair in pairs:
        for kind, wanted in (("follow_up", 0.6), ("new", 1.15)):
            promises.pooled_p95(*pair, steady, wanted, kind)
    return promises.into(report)


def one_encode(model: str, _seconds: float, rounds: int) -> dict[str, Any]:
    """Count the images that Triton's encoder inferred. Probes are postponed, because they use the encoder too."""
    measured_model = ready(model)
    case = Case(Workload("same"), Arrivals(burst=(BURST, 3600.0)), 1.0)
    encodes: dict[str, list[int]] = {"one gateway": [], "two gateways and a Redis": []}
    outcomes: Counter[str] = Counter()
    for number in range(rounds):
        for way, found in encodes.items():
            with two_gateways(measured_model, BUILD / "logs" / "one_encode", {"PROBE_INTERVAL_S": "3600"}) as both:
                up = both if way.startswith("two") else replace(both, urls=both.urls[:1])
                before = encoder_images(both)
                measured = measure(up, replace(plan(case, measured_model, number + 1), requests=BURST))
                found.append(encoder_images(both) - before - WARM_UP_IMAGES)
                outcomes.update(result["outcome"] for result in measured.results)
                say(f"{way}: {found[-1]} encodes of one image")
    promises = [
        Verdict(f"encodes of one new image, {BURST} requests at once, {way}", max(found), 1, False, f"rounds: {found}")
        for way, found in encodes.items()
    ]
    promises.append(
        Verdict("share of them answered", outcomes["ok"] / outcomes.total(), 1.0, True, f"{dict(outcomes)}")
    )
    return report(f"{model}: {BURST} requests at once for one new image", model, promises) | {"encodes": encodes}


def encoder_images(up: Running) -> int:
    text = httpx.get(up.triton_metrics, timeout=10).text
    counted = re.search(r'^nv_inference_count\{model="vision_encoder"[^}]*\} (\d+)', text, re.MULTILINE)
    return int(counted[1]) if counted else 0


def overload(model: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure the capacity in a closed loop, then Poisson arrivals at 0.8 times and 3 times that rate.

    The reference model's answers are scored, because less fidelity is only worth it if the answers stay right. Its
    questions come again, so no answer is taken from the visual cache.
    """
    ours = ("glimpse", "glimpse-no-fidelity")
    mixed = Workload("mixed")
    most = card_visual_tokens(model)
    scored = model == "reference"
    settings = {"VISUAL_CACHE_BYTES": "0"} if scored else {}
    closed = Case(mixed, Arrivals(clients=2 * CLIENTS), seconds, visual_tokens=most, scored=scored)
    first = compare(Comparison(model, ours, (closed,), rounds, engine=False, settings=settings))
    capacity = statistics.median(rounds_of(first, "glimpse-no-fidelity", closed, rate))
    patient_s = ready(model).slo_s  # a later answer has no value for a client
    bearable = replace(closed, arrivals=Arrivals(rate=0.8 * capacity), timeout_s=patient_s)
    strained = replace(bearable, arrivals=Arrivals(rate=3 * capacity), duration_s=max(seconds, OVERLOAD_S))
    beside = (*ours, "glimpse-no-limit")
    cases = (replace(bearable, only=ours), strained)
    found = compare(Comparison(model, beside, cases, rounds, engine=False, settings=settings))
    found["runs"] = first["runs"] + found["runs"]
    found["table"] = table(found["runs"])
    found["capacity_requests_per_s"] = capacity
    promises = Promises(found)
    good = {case.label: statistics.median(rounds_of(found, "glimpse", case, goodput)) for case in
            (closed, bearable, strained)}  # fmt: skip
    kept = good[strained.label] / max(good.values())
    kinds = {system: mixture(rounds_of(found, system, strained, each_kind)) for system in beside}
    told = "; ".join(f"{system} {said}" for system, said in kinds.items())
    note = f"{good}; {kinds['glimpse']}"
    promises.verdicts.append(Verdict("goodput at 3x overload / its best", kept, 0.9, True, note))
    slowest = max(float(run["figures"]["refusal_ms"]["p99"]) for run in found["runs"] if run["figures"]["refusal_ms"])
    promises.verdicts.append(Verdict("slowest refusals (p99), ms", slowest, 50, False))
    grown = {
        run["system"]: float(run["figures"]["memory_growth"])
        for run in found["runs"]
        if run["workload"] == strained.label
    }
    what = f"memory's growth from the first quarter to the last, {strained.label}"
    promises.verdicts.append(Verdict(what, grown["glimpse"], 0.05, False, f"{grown}"))
    promises.against("glimpse-no-fidelity", strained, 1.3, goodput, "goodput", note=told)
    promises.against("glimpse-no-limit", strained, 1.0, goodput, "goodput", note=told)
    if scored:
        promises.against("glimpse-no-fidelity", strained, 2.0, right, "right answers in time", note=told)
        promises.accuracy_kept(strained, bearable, 0.02)
    return promises.into(found)


def soak(model: str, seconds: float, _rounds: int) -> dict[str, Any]:
    """Run every workload in turn for a long time while a fifth of the clients hang up; then look for leaks.

    The caches are small, so they are full within the first minutes. Memory that grows later is a leak.
    """
    measured_model = ready(model)
    shapes = ("mixed", "cold", "repeat", "follow_up")
    slices = max(len(shapes), round(seconds / SLICE_S))
    runs, marks = [], []
    small = replace(SYSTEMS["glimpse"], settings=dict.fromkeys(CACHES, str(32 << 20)))
    with running(small, measured_model, BUILD / "logs" / f"soak_{model}") as up:
        for number in range(slices):
            workload = Workload(shapes[number % len(shapes)], cancels=0.2, cancel_within_s=measured_model.slo_s / 2)
            case = Case(workload, Arrivals(clients=SOAK_CLIENTS), seconds / slices)
            measured = measure(up, plan(case, measured_model, number + 1))
            figures = summary(measured, measured_model.slo_s)
            say(f"  {case.label}: {figures['requests_per_s']:.2f} requests/s, {figures['outcomes']}")
            runs.append({"system": "glimpse", "workload": case.label, "round": number // len(shapes) + 1,
                         "figures": figures})  # fmt: skip
            marks.append(asdict(settled(up)))
    early = max(1, round(len(marks) * EARLY))
    promises = [grown(marks[early:] or marks, "memory_mb", role) for role in marks[-1]["memory_mb"]]
    for what in ("threads", "descriptors"):
        more = {role: marks[-1][what][role] - marks[early - 1][what].get(role, 0) for role in marks[-1][what]}
        promises.append(Verdict(f"more {what} at the end", max(more.values()), THREADS_OF_A_POOL, False, f"{more}"))
    regions = marks[-1]["shared_memory"] - marks[0]["shared_memory"]
    promises.append(Verdict("more shared-memory regions at the end", regions, 0, False))
    ended = sum((Counter(run["figures"]["outcomes"]) for run in runs), Counter())
    failed = {outcome: count for outcome, count in ended.items() if outcome not in ("ok", "cancelled")}
    promises.append(Verdict("requests that failed", sum(failed.values()), 0, False, f"{failed} of {ended.total()}"))
    held = sum(marks[-1]["held"].values())
    promises.append(Verdict("reservations left", held, 0, False, f"{marks[-1]['held']}"))
    found = report(f"{measured_model.title}: {seconds / 60:.0f} minutes of every workload in turn", model, promises)
    return found | {"table": table(runs), "runs": runs, "marks": marks, "slice_s": seconds / slices}


@dataclass(frozen=True, slots=True)
class Mark:
    """Resources that an idle service holds."""

    memory_mb: dict[str, float]
    threads: dict[str, int]
    descriptors: dict[str, int]
    shared_memory: int
    held: dict[str, float]  # reservations, claims, requests in flight: by metric


def settled(up: Running) -> Mark:
    """Take a Mark once nothing is in flight, or after SETTLE_S."""
    deadline = time.monotonic() + SETTLE_S
    while any((held := reservations(up)).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    now = sample(up, 0.0)
    return Mark(now.memory_mb, now.threads, now.descriptors, now.shared_memory, held)


def reservations(up: Running) -> dict[str, float]:
    text = httpx.get(f"{up.urls[0]}/metrics", timeout=10).text
    return {name: float(value) for name, value in re.findall(HELD, text, re.MULTILINE)}


def grown(marks: list[dict[str, Any]], what: str, role: str) -> Verdict:
    """Judge growth by the medians of the last and the first third: a single mark is noise."""
    series = [mark[what].get(role, 0.0) for mark in marks]
    third = max(1, len(series) // 3)
    growth = statistics.median(series[-third:]) / max(statistics.median(series[:third]), 1.0) - 1
    return Verdict(f"growth of {role}'s {what}", growth, 0.05, False, f"{series[0]:.0f} to {series[-1]:.0f}")


def report(title: str, model: str, promises: list[Verdict]) -> dict[str, Any]:
    return {
        "title": title,
        "model": model,
        "machine": machine(),
        "verdict": [promise.to_json() for promise in promises],
    }


def card_visual_tokens(model: str) -> tuple[int, int]:
    """Return the widest budget that the model offers."""
    card = ModelCard.from_json((ready(model).repository / "card.json").read_text())
    return card.visual_tokens


SCENARIOS: dict[str, Callable[[str, float, int], dict[str, Any]]] = {
    "versus": versus,
    "repeat": repeat,
    "request_mix": request_mix,
    "one_encode": one_encode,
    "overload": overload,
    "deaths": deaths,
    "soak": soak,
    "parts": parts,
}
