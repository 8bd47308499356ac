"""Orders are fitted and told right, each round visits all sizes, and a small run asks a real gateway."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.bench.systems import Running
from benchmarks.growth import in_process, served, tenants
from benchmarks.growth.__main__ import AXES, CURVES, parsed
from benchmarks.growth.curves import Curve, few, percentile, schedule, steps
from benchmarks.growth.order import Order, fitted
from benchmarks.growth.report import draw, faster, summary, text
from benchmarks.growth.served import FORMATS, Ask, Asker, Load, Refused, Served, file_of, follow_ups, new_images
from service.access.keys import Keyring
from service.media.structure import structure_of
from service.text.prompt import PromptBuilder
from tests.support.servers import Gateway

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


def costs(exponent: float, noise: float = 0.05, rounds: int = 5, base: float = 0.0) -> list[list[float]]:
    """Costs of each size and round; the noise is a round's own."""
    slow = np.exp(np.random.default_rng(1).normal(0, noise, rounds))
    return [list((base + size**exponent) * slow) for size in SIZES]


def curve(name: str = "x", axis: str = "turns", **causes: int) -> Curve:
    return Curve(axis=axis, name=name, sizes=SIZES, counted="turns", holds="", causes=causes or {"p95_ms": 1})


@pytest.mark.parametrize(
    ("exponent", "word"),
    [(0.0, "constant"), (0.5, "below linear"), (1.0, "linear"), (1.1, "linear"), (2.0, "faster than linear")],
)
def test_the_order_is_the_slope_between_logarithms(exponent: float, word: str):
    order = fitted(SIZES, costs(exponent))
    assert order.slope == pytest.approx(exponent, abs=1e-3)
    assert order.low <= order.slope <= order.high
    assert order.word == word


def test_only_the_upper_half_of_the_sizes_counts():
    bent = [[1.0] * 3 for _ in SIZES[:4]] + [[float(size)] * 3 for size in SIZES[4:]]
    assert fitted(SIZES, bent).slope == pytest.approx(1.0)
    assert fitted(SIZES[:2], [[1.0, 1.0], [4.0, 4.0]]).slope == pytest.approx(2.0)


def test_rounds_that_are_slow_as_a_whole_do_not_widen_the_interval():
    order = fitted(SIZES, costs(1.0, noise=0.5))
    assert order.high - order.low < 1e-3
    apart = np.random.default_rng(2).lognormal(0, 0.5, (len(SIZES), 5))
    order = fitted(SIZES, (apart * np.array(SIZES)[:, np.newaxis]).tolist())
    assert order.high - order.low > 0.1
    assert order.low < 1 < order.high


@pytest.mark.parametrize(
    ("order", "of_the_size", "of_nothing"),
    [
        (Order(1.2, 1.05, 1.3), True, True),
        (Order(1.2, 0.98, 1.3), False, True),  # the interval has 1
        (Order(1.14, 1.1, 1.18), False, True),  # within the margin
        (Order(0.3, 0.2, 0.4), False, False),
        (Order(0.5, -0.1, 0.9), False, False),  # the interval has 0
    ],
)
def test_a_cost_grows_faster_than_its_cause_only_beyond_the_margin_and_the_interval(order, of_the_size, of_nothing):
    assert order.is_faster_than(1) is of_the_size
    assert order.is_faster_than(0) is of_nothing


def test_few_rounds_have_the_range_of_their_slopes_and_no_interval():
    rounds = [[float(size), float(size) ** 1.5] for size in SIZES]
    order = fitted(SIZES, rounds)
    assert (order.low, order.high, order.is_range) == (1.0, 1.5, True)
    assert order.low < order.slope < order.high
    assert not fitted(SIZES, costs(1.0)).is_range
    figures = {size: [{"p95_ms": cost} for cost in each] for size, each in zip(SIZES, rounds, strict=True)}
    told = summary(curve(), figures)
    assert told["order"]["p95_ms"]["range_of_rounds"] == [1.0, 1.5]
    assert "interval_95" not in told["order"]["p95_ms"]
    assert "1.00 to 1.50" in text([told])


def test_an_interval_that_allows_more_than_one_order_is_told_as_such():
    assert Order(0.6, 0.1, 0.95).word == "constant to linear"
    assert Order(1.2, 0.9, 1.5).word == "linear"
    assert Order(-0.4, -0.5, -0.3).word == "constant"


def test_sizes_are_geometric_whole_numbers_with_both_ends():
    assert steps(1, 256, 9) == (*SIZES, 256)
    assert steps(1, 3, 9) == (1, 2, 3)
    assert few(SIZES) == (1, 2, 4)
    for each in CURVES:
        assert sorted(each.sizes) == list(each.sizes)
        assert max(later / earlier for earlier, later in zip(each.sizes, each.sizes[1:], strict=False)) <= 10


