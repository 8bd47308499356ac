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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import httpx

from benchmarks.bench.deaths import deaths
from benchmarks.bench.load import Arrivals
from benchmarks.bench.measuring import measure, sample
from benchmarks.bench.models import BUILD, ready
from benchmarks.bench.processes import DECODER
from benchmarks.bench.report import cancelled_share, table
from benchmarks.bench.side_by_side import Case, Comparison, compare, machine, plan, rounds_of, say
from benchmarks.bench.summary import Verdict, mixture, pooled_ratio, ratio, slowest, summary
from benchmarks.bench.systems import SYSTEMS, Running, running, two_gateways
from benchmarks.bench.workloads import Shape, Workload
from service.core.card import ModelCard

CLIENTS = 16
BURST = 50  # requests for one new image at once
WARM_UP_IMAGES = 2  # images of the warm-up if a workload needs no known ones
OVERLOAD_S = 60.0
STEADY = 5  # the open loop's duration, in durations of another measurement: its p95 needs more requests
SLICE_S = 30.0  # duration of one workload in the soak
CALM_S = 5.0  # duration of the measurement of each workload without cancellations, before the soak
CANCELS = 0.2  # share of the soak's requests whose client may hang up
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


def memory_growth(figures: Figures) -> float:
    return float(figures["memory_growth"])


def each_kind(figures: Figures) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = figures["by_kind"]
    return found


def right(figures: Figures) -> float | None:
    return figures.get("right_per_s")


def decoder_cpu(figures: Figures) -> float:
    return float(figures["cpu_ms_a_request"].get(DECODER, 0.0))


def percentile(what: str, which: str) -> Callable[[Figures], float | None]:
    """Return what finds a percentile in figures; too few values have none."""
    return lambda figures: (figures[what] or {}).get(which)


class Promises:
    """Compare systems in a report and collect verdicts. A promise whose figures are missing is not met."""

    def __init__(self, report: dict[str, Any]) -> None:
        self.verdicts: list[Verdict] = []
        self._report = report

    def add(self, promise: str, found: float | None, wanted: float, at_least: bool, note: str = "") -> None:
        self.verdicts.append(Verdict(promise, found, wanted, at_least, note))

    def against(
        self,
        other: str,
        case: Case,
        wanted: float,
        figure: Callable[[Figures], float | None] = rate,
        what: str = "requests/s",
        at_least: bool = True,
        system: str = "glimpse",
        note: str = "",
    ) -> None:
        """Judge `system`'s figure as a multiple of `other`'s."""
        ours, theirs = (rounds_of(self._report, name, case, figure) for name in (system, other))
        promise = f"{what} of {system} / {other}, {case.label}"
        self._add_ratio(promise, ours, theirs, wanted, at_least, note)

    def between(self, one: Case, other: Case, wanted: float, figure: Callable[[Figures], float | None], what: str,
                at_least: bool) -> None:  # fmt: skip
        """Judge Glimpse's figure in one case as a multiple of its figure in the other."""
        ours, theirs = (rounds_of(self._report, "glimpse", case, figure) for case in (one, other))
        self._add_ratio(f"{what}, {one.label} / {other.label}", ours, theirs, wanted, at_least)

    def _add_ratio(self, promise: str, ours: Sequence[float], theirs: Sequence[float], wanted: float, at_least: bool,
                   note: str = "") -> None:  # fmt: skip
        """Judge the ratio over the rounds that both have."""
        rounds = min(len(ours), len(theirs))
        if not rounds or 0 in theirs[:rounds]:
            self.add(promise, None, wanted, at_least, note)
            return
        found = ratio(ours[:rounds], theirs[:rounds])
        told = "; ".join(filter(None, (f"rounds {found.low:g} to {found.high:g}", note)))
        self.add(promise, found.value, wanted, at_least, told)

    def accuracy_kept(self, case: Case, unloaded: Case, wanted: float) -> None:
        """Judge how far the accuracy of Glimpse's answers lies below its accuracy in another case."""
        here, there = (
            rounds_of(self._report, "glimpse", each, lambda figures: figures.get("accuracy"))
            for each in (case, unloaded)
        )
        lost = statistics.median(there) - statistics.median(here) if here and there else None
        promise = f"share of right answers lost, {case.label} against {unloaded.label}"
        self.add(promise, lost, wanted, False, f"{here} against {there}")

    def pooled_p95(self, system: str, other: str, case: Case, wanted: float, kind: str) -> None:
        """Judge the first-token p95 of one kind of request, over all rounds together."""
        ours, theirs = (
            rounds_of(self._report, name, case, lambda figures: figures["every_first_token_ms"][kind] or None)
            for name in (system, other)
        )
        promise = f"first token p95 of {kind} of {system} / {other}, {case.label}"
        if not ours or len(ours) != len(theirs):
            self.add(promise, None, wanted, False)
            return
        found = pooled_ratio(ours, theirs, 95)
        note = f"rounds {found.low:g} to {found.high:g}, {sum(map(len, ours))} requests each"
        self.add(promise, found.value, wanted, False, note)

    def of_limit(self, case: Case, wanted: float) -> None:
        limit = self._report["engine"]["requests_per_s"].get(case.workload.shape)
        found = rounds_of(self._report, "glimpse", case, rate)
        share = statistics.median(found) / limit if found and limit else None
        note = f"of {limit:.2f} requests/s" if limit else ""
        self.add(f"share of the bare engine limit, {case.label}", share, wanted, True, note)

    def gateway_cpu(self, case: Case) -> None:
        def over(figures: Figures) -> float | None:
            spent = figures["cpu_ms_a_request"].get("gateway")
            return None if spent is None else float(spent) - 0.2 * float(figures["tokens_an_answer"])

        found = median(rounds_of(self._report, "glimpse", case, over))
        decoding = median(rounds_of(self._report, "glimpse", case, decoder_cpu)) or 0.0
        promise = f"gateway CPU a request less 0.2 ms a token, ms, {case.label}"
        self.add(promise, found, 2.0, False, f"its decoders take {decoding:g} ms besides")

    def into(self, report: dict[str, Any]) -> dict[str, Any]:
        report["verdict"] = [verdict.to_json() for verdict in self.verdicts]
        return report


