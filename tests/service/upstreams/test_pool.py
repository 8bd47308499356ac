"""A pool of Tritons: which one gets a call, which one takes over, and which ones are left out."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing

import numpy as np
import pytest
from structlog.testing import capture_logs

from service.core.attempt_time import AttemptTime, attempt_time, begin_attempt
from service.core.errors import FirstTokenLate, InternalError, Overloaded, Unavailable
from service.core.models import Generation
from service.core.prompt import Prompt, Question
from service.core.request import Budget, Sampling
from service.core.variant import DEFAULT
from service.telemetry.metrics import Metrics
from service.upstreams import pool as pools
from service.upstreams.balance import LEAST_CALLS, Balance, Load
from service.upstreams.breaker import FAILURES_TO_OPEN, Breaker
from service.upstreams.pool import JITTER_S, Group, Member, Pool
from service.upstreams.retry_budget import SHARE, RetryBudget
from tests.service.upstreams.tritons import CARD, FakeTriton
from tests.support.fakes import cancelled, turns, until
from tests.support.samples import sample

IMAGE = np.zeros((3, 224, 224), np.uint8)
QUESTION = Question(np.zeros(32, np.int32), np.zeros(32, np.int32))
PROMPT = Prompt(np.zeros(1, np.int32), np.zeros((0, 4), np.float32), np.zeros(1, np.uint64))
A, B = "127.0.0.1:1", "127.0.0.1:2"
STUCK_S = 100.0  # longer than any test takes


def generation(**sampling: object) -> Generation:
    return Generation(PROMPT, Sampling(**sampling), end_id=2, pad_id=1, request_id="q", stall_timeout_s=5.0)


class Setting:
    """A pool of two fake Tritons, or of others."""

    def __init__(self, *addresses: str, first_token_s: float | None = None) -> None:
        self.metrics = Metrics()
        self.tritons: dict[str, FakeTriton] = {}
        self.budget = RetryBudget(time.monotonic())
        self.pool = Pool(
            "stable",
            CARD,
            addresses or (A, B),
            addresses or (A, B),
            client=self.client,
            budget=self.budget,
            metrics=self.metrics,
            first_token_s=first_token_s,
        )

    def client(self, address: str) -> FakeTriton:
        return self.tritons.setdefault(address, FakeTriton(address))

    async def started(self) -> Setting:
        await self.pool.follow()
        await self.probe()
        return self

    async def probe(self) -> None:
        """Probe all Tritons once."""
        async with asyncio.TaskGroup() as probes:
            self.pool.begin_probes(probes, 1.0)

    async def follow(self, *names: str) -> None:
        """Let both groups have these Tritons, and let what closes close."""
        self.pool.vision.names = self.pool.llm.names = names
        await self.pool.follow()
        await asyncio.sleep(0)

    async def see(self, timeout_s: float = 5.0) -> None:
        await self.pool.see(IMAGE, QUESTION, Budget(), timeout_s)

    async def generate(self, **sampling: object) -> list[int]:
        async with aclosing(self.pool.generate(generation(**sampling), timeout_s=5.0)) as tokens:
            return [token async for ids in tokens for token in ids]

    def calls(self) -> Counter[str]:
        return Counter({address: len(triton.calls) for address, triton in self.tritons.items()})

    def counted(self, name: str, **labels: str) -> float:
        return sample(self.metrics, f"glimpse_{name}", {"variant": "stable"} | labels) or 0.0

    def shown(self, name: str) -> set[str]:
        """Return the Tritons that a metric has series of."""
        samples = (sample for metric in self.metrics.registry.collect() for sample in metric.samples)
        return {sample.labels["upstream"] for sample in samples if sample.name == f"glimpse_{name}"}


def asked_until(condition: Callable[[], object]) -> Iterator[None]:
    """Ask again until it holds. Chance chooses among the Tritons: one that is not chosen in 500 calls never is."""
    for _ in range(500):
        if condition():
            return
        yield
    pytest.fail("no call went to the Triton")


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no Triton look slow, however busy the machine is."""
    monkeypatch.setattr(Balance, "measured", lambda *_: None)


async def test_nobody_answers_before_a_probe_and_calls_are_shared_after_it(untimed):
    setting = Setting()
    await setting.pool.follow()
    assert not setting.pool.answers
    assert setting.pool.faults() == {A: "it has not answered yet", B: "it has not answered yet"}
    await setting.probe()
    assert setting.pool.answers
    for _ in range(40):
        await setting.see()
    assert min(setting.calls().values()) >= 5


