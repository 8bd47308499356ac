"""Answer for one variant with several Tritons: a vision model and an LLM to the pipeline.

A call goes to the least loaded Triton that answers. If it fails before anything was sent to the caller, another Triton
of the variant gets it, as long as the retry budget allows. A generation stays with the Triton that began it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol, TypeVar

import structlog

from service.core.attempt_time import AttemptTime, attempt_time
from service.core.card import ModelCard
from service.core.errors import DeadlineExceeded, FirstTokenLate, GlimpseError, InternalError, Overloaded, Unavailable
from service.core.models import Generation, LanguageModel, VisionModel
from service.core.prompt import Question
from service.core.request import Budget
from service.core.variant import DEFAULT
from service.core.vision import CloserFeatures, Seen, SeenClip, UInt8Array, VisionFeatures
from service.system.watch import Watch
from service.telemetry.metrics import Metrics
from service.upstreams.balance import Balance, Load
from service.upstreams.breaker import Breaker, State
from service.upstreams.resolve import Names
from service.upstreams.retry_budget import RetryBudget

log = structlog.get_logger()

JITTER_S = 0.02  # most of the pause before the first retry; it doubles with each further one
OVERLOADED = 10.0  # slowness of a Triton whose queue is full
MOST_LEAVING_S = 150.0  # that calls in flight keep the connections of a variant that is gone: longer than any may take
LEAVING_LOOK_S = 0.2
LOOKS = 10  # at Tritons that are out, between two looks at all
UNPROBED = "it has not answered yet"
FIRST_TOKEN = "first token"
WHOLE_ANSWER = "whole answer"  # its time tells how long the answer is, and not how fast the Triton is
T = TypeVar("T")


class Triton(VisionModel, LanguageModel, Protocol):
    """The part of service.triton.TritonClient that is used here."""

    async def connect(self) -> None: ...
    async def close(self) -> None: ...
    @property
    def is_idle(self) -> bool: ...
    async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 0.0) -> None: ...


@dataclass(slots=True, eq=False)
class Member:
    """One Triton in one group."""

    address: str
    client: Triton
    breaker: Breaker = field(default_factory=Breaker)
    load: Load = field(default_factory=Load)
    faults: dict[str, str] = field(default_factory=dict)  # by model, why its probe failed
    is_probed: bool = False  # now

    def fault(self, now: float) -> str:
        """Return why the Triton is out; empty if it is not."""
        told = next(iter(self.faults.values()), "")
        return told or ("" if self.breaker.state(now) is State.CLOSED else "requests to it fail")

    def reason(self, now: float) -> str:
        """Return why the Triton gets no requests: a fault, or that it is slow. Empty if it gets some."""
        return self.fault(now) or ("it is slower than the others" if self.load.is_ejected(now) else "")


@dataclass(slots=True)
class Group:
    """The Tritons of a variant that serve the same models."""

    variant: str
    models: tuple[str, ...]
    names: tuple[str, ...]  # addresses as they are configured
    members: dict[str, Member] = field(default_factory=dict)
    balance: Balance = field(default_factory=Balance)

    def pick(self, now: float, tried: Sequence[Member] = ()) -> Member:
        """Choose one that was not tried. For a first try, any is better than none. Raises Unavailable."""
        left = [member for member in self.members.values() if member not in tried]
        usable = [member for member in left if not member.fault(now)]
        if not usable and tried:
            raise Unavailable(self.out)
        usable = usable or left
        if not usable:
            raise Unavailable(self.out)
        chosen = self.balance.choose([member.load for member in usable], now, random.randrange)
        return next(member for member in usable if member.load is chosen)

    @property
    def out(self) -> str:
        variant = "" if self.variant == DEFAULT else f" of the variant {self.variant}"
        return f"no Triton answers for {self.models[-1]}{variant}: try again in a few seconds"

    def answers(self, now: float) -> bool:
        return any(not member.fault(now) for member in self.members.values())

    def faults(self, now: float) -> dict[str, str]:
        """Return why Tritons are out, by their addresses."""
        told = {address: member.reason(now) for address, member in self.members.items()}
        return {address: reason for address, reason in told.items() if reason}


class Pool:
    """Hold the Tritons of one variant. It serves as a VisionModel and as a LanguageModel."""

    def __init__(
        self,
        variant: str,
        card: ModelCard,
        vision: tuple[str, ...],
        llm: tuple[str, ...],
        *,
        client: Callable[[str], Triton],
        budget: RetryBudget,
        metrics: Metrics,
        first_token_s: float | None = None,
    ) -> None:
        """`client` makes the client of one address. `budget` is the gateway's. `first_token_s` is the most that the
        calls of an attempt may take before its first token; None leaves the request's own timeout."""
        self.variant = variant
        self.card = card
        seeing = tuple(model for model in card.called if model != "llm")
        self.vision, self.llm = Group(variant, seeing, vision), Group(variant, ("llm",), llm)
        self._names = Names()
        self._client = client
        self._clients: dict[str, Triton] = {}  # by address; groups share them
        self._budget = budget
        self._metrics = metrics
        self._first_token_s = first_token_s
        self._leaving: list[Member] = []  # whose address is gone, while they have calls in flight
        self._is_over = False
        self._shown: set[str] = set()  # addresses that have a gauge
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def groups(self) -> tuple[Group, Group]:
        return self.vision, self.llm

    @property
    def answers(self) -> bool:
        """Whether questions can be answered, as far as is known."""
        now = time.monotonic()
        return all(group.answers(now) for group in self.groups)

    def answers_with(self, model: str) -> bool:
        """Whether some Triton answers requests to this model."""
        now = time.monotonic()
        return any(model in group.models and group.answers(now) for group in self.groups)

    def faults(self) -> Mapping[str, str]:
        """Return why Tritons are out, by their addresses."""
        now = time.monotonic()
        return {address: fault for group in self.groups for address, fault in group.faults(now).items()}

    @property
    def is_idle(self) -> bool:
        """Whether no call is in flight, also none that goes on without its request."""
        return all(client.is_idle for client in self._clients.values())

    @property
    def addresses(self) -> frozenset[str]:
        """Return the Tritons' addresses, as far as they are known."""
        return frozenset(address for group in self.groups for address in group.members)

    async def see(
        self, image: UInt8Array, question: Question, budget: Budget, timeout_s: float
    ) -> tuple[VisionFeatures, Seen]:
        return await self._call("see", timeout_s, lambda triton, left_s: triton.see(image, question, budget, left_s))

    async def encode(self, images: UInt8Array, timeout_s: float) -> list[VisionFeatures]:
        return await self._call(
            f"encode {len(images)}", timeout_s, lambda triton, left_s: triton.encode(images, left_s)
        )

    async def attend(
        self,
        vision: VisionFeatures,
        question: Question,
        budget: Budget,
        timeout_s: float,
        closer: CloserFeatures | None = None,
    ) -> Seen:
        kind = "attend" if closer is None else "attend_448"
        return await self._call(
            kind, timeout_s, lambda triton, left_s: triton.attend(vision, question, budget, left_s, closer)
        )

    async def attend_clip(
        self,
        frames: Sequence[VisionFeatures],
        times: Sequence[float],
        question: Question,
        budget: Budget,
        timeout_s: float,
    ) -> SeenClip:
        return await self._call(
            f"attend_clip {len(frames)}",
            timeout_s,
            lambda triton, left_s: triton.attend_clip(frames, times, question, budget, left_s),
        )

    async def _call(self, kind: str, timeout_s: float, ask: Callable[[Triton, float], Awaitable[T]]) -> T:
        """Make a call of the vision models, and again at another Triton if that one fails. Raises GlimpseError."""
        deadline, tried, spent = time.monotonic() + timeout_s, list[Member](), attempt_time()
        self._budget.request()
        while True:
            now = time.monotonic()
            member, left_s = self.vision.pick(now, tried), deadline - now
            try:
                with self._asking(member, kind, left_s, spent) as most_s:
                    return await ask(member.client, most_s)
            except (Unavailable, Overloaded):
                tried.append(member)
                if not await self._may_retry(self.vision, tried, deadline):
                    raise
                spent.begin_anew(time.monotonic())

    async def generate(self, generation: Generation, timeout_s: float) -> AsyncGenerator[tuple[int, ...], None]:
        """Yield token ids as LanguageModel does. Before the first token another Triton may take over.

        With a first-token budget tokens come one by one, because otherwise the first one's time is unknown.
        """
        deadline, tried, spent = time.monotonic() + timeout_s, list[Member](), attempt_time()
        if self._first_token_s is not None:
            generation = replace(generation, sampling=replace(generation.sampling, streaming=True))
        kind = FIRST_TOKEN if generation.sampling.streaming else WHOLE_ANSWER
        self._budget.request()
        while True:
            member, left_s = self.llm.pick(time.monotonic(), tried), deadline - time.monotonic()
            asked = replace(generation, request_id=f"{generation.request_id}.{len(tried)}") if tried else generation
            with held(member.load):
                async with aclosing(member.client.generate(asked, left_s)) as tokens:
                    try:
                        with self._asking(member, kind, left_s, spent) as most_s:
                            first = await self._first(tokens, left_s, most_s)
                    except (Unavailable, Overloaded):
                        tried.append(member)
                        if not await self._may_retry(self.llm, tried, deadline):
                            raise
                        spent.begin_anew(time.monotonic())
                        continue
                    if first is None:
                        return
                    yield first
                    with self._blaming(member):
                        async for more in tokens:
                            yield more
                    return

    async def _first(
        self, tokens: AsyncGenerator[tuple[int, ...], None], left_s: float, most_s: float
    ) -> tuple[int, ...] | None:
        """Return the first tokens. Raises DeadlineExceeded if they do not come within the first-token budget."""
        if most_s == left_s:
            return await anext(tokens, None)
        try:
            async with asyncio.timeout(most_s):
                return await anext(tokens, None)
        except TimeoutError as exc:
            raise DeadlineExceeded("no first token") from exc

    def _most(self, left_s: float, spent_s: float) -> float:
        """Return how long a call may take: what earlier calls of the attempt left of the first-token budget."""
        return left_s if self._first_token_s is None else min(left_s, max(0.0, self._first_token_s - spent_s))

    async def _may_retry(self, group: Group, tried: Sequence[Member], deadline: float) -> bool:
        """Return whether another Triton gets the call, after a pause that differs from request to request."""
        now, pause_s = time.monotonic(), random.uniform(0, JITTER_S * 2 ** (len(tried) - 1))
        others = [member for member in group.members.values() if member not in tried and not member.fault(now)]
        if not others or now + pause_s >= deadline:
            return False
        if not self._budget.take(now):
            self._metrics.upstream_retries.labels(self.variant, "refused").inc()
            return False
        self._metrics.upstream_retries.labels(self.variant, "made").inc()
        await asyncio.sleep(pause_s)
        return True

    @contextmanager
    def _asking(self, member: Member, kind: str, left_s: float, spent: AttemptTime) -> Iterator[float]:
        """Measure one call, and tell the Triton's breaker how it ended. Gives the most that the call may take.

        Raises FirstTokenLate.
        """
        begun = time.monotonic()
        most_s = self._most(left_s, spent.spent_s(begun))
        spent.enter(begun)
        outcome = "left"
        try:
            with held(member.load):
                yield most_s
            outcome = "ok"
        except Overloaded:
            outcome = "overloaded"
            raise
        except DeadlineExceeded as exc:
            if most_s == left_s:  # the request's own time is over
                raise
            outcome = "late"
            raise FirstTokenLate(f"there was no first token within {self._first_token_s:g} s: try again") from exc
        except (Unavailable, InternalError):
            outcome = "failed"
            raise
        finally:
            spent.leave(time.monotonic())
            self._ended(member, kind, begun, outcome)

    def _ended(self, member: Member, kind: str, begun: float, outcome: str) -> None:
        now, balance = time.monotonic(), self.llm.balance if kind == FIRST_TOKEN else self.vision.balance
        match outcome:
            case "ok":
                member.breaker.succeeded(now, is_whole=kind != FIRST_TOKEN)
                if kind != WHOLE_ANSWER:
                    balance.measured(member.load, kind, now - begun, now)
            case "late":
                # If it was shorter, the attempt's earlier calls took most of the budget.
                if self._first_token_s is None or now - begun >= self._first_token_s / 2:
                    member.breaker.failed(now, random.random())
                    balance.measured(member.load, kind, now - begun, now)
            case "failed":
                member.breaker.failed(now, random.random())
            case "overloaded":
                member.load.measure(OVERLOADED, now)
        if member.address in self._clients:  # else its series is gone
            self._metrics.upstream_calls.labels(self.variant, member.address, outcome).inc()

    @contextmanager
    def _blaming(self, member: Member) -> Iterator[None]:
        """Tell the Triton's breaker how an answer went on after its first token."""
        try:
            yield
        except (Unavailable, InternalError):
            member.breaker.failed(time.monotonic(), random.random(), is_cut=True)
            raise
        except GeneratorExit:  # a stop string, or the caller, ended the answer: the Triton did not cut it
            member.breaker.succeeded(time.monotonic())
            raise
        member.breaker.succeeded(time.monotonic())

    async def watch(self, interval_s: float, timeout_s: float) -> None:
        """Probe all Tritons until `leave`, those that are out ten times as often. Follow names with DNS.

        A Triton that does not answer its probe holds up nothing but its own next probe. After `leave`, wait for the
        calls in flight, and close the connections.
        """
        watch = Watch("upstreams")
        try:
            async with asyncio.TaskGroup() as probes:
                while not self._is_over:
                    with watch.surviving():
                        await self.follow()
                    self.begin_probes(probes, timeout_s, interval_s / 2)
                    for _ in range(LOOKS):
                        await asyncio.sleep(interval_s / LOOKS)
                        if self._is_over:
                            break
                        self.begin_probes(probes, timeout_s, only_out=True)
            for _ in range(round(MOST_LEAVING_S / LEAVING_LOOK_S)):
                if self.is_idle:
                    return
                await asyncio.sleep(LEAVING_LOOK_S)
            log.warning("calls_cut_off", variant=self.variant, seconds=MOST_LEAVING_S)
        finally:
            with watch.surviving():
                await self.close()

    def leave(self) -> None:
        """End the watch: nobody asks these Tritons any more."""
        self._is_over = True

    async def follow(self) -> None:
        """Connect to every address that the configured names have now, and leave those that are gone.

        A Triton that is gone gets no more calls. It may still answer those in flight: a pod leaves DNS before it ends.
        So its connections close when it has answered them.
        """
        now_there: set[str] = set()
        there = await self._names.look({*self.vision.names, *self.llm.names})
        for group in self.groups:
            found = dict.fromkeys(address for name in group.names for address in there[name])
            for address in found:
                if address not in self._clients:
                    client = self._client(address)
                    await client.connect()
                    self._clients[address] = client
                    self._metrics.hold(self._metrics.upstream_calls, self.variant, address)
                if address not in group.members:
                    told = dict.fromkeys(group.models, UNPROBED)
                    member = group.members[address] = Member(address, self._clients[address], faults=told)
                    group.balance.loads.append(member.load)
            for address in group.members.keys() - found.keys():
                member = group.members.pop(address)
                group.balance.loads.remove(member.load)
                self._leaving.append(member)
            now_there.update(found)
        self._show(now_there)
        self._leaving = [each for each in self._leaving if each.load.in_flight or not each.client.is_idle]
        for address in self._clients.keys() - now_there - {member.address for member in self._leaving}:
            self._metrics.release(self._metrics.upstream_calls, self.variant, address)
            task = asyncio.create_task(self._clients.pop(address).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _show(self, addresses: set[str]) -> None:
        """Have the gauge of these Tritons, and of no others."""
        ready = self._metrics.upstream_ready
        for address in addresses - self._shown:
            self._metrics.hold(ready, self.variant, address)
        for address in addresses:  # again and again: the variant's other pool may have set it, and be gone
            ready.labels(self.variant, address).set_function(partial(self._is_ready, address))
        for address in self._shown - addresses:
            self._metrics.release(ready, self.variant, address)
        self._shown = addresses

    def begin_probes(
        self, probes: asyncio.TaskGroup, timeout_s: float, fresh_s: float = 0.0, *, only_out: bool = False
    ) -> None:
        """Probe every Triton, or only those that are out; none whose last probe goes on."""
        now = time.monotonic()
        for group in self.groups:
            for member in group.members.values():
                if not member.is_probed and (not only_out or member.fault(now)):
                    member.is_probed = True
                    probes.create_task(self._probe(group, member, timeout_s, fresh_s))

    async def _probe(self, group: Group, member: Member, timeout_s: float, fresh_s: float) -> None:
        """A probe that succeeds closes the Triton's breaker, once its pause is over: no request has to try."""
        try:
            await self._probe_models(group, member, timeout_s, fresh_s)
        finally:
            member.is_probed = False

    async def _probe_models(self, group: Group, member: Member, timeout_s: float, fresh_s: float) -> None:
        for model in group.models:
            fault, cause = "", ""
            try:
                await member.client.probe(model, self.card, timeout_s, fresh_s)
            except GlimpseError as error:
                fault, cause = error.message, error.cause
            except Exception as error:  # a fault of our own must not end the watch, and with it the service
                fault, cause = "its probe failed: see the gateway's log", repr(error)
            if member.faults.get(model, "") != fault:
                (log.warning if fault else log.info)(
                    "probe",
                    variant=self.variant,
                    upstream=member.address,
                    model=model,
                    fault=fault or "none",
                    cause=cause,
                )
            if fault:
                member.faults[model] = fault
                return
            member.faults.pop(model, None)
        member.breaker.succeeded(time.monotonic(), is_whole=False)

    def _is_ready(self, address: str) -> bool:
        return address not in self.faults()

    async def close(self) -> None:
        """End the calls in flight with Unavailable, and close the connections."""
        clients = list(self._clients.values())
        self._names.close()
        self._show(set())
        for address in self._clients:
            self._metrics.release(self._metrics.upstream_calls, self.variant, address)
        self._clients.clear()
        for group in self.groups:
            group.members.clear()
        await asyncio.gather(*(client.close() for client in clients), *self._closing)


@contextmanager
def held(load: Load) -> Iterator[None]:
    """Count a call in flight for the block."""
    load.in_flight += 1
    try:
        yield
    finally:
        load.in_flight -= 1