def median(figures: Sequence[float]) -> float | None:
    return statistics.median(figures) if figures else None


def capacity_of(report: dict[str, Any], system: str, case: Case) -> float:
    """Return the median answers a second. Raises RuntimeError if there are none: no load can be made of them."""
    found = median(rounds_of(report, system, case, rate))
    if not found:
        raise RuntimeError(f"{system} was not measured, so its capacity is not known: {report['failed']}")
    return found


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
    for what, which, wanted in (("first_token_ms", "p50", 0.6), ("first_token_ms", "max", 1.0),
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
    note = f"rounds {min(slower):.1f} to {max(slower):.1f}" if slower else ""
    promises.add("ms that one client's cold question takes longer than naive's", median(slower), 8.0, False, note)
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
    capacity = capacity_of(first, "glimpse-no-fidelity", half)
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
        Verdict(f"share of rounds with exactly one encode of one new image, {BURST} requests at once, {way}",
                share_of_single(found), 1.0, True, f"encodes by round: {found}")
        for way, found in encodes.items()
    ]  # fmt: skip
    answered = outcomes["ok"] / outcomes.total() if outcomes else None
    promises.append(Verdict("share of them answered", answered, 1.0, True, f"{dict(outcomes)}"))
    return report(f"{model}: {BURST} requests at once for one new image", model, promises) | {"encodes": encodes}


def share_of_single(encodes: Sequence[int]) -> float | None:
    """Return the share of rounds with one encode; a count of 0 means that the image was known or not counted."""
    return sum(count == 1 for count in encodes) / len(encodes) if encodes else None


def encoder_images(up: Running) -> int:
    return encoded(httpx.get(up.triton_metrics, timeout=10).raise_for_status().text)