@pytest.mark.parametrize("fault", [Unavailable("gone"), Overloaded("its queue is full")])
async def test_a_failed_call_goes_to_the_other_triton(fault):
    setting = await Setting().started()
    setting.tritons[A].fault = fault
    for _ in range(20):
        await setting.see()
        assert await setting.generate() == setting.tritons[B].language.tokens
    assert setting.counted("upstream_retries_total", result="made") > 0


async def test_a_triton_that_fails_gets_no_calls_until_a_probe_finds_it_well(untimed):
    setting = await Setting().started()
    setting.tritons[A].fault = Unavailable("gone")
    for _ in range(40):
        await setting.see()
    assert len(setting.tritons[A].calls) == FAILURES_TO_OPEN
    assert setting.pool.faults() == {A: "requests to it fail"}
    assert setting.pool.answers
    assert setting.pool.answers_with("see")
    assert setting.counted("upstream_ready", upstream=A) == 0
    setting.tritons[A].fault = None
    for member in setting.pool.vision.members.values():
        member.breaker._until = 0.0 if member.breaker._until is not None else None  # its pause is over
    await setting.probe()
    assert setting.pool.faults() == {}
    assert setting.counted("upstream_ready", upstream=A) == 1


async def test_a_triton_whose_queue_is_full_looks_slow_and_is_not_out():
    setting = await Setting(A).started()
    setting.tritons[A].fault = Overloaded("its queue is full")
    for _ in range(2 * FAILURES_TO_OPEN):
        with pytest.raises(Overloaded):
            await setting.see()
    assert setting.pool.faults() == {}
    assert setting.pool.vision.members[A].load.slowness(time.monotonic()) > 2
    assert setting.counted("upstream_calls_total", upstream=A, outcome="overloaded") == 2 * FAILURES_TO_OPEN


async def test_a_triton_that_fails_in_the_middle_of_several_answers_is_out():
    setting = await Setting(A).started()
    triton = setting.tritons[A]
    triton.fault, triton.fails_after = Unavailable("gone"), 1
    answers = [setting.pool.generate(generation(), timeout_s=5.0) for _ in range(FAILURES_TO_OPEN)]
    for each in answers:
        await anext(each)
    assert setting.pool.faults() == {}
    for each in answers:
        with pytest.raises(Unavailable):
            await anext(each)
    assert setting.pool.faults() == {A: "requests to it fail"}


async def test_a_triton_that_fails_in_the_middle_of_one_answer_after_another_is_out():
    """Its probes succeed meanwhile."""
    setting = await Setting(A).started()
    triton = setting.tritons[A]
    triton.fails_after = 1
    for _ in range(FAILURES_TO_OPEN):
        triton.fault = None
        await setting.probe()
        assert setting.pool.faults() == {}
        triton.fault = Unavailable("gone")
        answer = setting.pool.generate(generation(), timeout_s=5.0)
        await anext(answer)
        with pytest.raises(Unavailable):
            await anext(answer)
    assert setting.pool.faults() == {A: "requests to it fail"}


@pytest.mark.parametrize("taken", [None, 2], ids=["to its end", "to a stop string"])
async def test_an_answer_that_was_not_cut_makes_up_for_one_that_was(taken: int | None):
    setting = await Setting(A).started()
    triton = setting.tritons[A]
    for _ in range(3 * FAILURES_TO_OPEN):
        triton.fault, triton.fails_after = Unavailable("gone"), 1
        with pytest.raises(Unavailable):
            async for _ in setting.pool.generate(generation(), timeout_s=5.0):
                pass
        triton.fault, triton.fails_after = None, None
        async with aclosing(setting.pool.generate(generation(), timeout_s=5.0)) as answer:
            responses = 0
            async for _ in answer:
                responses += 1
                if responses == taken:
                    break
    assert setting.pool.faults() == {}


async def test_a_call_whose_time_is_over_is_not_tried_again():
    setting = await Setting().started()
    for triton in setting.tritons.values():
        triton.fault = Unavailable("gone")
    with pytest.raises(Unavailable):
        await setting.see(timeout_s=0.0)
    with pytest.raises(Unavailable):
        await anext(setting.pool.generate(generation(), timeout_s=0.0))
    assert setting.calls().total() == sum(len(triton.generations) for triton in setting.tritons.values()) == 1
    assert setting.counted("upstream_retries_total", result="made") == 0