def test_each_round_has_every_point_of_its_axis_in_an_order_of_its_own():
    curves = [curve("a"), curve("b"), curve("a", "images")]
    visited = [(each.axis, each.name, size) for each, size in schedule(curves, 3, seed=4)]
    first, second, *_ = (visited[start : start + 16] for start in (0, 16, 32))
    assert {axis for axis, _, _ in visited[:48]} == {"turns"}
    assert set(Counter(visited).values()) == {3}
    assert set(first) == set(second)
    assert first != second
    assert visited == [(each.axis, each.name, size) for each, size in schedule(curves, 3, seed=4)]
    assert visited != [(each.axis, each.name, size) for each, size in schedule(curves, 3, seed=5)]


def test_percentiles_are_values_that_were_measured():
    assert percentile([5, 1, 3], 0.5) == 3
    assert percentile(range(1, 101), 0.95) == 95
    assert percentile([7.0], 0.95) == 7.0


def report_of(*exponents: float, axis: str = "turns", cause: int = 1) -> list[dict]:
    found = []
    for number, exponent in enumerate(exponents):
        one = curve(str(number), axis, p95_ms=cause, gateway_cpu_ms=1)
        rounds = {
            size: [{"p95_ms": cost, "gateway_cpu_ms": 3.0} for cost in each]
            for size, each in zip(SIZES, costs(exponent), strict=True)
        }
        found.append(summary(one, rounds))
    return found


def test_the_last_line_names_each_axis_that_grows_faster_than_its_cause():
    fine, steep = report_of(1.0), report_of(1.5, 1.4, axis="images")
    assert faster(fine) == []
    assert text(fine).splitlines()[-1] == "nothing grows faster than its cause"
    assert faster(fine + steep) == ["images"]
    told = text([*fine, *steep, *report_of(1.0, axis="tenants", cause=0)]).splitlines()
    assert told[-1] == "grows faster than its cause: images, tenants"
    assert sum("FASTER" in line for line in told) == 3


def test_a_curve_is_summed_up_by_medians_ranges_and_orders():
    (told,) = report_of(1.0)
    assert told["sizes"] == list(SIZES)
    assert told["median"]["gateway_cpu_ms"] == [3.0] * len(SIZES)
    assert all(low <= middle <= high for middle, (low, high) in zip(told["median"]["p95_ms"], told["range"]["p95_ms"],
                                                                    strict=True))  # fmt: skip
    assert told["order"]["gateway_cpu_ms"]["word"] == "constant"
    assert told["order"]["p95_ms"]["cause"] == "linear"


def test_a_picture_is_drawn_of_any_axes(tmp_path: Path):
    machine = {"cpus": 2, "cpu": "a CPU"}
    draw(tmp_path / "g.png", {"machine": machine, "rounds": 5, "curves": report_of(1.0, 2.0)})
    with Image.open(tmp_path / "g.png") as picture:
        assert picture.width > 300


def test_an_interval_needs_rounds():
    assert parsed([]).axes == AXES
    with pytest.raises(SystemExit):
        parsed(["--rounds", "1"])


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_has_the_bytes_that_it_should_and_can_be_made_new(kind: str):
    file = file_of(kind, 100_000)
    assert len(file) == 100_000
    with Image.open(io.BytesIO(file)) as one, Image.open(io.BytesIO(file[:-8] + b"12345678")) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))
    found = structure_of(file)
    assert found is not None
    assert found.data == structure_of(file[:-8] + b"12345678").data


def test_words_are_tokens(prompts: PromptBuilder):
    for word in served.WORDS:
        assert len(prompts.text_ids(word)) == served.TEMPLATE + 1, word


async def test_tables_do_what_is_measured_at_their_smallest_size():
    curves = [replace(each, sizes=each.sizes[:1]) for each in in_process.CURVES]
    found = await in_process.measure(curves, 1, seed=0)
    assert set(found) == {each.key for each in in_process.CURVES}
    assert all(figures["p50_us"] > 0 for sizes in found.values() for rounds in sizes.values() for figures in rounds)


def test_every_tenant_has_a_key_of_its_own(tmp_path: Path):
    asking = tenants.by_key(3, tmp_path / "keys.json")
    ring = Keyring.from_json((tmp_path / "keys.json").read_bytes())
    granted = {ring.grant(each.headers["authorization"].removeprefix("Bearer "), 0.0).tenant for each in asking}
    assert len(granted) == 3