def encoded(metrics: str) -> int:
    """Return how many images the vision encoder inferred. Raises RuntimeError if Triton's metrics do not tell."""
    counted = re.search(r'^nv_inference_count\{model="vision_encoder"[^}]*\} (\d+)', metrics, re.MULTILINE)
    if counted is None:
        raise RuntimeError("Triton's metrics have no nv_inference_count of vision_encoder")
    return int(counted[1])


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
    capacity = capacity_of(first, "glimpse-no-fidelity", closed)
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
    good = {case.label: median(rounds_of(found, "glimpse", case, goodput)) for case in (closed, bearable, strained)}
    kinds = {system: mixture(rounds_of(found, system, strained, each_kind)) for system in beside}
    told = "; ".join(f"{system} {said}" for system, said in kinds.items())
    note = f"{good}; {kinds['glimpse']}"
    promises.add("goodput at 3x overload / its best", share_of_best(good, strained.label), 0.9, True, note)
    refused_ms = [slowest(run["figures"]["refusal_ms"]) for run in found["runs"]]
    most_ms = max((ms for ms in refused_ms if ms is not None), default=None)
    promises.add("slowest refusals (p99), ms", most_ms, 50, False)
    growth = {system: rounds_of(found, system, strained, memory_growth) for system in beside}
    what = f"memory's growth from the first quarter to the last, at most in a round, {strained.label}"
    promises.add(what, max(growth["glimpse"], default=None), 0.05, False, f"{growth}")
    promises.against("glimpse-no-fidelity", strained, 1.3, goodput, "goodput", note=told)
    promises.against("glimpse-no-limit", strained, 1.0, goodput, "goodput", note=told)
    if scored:
        promises.against("glimpse-no-fidelity", strained, 2.0, right, "right answers in time", note=told)
        promises.accuracy_kept(strained, bearable, 0.02)
    return promises.into(found)


def share_of_best(by_case: Mapping[str, float | None], case: str) -> float | None:
    """Return a case's figure as a share of the largest; None if one was not measured or all are 0."""
    known = [each for each in by_case.values() if each is not None]
    here = by_case[case]
    return here / max(known) if here is not None and len(known) == len(by_case) and any(known) else None


def soak(model: str, seconds: float, _rounds: int) -> dict[str, Any]:
    """Run every workload in turn for a long time while clients hang up; then look for leaks.

    A fifth of the requests may be cancelled, at a random moment of the median time of an answer, which is measured
    first. Some answers are faster than that; the report tells the share that was cancelled. The caches are small, so
    they are full within the first minutes. Memory that grows later is a leak.
    """
    measured_model = ready(model)
    shapes: tuple[Shape, ...] = ("mixed", "cold", "repeat", "follow_up")
    slices = max(len(shapes), round(seconds / SLICE_S))
    runs, marks = [], []
    takes_s: dict[str, float] = {}  # an answer, by workload
    small = replace(SYSTEMS["glimpse"], settings=dict.fromkeys(CACHES, str(32 << 20)))
    with running(small, measured_model, BUILD / "logs" / f"soak_{model}") as up:
        for number in range(slices):
            shape = shapes[number % len(shapes)]
            if shape not in takes_s:
                calm = Case(Workload(shape), Arrivals(clients=SOAK_CLIENTS), min(CALM_S, seconds / slices))
                measured = measure(up, plan(calm, measured_model, slices + number + 1))
                takes_s[shape] = median_s(measured.results)
            workload = Workload(shape, cancels=CANCELS, cancel_within_s=takes_s[shape])
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
    share = cancelled_share(runs)
    promises.append(Verdict("share of cancelled requests", share, CANCELS / 2, True))
    title = f"{measured_model.title}: {seconds / 60:.0f} minutes of every workload in turn"
    found = report(title, model, promises) | {"answer_takes_s": takes_s, "cancelled": share}
    return found | {"table": table(runs), "runs": runs, "marks": marks, "slice_s": seconds / slices}


def median_s(results: Sequence[dict[str, Any]]) -> float:
    """Return the median time of an answer. Raises RuntimeError if nothing was answered."""
    took_s = [each["end"] - each["sent"] for each in results if each["outcome"] == "ok"]
    if not took_s:
        raise RuntimeError("nothing was answered, so it is not known when clients should hang up")
    return float(statistics.median(took_s))


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