async def test_a_fault_of_the_models_is_no_reason_to_ask_another_triton_of_the_same():
    setting = await Setting().started()
    for triton in setting.tritons.values():
        triton.fault = InternalError("the model see failed")
    with pytest.raises(InternalError):
        await setting.see()
    assert setting.calls().total() == 1


async def test_a_call_beyond_the_first_token_budget_goes_to_the_other_triton():
    setting = await Setting(first_token_s=0.02).started()
    setting.tritons[A].hangs = True
    for _ in asked_until(lambda: setting.tritons[A].calls and setting.tritons[A].generations):
        await setting.see()
        assert await setting.generate(streaming=False) == setting.tritons[B].language.tokens
    assert all(sampling.streaming for sampling in setting.tritons[B].language.sampling)
    assert setting.counted("upstream_calls_total", upstream=A, outcome="late") > 0
    setting.tritons[B].hangs = True
    with pytest.raises(FirstTokenLate) as caught:
        await setting.see()
    assert caught.value.message == "there was no first token within 0.02 s: try again"


def spend(seconds: float) -> None:
    """Count an earlier call of the attempt."""
    attempt_time().enter(0.0)
    attempt_time().leave(seconds)


async def test_the_calls_of_one_attempt_share_the_first_token_budget():
    setting = await Setting(A, first_token_s=100.0).started()
    begin_attempt()
    await setting.see(1000.0)
    spend(70.0)
    await setting.see(1000.0)
    begin_attempt()
    await setting.see(1000.0)
    await setting.see(10.0)  # the request's own time is shorter
    assert setting.tritons[A].timeouts == pytest.approx([100.0, 30.0, 100.0, 10.0], abs=5.0)


async def test_another_triton_gets_a_call_with_a_budget_of_its_own():
    setting = await Setting(first_token_s=100.0).started()
    setting.tritons[A].fault = Unavailable("gone")
    for _ in asked_until(lambda: setting.tritons[A].calls):
        begin_attempt()
        spend(70.0)
        await setting.see(1000.0)
    assert setting.tritons[A].timeouts == pytest.approx([30.0], abs=5.0)
    assert setting.tritons[B].timeouts[-1] == pytest.approx(100.0, abs=5.0)


async def test_what_is_over_before_the_llm_begins_is_not_the_llms_fault():
    setting = await Setting(A, first_token_s=100.0).started()
    for _ in range(FAILURES_TO_OPEN):
        begin_attempt()
        spend(100.0)
        setting.tritons[A].hangs = True
        with pytest.raises(FirstTokenLate):
            await setting.generate()
    assert setting.pool.faults() == {}
    assert setting.counted("upstream_calls_total", upstream=A, outcome="late") == FAILURES_TO_OPEN


async def test_calls_that_the_shared_budget_cut_short_make_no_healthy_triton_look_slow():
    setting = await Setting(first_token_s=100.0).started()
    balance = setting.pool.llm.balance
    for load in balance.loads * LEAST_CALLS:
        balance.measured(load, "llm", 0.2, time.monotonic())
    for triton in setting.tritons.values():
        triton.hangs = True
    for _ in range(20):
        setting.budget.tokens = 0.0  # no other Triton is tried
        begin_attempt()
        spend(100.0)
        with pytest.raises(FirstTokenLate):
            await setting.generate()
    for load in balance.loads:
        balance.measured(load, "llm", 0.2, time.monotonic())
    assert setting.pool.faults() == {}


async def test_the_budget_ends_with_the_first_token():
    setting = await Setting(A, first_token_s=100.0).started()
    begin_attempt()
    async with aclosing(setting.pool.generate(generation(), timeout_s=5.0)) as tokens:
        first = await anext(tokens)
        spend(1000.0)
        rest = [token async for ids in tokens for token in ids]
    assert [*first, *rest] == setting.tritons[A].language.tokens


def test_calls_at_the_same_moment_count_once():
    spent = AttemptTime()
    spent.enter(1.0)
    spent.enter(2.0)
    spent.leave(4.0)
    assert spent.spent_s(5.0) == 4.0
    spent.leave(6.0)
    assert spent.spent_s(9.0) == 5.0
    spent.enter(9.0)
    spent.begin_anew(10.0)
    spent.leave(11.0)
    assert spent.spent_s(20.0) == 1.0


