"""What must hold in a campaign, checked over the ledger, the probes and the episodes alone. No clock, no I/O.

ends once       every request has exactly one end, and no client waits for it in vain
only the dead   a request fails only while a part that it needs is down, and only in the ways that follow from it
same answers    every answer equals the undisturbed one
ready is true   while requests fail, ready says so within 2 s; while none may fail, ready stays
dead is told    a gateway whose Triton or own process was killed is not ready within 2 s
recovers        every gateway answers again within the limit after the fault's end
ends cleanly    what is stopped ends as it should
nothing left    no process, shared memory, folder, socket or port stays
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.faults.clients import FORGOTTEN, HUNG, OK, Entry, Question

READY_S = 2.0  # within which ready must tell the truth
RECOVER_S = 5.0  # after the fault's end, if no process has to be started
RESTART_S = 20.0  # if a gateway or a Triton has to start
QUIET_START_S = 8.0  # within which two cores without other work start everything
SETTLE_S = 1.0  # after the recovery, in which requests may still fail
SILENT = frozenset({OK, FORGOTTEN})  # outcomes that say nothing of a part that is down

LOST = frozenset({"connection"})
DOWN = frozenset({"unavailable", "deadline_exceeded", "deadline", "overloaded", "saturated"})
STOPPING = frozenset({"shutting_down", "connection"})


@dataclass(slots=True)
class Harm:
    """What one fault may do to requests."""

    target: str
    gateways: frozenset[str] = frozenset()  # only requests to these may fail
    models: frozenset[str] | None = None  # only requests that need one of these; None: all
    outcomes: frozenset[str] = DOWN  # the ways in which they may fail
    spares_in_flight: bool = False  # requests from before the fault must be answered
    is_death: bool = False  # ready must tell
    of_redis: bool = False  # it is over when the gateways use Redis again
    starts: bool = False  # a gateway, a Triton or a Redis has to start before it is over
    problems: list[str] = field(default_factory=list)  # found by the fault itself


@dataclass(slots=True)
class Episode:
    """One fault, from its cause to the recovery. Times are monotonic seconds."""

    number: int
    kind: str
    harm: Harm
    begun: float
    healed: float = 0.0
    recovered: float | None = None  # None: not at all
    restarted: frozenset[str] = frozenset()  # gateways whose Triton was replaced meanwhile

    @property
    def limit_s(self) -> float:
        return RESTART_S if self.restarted or self.harm.starts else RECOVER_S

    @property
    def ended(self) -> float:
        return float("inf") if self.recovered is None else self.recovered + SETTLE_S

    def touches(self, gateway: str) -> bool:
        return gateway in self.harm.gateways or gateway in self.restarted

    def overlaps(self, entry: Entry) -> bool:
        return entry.sent <= self.ended and entry.ended >= self.begun

    def may_fail(self, entry: Entry) -> bool:
        """Whether the fault explains that this request fails."""
        if not self.touches(entry.gateway) or not self.overlaps(entry):
            return False
        if entry.gateway in self.restarted and entry.outcome in DOWN:
            return True
        if entry.gateway not in self.harm.gateways or entry.outcome not in self.harm.outcomes:
            return False
        if self.harm.spares_in_flight and entry.sent < self.begun:
            return False
        return self.harm.models is None or bool(self.harm.models & entry.needs)


@dataclass(frozen=True, slots=True)
class Probe:
    """One question whether a gateway is ready. Status 0: no answer."""

    gateway: str
    sent: float
    ended: float
    status: int


@dataclass(frozen=True, slots=True)
class Violation:
    invariant: str
    at: float
    message: str
    episode: int | None = None


@dataclass(slots=True)
class Records:
    """Everything that the invariants are checked over."""

    entries: list[Entry]
    episodes: list[Episode]
    probes: list[Probe]
    starts: Mapping[str, Sequence[float]]  # by gateway, the times at which its process was started
    undisturbed: Mapping[Question, str]
    leftovers: list[str]
    ended: float
    checks: list[Entry] = field(default_factory=list)  # of the campaign's own, answered while it waits for recoveries
    patience: float = 1.0  # factor of every limit: a busy machine is given as much more time as its start took

    @property
    def ready_s(self) -> float:
        return READY_S * self.patience


def patience_of(start_s: float) -> float:
    """Return the factor of every limit on a machine on which everything started in `start_s`."""
    return max(1.0, round(start_s / QUIET_START_S, 1))


def check(records: Records) -> list[Violation]:
    """Check every invariant -> what does not hold, in order of time."""
    found = [
        *ends_once(records),
        *only_the_dead(records),
        *same_answers(records),
        *ready_is_true(records),
        *no_false_alarm(records),
        *dead_is_told(records),
        *recovers(records),
        *ends_cleanly(records),
        *(Violation("nothing left", records.ended, left) for left in records.leftovers),
    ]
    return sorted(found, key=lambda violation: violation.at)


def ends_once(records: Records) -> Iterator[Violation]:
    for entry in records.entries:
        if entry.outcome == HUNG:
            yield _of(records, entry, "ends once", "the client waited in vain")
        elif entry.ends != 1:
            yield _of(records, entry, "ends once", f"it has {entry.ends} ends")


def only_the_dead(records: Records) -> Iterator[Violation]:
    for entry in records.entries:
        if entry.outcome in (OK, HUNG):
            continue
        if _has_no_image(records, entry):
            continue
        if not any(episode.may_fail(entry) for episode in records.episodes):
            yield _of(records, entry, "only the dead", f"it failed: {entry.outcome}")


def same_answers(records: Records) -> Iterator[Violation]:
    for entry in records.entries:
        wanted = records.undisturbed[entry.question]
        whole = wanted.startswith(entry.answer) if entry.outcome != OK else entry.answer == wanted
        if not whole:
            yield _of(records, entry, "same answers", f"{entry.answer!r} instead of {wanted!r}")


def ready_is_true(records: Records) -> Iterator[Violation]:
    """Ready may not still say yes READY_S after requests of a kind began to fail, none of which was answered since.

    If it said no meanwhile, it counts from the first failure after that: the part may have died again.
    """
    for gateway in records.starts:
        probes = [probe for probe in records.probes if probe.gateway == gateway]
        for kind in ("new", "follow_up"):
            asked = (*records.entries, *records.checks)
            own = [entry for entry in asked if (entry.gateway, entry.kind) == (gateway, kind)]
            failed: list[Entry] = []  # since the last answer
            for entry in sorted(own, key=lambda entry: entry.ended):
                if entry.outcome == OK:
                    failed = []
                elif entry.outcome not in SILENT and not _has_no_image(records, entry):
                    failed.append(entry)
                    if (after_s := _lie(failed, probes, records.ready_s)) is not None:
                        what = f"ready said 200 {after_s:.1f} s after {kind} requests began to fail"
                        yield _of(records, entry, "ready is true", what)
                        failed = []


def _lie(failed: Sequence[Entry], probes: Sequence[Probe], ready_s: float) -> float | None:
    """Return how long after a failure ready still said yes, although the last request failed too, or None."""
    began = failed[0].ended
    between = [probe for probe in probes if began < probe.sent and probe.ended < failed[-1].sent]
    for probe in between:
        if probe.status != 200:
            began = next((entry.ended for entry in failed if entry.ended > probe.ended), float("inf"))
        elif probe.sent - began > ready_s:
            return probe.sent - began
    return None


def no_false_alarm(records: Records) -> Iterator[Violation]:
    for probe in records.probes:
        if probe.status == 200:
            continue
        touched = (
            episode
            for episode in records.episodes
            if episode.touches(probe.gateway) and probe.sent <= episode.ended and probe.ended >= episode.begun
        )
        if not any(touched):
            episode = _episode_at(records, probe.sent)
            message = f"gateway {probe.gateway} was not ready (status {probe.status}), and no part of it was down"
            yield Violation("ready is true", probe.sent, message, episode)


def dead_is_told(records: Records) -> Iterator[Violation]:
    for episode in records.episodes:
        if not episode.harm.is_death:
            continue
        for gateway in episode.harm.gateways:
            told = any(
                probe.gateway == gateway and probe.status != 200 and probe.ended >= episode.begun
                and probe.sent <= episode.begun + records.ready_s
                for probe in records.probes
            )  # fmt: skip
            if not told:
                message = f"gateway {gateway} was ready for {records.ready_s:g} s after {episode.kind}"
                yield Violation("dead is told", episode.begun, message, episode.number)


def recovers(records: Records) -> Iterator[Violation]:
    for episode in records.episodes:
        took_s = None if episode.recovered is None else episode.recovered - episode.healed
        limit_s = episode.limit_s * records.patience
        if took_s is None or took_s > limit_s:
            said = "never" if took_s is None else f"{took_s:.1f} s"
            message = f"recovered after {said}, the limit is {limit_s:g} s: {episode.kind}"
            yield Violation("recovers", episode.healed, message, episode.number)


def ends_cleanly(records: Records) -> Iterator[Violation]:
    for episode in records.episodes:
        for problem in episode.harm.problems:
            yield Violation("ends cleanly", episode.begun, problem, episode.number)


def _has_no_image(records: Records, entry: Entry) -> bool:
    """Whether the gateway was started since it told the image's id: then only Redis can have the image.

    While Redis is down, the gateway answers that it cannot tell.
    """
    since = entry.id_since
    if since is None or not any(since < start < entry.ended for start in records.starts[entry.gateway]):
        return False
    asks_in_vain = any(episode.harm.of_redis and episode.overlaps(entry) for episode in records.episodes)
    return entry.outcome == FORGOTTEN or (entry.outcome == "unavailable" and asks_in_vain)


def _of(records: Records, entry: Entry, invariant: str, what: str) -> Violation:
    stream = ", streamed" if entry.stream else ""
    message = f"gateway {entry.gateway}, {entry.kind}{stream}, {entry.ended - entry.sent:.2f} s: {what}"
    return Violation(invariant, entry.ended, message, _episode_at(records, entry.ended))


def _episode_at(records: Records, at: float) -> int | None:
    """Return the latest fault that had begun at that time."""
    return max((episode.number for episode in records.episodes if episode.begun <= at), default=None)