async def test_a_small_run_tells_what_a_gateway_costs(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(served, "LEAST", 3)
    system = Running("glimpse", (gateway.url,), (gateway.process.pid,), tmp_path)
    asked = Served(axis="turns", name="x", sizes=(1, 2), counted="", holds="", causes=served.ONE_CLIENT,
                   load=lambda asker, size: follow_ups(asker, turns=size, clients=2))  # fmt: skip
    found = await served.measure(system, [asked], 2, seconds=0.05, seed=gateway.process.pid)
    told = summary(asked, found[asked.key])
    assert json.loads(json.dumps(told))["order"]["p95_ms"]["range_of_rounds"]
    refusals = told["median"].pop("refusals_an_answer")
    assert refusals == told["median"].pop("unanswered") == [0.0, 0.0]
    assert all(cost > 0 for costs in told["median"].values() for cost in costs)
    assert told["median"]["p50_ms"][0] <= told["median"]["p95_ms"][0]


async def test_new_images_are_new_and_the_first_answer_of_a_client_is_not_measured(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(served, "LEAST", 1)
    asker = Asker(Running("glimpse", (gateway.url,), (gateway.process.pid,), tmp_path), seed=gateway.process.pid)
    made = []
    load = new_images(asker, images=2)
    asked = await asker.spend(Load(lambda: made.append(load.make()) or made[-1]), seconds=0.0)
    asker.close()
    assert len(made) == 2
    assert made[0].body != made[1].body
    assert asked["answers_per_s"] == pytest.approx(1e3 / asked["ms_an_answer"])
    assert asked["ms_an_answer"] >= asked["p50_ms"]


class Crowded(Asker):
    """Asks a service that refuses every second request."""

    tries = 0

    async def answer(self, ask: Ask) -> dict:
        self.tries += 1
        if self.tries % 2:
            raise Refused
        return {}


async def test_a_refused_client_asks_again_and_its_refusals_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(served, "LEAST", 3)
    monkeypatch.setattr(served, "RETRY_S", (0.02, 0.03))
    asker = Crowded(Running("glimpse", ("http://127.0.0.1:1",), (os.getpid(),), tmp_path), seed=0)
    figures = await asker.spend(Load(lambda: Ask(b"", "", {}, "")), seconds=0.0)
    assert asker.tries == 8  # four answers, of which the first is not measured
    assert figures["refusals_an_answer"] == 1.0
    assert figures["p50_ms"] >= 20  # from the first try


async def test_every_client_is_measured_and_every_request_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A slow client counts, even if a fast one alone would fill the window."""
    monkeypatch.setattr(served, "LEAST", 3)
    window = served.Window(Running("glimpse", ("http://127.0.0.1:1",), (os.getpid(),), tmp_path), 2, seconds=0.0)
    answers = []

    async def client(number: int, takes_s: float) -> None:
        while not window.is_over:
            window.sent(number)
            await asyncio.sleep(takes_s)
            window.answered(number)
            answers.append(number)

    await asyncio.gather(client(0, 0.2), client(1, 0.002))
    figures = window.figures()
    assert figures["unanswered"] == 0
    assert figures["p50_ms"] < 100
    assert set(answers[-2:]) == {0, 1}  # the fast one goes on until the slow one's request is answered
    assert figures["answers_per_s"] * figures["ms_an_answer"] == pytest.approx(1e3)


async def test_an_answer_that_is_not_what_is_measured_ends_the_run(gateway: Gateway, tmp_path: Path):
    asker = Asker(Running("glimpse", (gateway.url,), (gateway.process.pid,), tmp_path), seed=gateway.process.pid)
    await asker.remember()
    with pytest.raises(RuntimeError, match="not as it should be"):
        await asker.answer(asker.about(asker.known[:1], cache="miss"))
    with pytest.raises(RuntimeError, match="404"):
        await asker.answer(asker.about(["img_" + "0" * 32]))
    asker.close()


async def test_tenants_ask_in_rotation_about_their_own_pictures(gateway: Gateway, tmp_path: Path):
    asker = Asker(Running("glimpse", (gateway.url,), (gateway.process.pid,), tmp_path), seed=1)
    named = await tenants.introduced(asker, tenants.by_name(3))
    load = tenants.in_rotation(asker, named)
    asked = [load.make() for _ in range(4)]
    assert [ask.headers["x-tenant-id"] for ask in asked] == ["tenant-0", "tenant-1", "tenant-2", "tenant-0"]
    for ask in asked:
        await asker.answer(ask)
    with pytest.raises(RuntimeError, match="404"):
        await asker.answer(replace(asked[0], headers=asked[1].headers))
    asker.close()