async def test_a_generation_stays_with_its_triton_and_is_not_repeated_after_a_token():
    setting = await Setting(A).started()
    triton = setting.tritons[A]
    triton.fault, triton.fails_after = Unavailable("gone"), 1
    async with aclosing(setting.pool.generate(generation(), timeout_s=5.0)) as tokens:
        assert await anext(tokens) == tuple(triton.language.tokens[:1])
        with pytest.raises(Unavailable):
            await anext(tokens)
    assert triton.generations == ["q"]
    assert all(member.load.in_flight == 0 for member in setting.pool.llm.members.values())


async def test_a_second_try_has_an_id_of_its_own():
    setting = await Setting().started()
    setting.tritons[A].fault = Unavailable("gone")
    for _ in asked_until(lambda: setting.tritons[A].generations):
        await setting.generate()
    assert setting.tritons[A].generations == ["q"]
    assert "q.1" in setting.tritons[B].generations


async def test_without_a_retry_in_the_budget_a_failure_is_the_callers():
    setting = await Setting().started()
    setting.budget.tokens = 0.0
    setting.tritons[A].fault = setting.tritons[B].fault = Unavailable("gone")
    with pytest.raises(Unavailable):
        await setting.see()
    assert setting.calls().total() == 1
    assert setting.counted("upstream_retries_total", result="refused") == 1


async def test_of_tritons_that_are_all_out_one_is_tried_nevertheless():
    setting = await Setting().started()
    for triton in setting.tritons.values():
        triton.probe_fault = Unavailable("its probe fails")
    await setting.probe()
    assert not setting.pool.answers
    for member in setting.pool.vision.members.values():
        for _ in range(FAILURES_TO_OPEN):
            member.breaker.failed(time.monotonic())
    await setting.see()


async def test_a_triton_that_is_ejected_is_told_and_does_not_count_as_dead():
    setting = await Setting().started()
    for member in setting.pool.vision.members.values():
        member.load.eject(time.monotonic())
    assert set(setting.pool.faults().values()) == {"it is slower than the others"}
    assert setting.pool.answers
    await setting.see()


async def test_tritons_that_a_name_has_no_more_are_left():
    setting = await Setting().started()
    await setting.follow(A, "127.0.0.1:3")
    await setting.probe()
    for group in setting.pool.groups:
        assert set(group.members) == {A, "127.0.0.1:3"}
        assert all(
            load is member.load for load, member in zip(group.balance.loads, group.members.values(), strict=True)
        )
    assert setting.tritons[A].is_open
    assert not setting.tritons[B].is_open
    assert not setting.pool._closing  # no task that has ended
    await setting.pool.close()
    assert not any(triton.is_open for triton in setting.tritons.values())


async def test_a_triton_whose_address_is_gone_finishes_its_generation_and_gets_no_more_calls():
    setting = await Setting(A).started()
    async with aclosing(setting.pool.generate(generation(), timeout_s=5.0)) as tokens:
        first = await anext(tokens)
        for names in (B,), (A, B), (B,):  # a name may come back meanwhile
            await setting.follow(*names)
            assert setting.tritons[A].is_open
            assert (setting.shown("upstream_ready") == {A, B}) == (A in names)
        await setting.probe()
        await setting.see()
        rest = [token async for ids in tokens for token in ids]
    assert [*first, *rest] == setting.tritons[A].language.tokens
    assert setting.calls() == {A: 0, B: 1}
    await setting.follow(B)
    assert not setting.tritons[A].is_open
    assert setting.tritons[B].is_open


async def test_a_triton_whose_address_is_gone_finishes_its_vision_calls():
    setting = await Setting(A).started()
    triton = setting.tritons[A]
    triton.hangs = True
    call = asyncio.create_task(setting.see())
    await until(lambda: triton.calls)
    await setting.follow(B)
    assert triton.is_open
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await setting.follow(B)
    assert not triton.is_open


async def test_a_triton_whose_address_is_gone_stays_connected_while_work_goes_on_without_its_request():
    setting = await Setting().started()
    setting.tritons[A].busy += 1
    await setting.follow(B)
    assert setting.tritons[A].is_open
    setting.tritons[A].busy -= 1
    await setting.follow(B)
    assert not setting.tritons[A].is_open


async def test_the_series_of_a_triton_end_with_it():
    setting = await Setting().started()
    for _ in range(20):
        await setting.see()
    setting.tritons[A].fault = Unavailable("gone")
    for _ in asked_until(lambda: setting.counted("upstream_calls_total", upstream=A, outcome="failed")):
        await setting.see()
    assert setting.shown("upstream_calls_total") == setting.shown("upstream_ready") == {A, B}
    await setting.follow(B)
    assert setting.shown("upstream_calls_total") == setting.shown("upstream_ready") == {B}
    setting.tritons[B].hangs = True
    call = asyncio.create_task(setting.see())
    await until(lambda: setting.tritons[B].hangs and setting.pool.vision.members[B].load.in_flight)
    await setting.pool.close()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert setting.shown("upstream_calls_total") == setting.shown("upstream_ready") == set()


async def test_a_triton_that_hangs_at_its_probe_holds_up_no_other(monkeypatch):
    """While one probe goes on, the other Triton is probed again and again, and names are looked up."""
    setting = Setting()
    follows = Counter[str]()
    follow = setting.pool.follow

    async def followed() -> None:
        follows["all"] += 1
        await follow()

    monkeypatch.setattr(setting.pool, "follow", followed)
    setting.client(A).hangs = True
    watching = asyncio.create_task(setting.pool.watch(0.05, STUCK_S))
    await until(lambda: follows["all"] > 5)
    setting.tritons[B].probe_fault = Unavailable("it is gone")
    await until(lambda: B in setting.pool.faults())
    setting.tritons[B].probe_fault = None
    await until(lambda: B not in setting.pool.faults())
    assert setting.tritons[A].busy == len(setting.pool.groups)  # one probe each, all the time
    assert setting.pool.faults() == {A: "it has not answered yet"}
    await cancelled(watching)


async def test_a_fault_of_our_own_ends_no_watch(monkeypatch):
    setting, faults = Setting(), [BlockingIOError("no thread can be made"), UnicodeError("label empty or too long")]
    follow = setting.pool.follow

    async def broken() -> None:
        if faults:
            raise faults.pop()
        await follow()

    monkeypatch.setattr(setting.pool, "follow", broken)
    watching = asyncio.create_task(setting.pool.watch(0.05, 1.0))
    with capture_logs() as lines:
        await until(lambda: setting.pool.answers)
    failed = [line for line in lines if line["log_level"] == "error"]
    assert [(line["event"], line["watch"]) for line in failed] == [("watch_failed", "upstreams")] * 2
    await cancelled(watching)


async def test_a_gauge_tells_of_the_triton_again_when_a_pool_that_shared_it_is_gone():
    setting = await Setting(A).started()
    changed = Pool("stable", CARD, (A,), (A,), client=FakeTriton, budget=setting.budget, metrics=setting.metrics)
    await changed.follow()
    await changed.close()
    await setting.pool.follow()
    setting.tritons[A].probe_fault = Unavailable("it is gone")
    await setting.probe()
    assert setting.counted("upstream_ready", upstream=A) == 0


async def test_series_stay_while_a_variant_that_changed_has_the_same_triton():
    setting = await Setting(A).started()
    await setting.see()
    changed = Pool("stable", CARD, (A,), (A,), client=FakeTriton, budget=setting.budget, metrics=setting.metrics)
    await changed.follow()
    await setting.pool.close()
    assert setting.shown("upstream_calls_total") == setting.shown("upstream_ready") == {A}
    await changed.close()
    assert setting.shown("upstream_calls_total") == setting.shown("upstream_ready") == set()


async def test_a_name_stands_for_its_addresses_of_one_family():
    setting = await Setting("localhost:1").started()
    assert len(setting.pool.vision.members) == 1


async def test_a_name_that_cannot_be_looked_up_keeps_its_own_addresses(monkeypatch):
    there = {"a": ["10.0.0.1", "10.0.0.2"], "b": ["10.0.0.3", "10.0.0.4"]}

    async def getaddrinfo(host: str, port: int, **_: object) -> list[object]:
        if host not in there:
            raise OSError("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in there[host]]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    setting = await Setting("a:1", "b:1").started()
    assert set(setting.pool.vision.members) == {f"10.0.0.{number}:1" for number in (1, 2, 3, 4)}
    there.pop("a")
    there["b"] = ["10.0.0.4"]
    await setting.pool.follow()
    assert set(setting.pool.vision.members) == {f"10.0.0.{number}:1" for number in (1, 2, 4)}
    await setting.pool.follow()
    assert set(setting.pool.llm.members) == {f"10.0.0.{number}:1" for number in (1, 2, 4)}


@pytest.mark.parametrize(("streaming", "measurements"), [(False, 0), (True, 1)])
async def test_a_long_answer_that_comes_whole_makes_no_triton_look_slow(monkeypatch, streaming, measurements):
    setting = await Setting().started()
    measured = []
    monkeypatch.setattr(Balance, "measured", lambda balance, *_: measured.append(balance))
    await setting.generate(streaming=streaming)
    assert len(measured) == measurements
    await setting.see()
    vision, llm = setting.pool.vision.balance, setting.pool.llm.balance
    assert list(map(id, measured)) == list(map(id, [llm] * measurements + [vision]))
    assert sum(setting.counted("upstream_calls_total", outcome="ok", upstream=each) for each in (A, B)) == 2


def noted(name: str) -> Callable[..., Awaitable[object]]:
    async def call(self: Recorder, *told: object) -> object:
        self.made.append((name, *told))
        return name

    return call


class Recorder(FakeTriton):
    """Notes the calls of its vision models."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.made: list[tuple[object, ...]] = []

    see, encode, attend, attend_clip = map(noted, ("see", "encode", "attend", "attend_clip"))


async def test_every_call_reaches_the_triton_as_it_was_made_and_kinds_are_measured_apart(monkeypatch):
    kinds: list[str] = []

    def measured(_: Balance, load: Load, kind: str, seconds: float, now: float) -> None:
        assert 0 <= seconds < STUCK_S
        kinds.append(kind)

    monkeypatch.setattr(Balance, "measured", measured)
    setting = Setting(A)
    setting.tritons[A] = triton = Recorder(A)
    await setting.started()
    setting.budget.tokens = 0.0
    vision, closer, budget, times = object(), object(), Budget(), [0.0, 1.0, 2.0]
    images, frames = np.zeros((2, 3, 224, 224), np.uint8), [vision] * 3
    pool = setting.pool
    assert await pool.see(IMAGE, QUESTION, budget, 1000.0) == "see"
    assert await pool.encode(images, 1000.0) == "encode"
    assert await pool.attend(vision, QUESTION, budget, 1000.0) == "attend"
    assert await pool.attend(vision, QUESTION, budget, 1000.0, closer) == "attend"
    assert await pool.attend_clip(frames, times, QUESTION, budget, 1000.0) == "attend_clip"
    assert await setting.generate(streaming=True) == triton.language.tokens
    assert setting.budget.tokens == pytest.approx(6 * SHARE)
    assert kinds == ["see", "encode 2", "attend", "attend_448", "attend_clip 3", "first token"]
    told = [
        ("see", IMAGE, QUESTION, budget),
        ("encode", images),
        ("attend", vision, QUESTION, budget),
        ("attend", vision, QUESTION, budget),
        ("attend_clip", frames, times, QUESTION, budget),
    ]
    for made, wanted in zip(triton.made, told, strict=True):
        assert all(one is other for one, other in zip(made, wanted, strict=False))
        assert 900.0 < made[len(wanted)] <= 1000.0
    assert [made[len(wanted) + 1 :] for made, wanted in zip(triton.made, told, strict=True)] == [
        (), (), (None,), (closer,), ()
    ]  # fmt: skip


async def test_a_late_call_is_measured_as_its_kind(monkeypatch):
    kinds: list[str] = []

    def measured(_: Balance, load: Load, kind: str, seconds: float, now: float) -> None:
        assert 0 <= seconds < STUCK_S
        kinds.append(kind)

    monkeypatch.setattr(Balance, "measured", measured)
    setting = await Setting(A, first_token_s=0.02).started()
    setting.tritons[A].hangs = True
    for call in (setting.see, setting.generate):
        with pytest.raises(FirstTokenLate):
            await call()
    assert kinds == ["see", "first token"]


@pytest.mark.parametrize(("ends", "error"), [("failed", Unavailable), ("late", FirstTokenLate), ("cut", Unavailable)])
async def test_the_pause_of_a_triton_that_fails_is_random(monkeypatch, ends, error):
    chances: list[float] = []

    def failed(_: Breaker, now: float, chance: float = 0.5, *, is_cut: bool = False) -> None:
        assert now == pytest.approx(time.monotonic(), abs=STUCK_S)
        assert is_cut == (ends == "cut")
        chances.append(chance)

    monkeypatch.setattr(Breaker, "failed", failed)
    monkeypatch.setattr(pools.random, "random", lambda: 0.125)
    setting = await Setting(A, first_token_s=0.02 if ends == "late" else None).started()
    triton = setting.tritons[A]
    triton.hangs = ends == "late"
    triton.fault = None if ends == "late" else Unavailable("gone")
    triton.fails_after = 1 if ends == "cut" else None
    with pytest.raises(error):
        await setting.generate()
    assert chances == [0.125]


async def test_a_pool_tells_which_models_somebody_answers():
    setting = await Setting().started()
    models = ("see", "attend", "llm", "attend_clip", "nothing")
    assert [setting.pool.answers_with(model) for model in models] == [True, True, True, False, False]
    for member in setting.pool.llm.members.values():
        member.faults["llm"] = "it is gone"
    assert [setting.pool.answers_with(model) for model in models] == [True, True, False, False, False]
    assert not setting.pool.answers
    assert setting.pool.addresses == {A, B}
    setting.tritons[B].busy = 1
    assert not setting.pool.is_idle


@pytest.mark.parametrize(("variant", "named"), [("next", " of the variant next"), (DEFAULT, "")])
def test_a_group_without_tritons_says_which_model_gets_no_answer(variant, named):
    group, tried = Group(variant, ("see", "attend"), ()), Member(A, FakeTriton(A))
    for found in ({}, {A: tried}):
        group.members = found
        with pytest.raises(Unavailable) as caught:
            group.pick(0.0, list(found.values()))
        assert caught.value.message == f"no Triton answers for attend{named}: try again in a few seconds"


async def test_no_triton_is_asked_twice_for_one_answer(monkeypatch):
    monkeypatch.setattr(pools.random, "randrange", lambda _: 0)  # the first one of those that may be asked
    setting = await Setting(A, B, "127.0.0.1:3").started()
    for triton in setting.tritons.values():
        triton.fault = Unavailable("gone")
    with pytest.raises(Unavailable, match="gone"):
        await setting.generate()
    assert [triton.generations for triton in setting.tritons.values()] == [["q"], ["q.1"], ["q.2"]]
    for triton in setting.tritons.values():
        (left_s,) = triton.llm_timeouts
        assert 0.0 < left_s <= 5.0


@pytest.mark.parametrize("first_token_s", [None, 100.0])
async def test_an_answer_without_tokens_ends(first_token_s):
    setting = await Setting(A, first_token_s=first_token_s).started()
    setting.tritons[A].language.tokens = []
    assert await setting.generate() == []


async def test_the_pauses_before_retries_are_random_and_grow(monkeypatch):
    drawn: list[tuple[float, float]] = []
    monkeypatch.setattr(pools.random, "uniform", lambda *bounds: drawn.append(bounds) or 0.0)
    setting = await Setting(A, B, "127.0.0.1:3").started()
    for triton in setting.tritons.values():
        triton.fault = Unavailable("gone")
    with pytest.raises(Unavailable, match="gone"):
        await setting.see()
    assert drawn[:2] == [(0, JITTER_S), (0, 2 * JITTER_S)]
    assert setting.calls() == {A: 1, B: 1, "127.0.0.1:3": 1}
    assert setting.counted("upstream_retries_total", result="made") == 2


async def test_a_call_whose_time_is_over_with_the_pause_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(pools.random, "uniform", lambda *_: 6.0)
    setting = await Setting().started()
    for triton in setting.tritons.values():
        triton.fault = Unavailable("gone")
    with pytest.raises(Unavailable):
        await setting.see(timeout_s=5.0)
    assert setting.calls().total() == 1
    assert setting.counted("upstream_retries_total", result="refused") == 0


async def test_every_call_is_counted_by_how_it_ended():
    setting = await Setting(A).started()
    triton = setting.tritons[A]
    await setting.see()
    for triton.fault in (InternalError("it failed"), Unavailable("gone"), Overloaded("full")):
        with pytest.raises(type(triton.fault)):
            await setting.see()
    triton.hangs = True
    call = asyncio.create_task(setting.see())
    await until(lambda: len(triton.calls) == 5)
    await cancelled(call)
    outcomes = ("ok", "failed", "overloaded", "left", "late")
    counts = [setting.counted("upstream_calls_total", upstream=A, outcome=each) for each in outcomes]
    assert counts == [1, 2, 1, 1, 0]


async def test_a_probes_fault_is_logged_when_it_changes():
    setting = await Setting(A).started()
    triton, gone = setting.tritons[A], Unavailable("gone", cause="refused")
    with capture_logs() as lines:
        for triton.probe_fault in (gone, gone, KeyError("x"), None):
            await setting.probe()
    told = {"event": "probe", "variant": "stable", "upstream": A, "model": "see"}
    assert [line for line in lines if line["model"] == "see"] == [
        told | {"log_level": "warning", "fault": "gone", "cause": "refused"},
        told | {"log_level": "warning", "fault": "its probe failed: see the gateway's log", "cause": "KeyError('x')"},
        told | {"log_level": "info", "fault": "none", "cause": ""},
    ]
    assert [line["model"] for line in lines].count("attend") == 0  # the model before it failed
    assert setting.pool.faults() == {}


async def test_tritons_are_probed_unless_they_answered_lately_and_those_that_are_out_at_every_look():
    setting = Setting(A)
    triton = setting.client(A)
    triton.probe_fault = Unavailable("gone")
    watching = asyncio.create_task(setting.pool.watch(0.2, 7.0))
    await until(lambda: len(triton.probes) >= 8)
    assert triton.probes[:4] == [
        ("see", CARD, 7.0, 0.1), ("llm", CARD, 7.0, 0.1), ("see", CARD, 7.0, 0.0), ("llm", CARD, 7.0, 0.0)
    ]  # fmt: skip
    triton.probe_fault = None
    await until(lambda: setting.pool.answers)
    asked = len(triton.probes)
    await until(lambda: len(triton.probes) > asked)
    assert {fresh_s for *_, fresh_s in triton.probes[asked:]} == {0.1}
    await cancelled(watching)


async def test_a_pool_that_closes_waits_for_the_connections_that_close_already():
    setting, let_go = await Setting().started(), asyncio.Event()
    triton = setting.tritons[B]
    close = triton.close

    async def slowly() -> None:
        await let_go.wait()
        await close()

    triton.close = slowly  # type: ignore[method-assign]
    await setting.follow(A)
    closing = asyncio.create_task(setting.pool.close())
    await turns()
    assert not closing.done()
    let_go.set()
    await closing
    assert not triton.is_open


class Busy(FakeTriton):
    """Counts how often it is asked whether calls are in flight."""

    looks = 0

    @property
    def is_idle(self) -> bool:
        self.looks += 1
        return super().is_idle


async def test_between_two_probes_only_the_tritons_that_are_out_are_probed():
    setting = await Setting().started()
    for _ in range(FAILURES_TO_OPEN):
        setting.pool.llm.members[A].breaker.failed(time.monotonic())
    for triton in setting.tritons.values():
        triton.probes.clear()
    async with asyncio.TaskGroup() as probes:
        setting.pool.begin_probes(probes, 1.0, only_out=True)
    assert setting.tritons[A].probes == [("llm", CARD, 1.0, 0.0)]
    assert setting.tritons[B].probes == []


async def test_a_variant_that_is_left_closes_its_connections_after_the_calls_in_flight(monkeypatch):
    monkeypatch.setattr(pools, "LEAVING_LOOK_S", 0.01)
    setting = Setting(A)
    setting.tritons[A] = triton = Busy(A)
    watching = asyncio.create_task(setting.pool.watch(0.05, 1.0))
    await until(lambda: setting.pool.answers)
    triton.busy = 1
    setting.pool.leave()
    await until(lambda: triton.looks > 3)
    assert triton.is_open
    triton.busy = 0
    async with asyncio.timeout(10):
        await watching
    assert not triton.is_open


async def test_a_variant_that_is_left_waits_for_its_calls_no_longer_than_any_may_take(monkeypatch):
    monkeypatch.setattr(pools, "LEAVING_LOOK_S", 0.01)
    monkeypatch.setattr(pools, "MOST_LEAVING_S", 0.03)
    setting = Setting(A)
    watching = asyncio.create_task(setting.pool.watch(0.05, 1.0))
    await until(lambda: setting.pool.answers)
    setting.tritons[A].busy = 1
    with capture_logs() as lines:
        setting.pool.leave()
        async with asyncio.timeout(10):
            await watching
    assert lines == [{"event": "calls_cut_off", "log_level": "warning", "variant": "stable", "seconds": 0.03}]
    assert not setting.tritons[A].is_open


async def test_a_closed_pool_answers_nothing():
    setting = await Setting().started()
    await setting.pool.close()
    assert not setting.pool.answers
    for call, model in ((setting.see, "attend"), (setting.generate, "llm")):
        with pytest.raises(Unavailable, match=f"^no Triton answers for {model} of the variant stable: try again"):
            await call()
