"""Each invariant holds for a campaign in which all goes well, and fails for the one thing that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.faults.clients import Entry, Question
from benchmarks.faults.invariants import DOWN, LOST, STOPPING, Episode, Harm, Probe, Records, check, patience_of

QUESTION = Question(0, "what colour is the circle?", "low")
CLOSE = Question(0, "what colour is the circle?", "high")
A = frozenset("a")


def entry(sent: float, ended: float, outcome: str = "ok", **changed: object) -> Entry:
    told = {"gateway": "a", "kind": "new", "question": QUESTION, "stream": False, "ends": 1}
    answer = "red" if outcome == "ok" else ""
    return Entry(**{**told, "sent": sent, "ended": ended, "outcome": outcome, "answer": answer, **changed})


def episode(harm: Harm, begun: float = 10.0, healed: float = 11.0, recovered: float | None = 13.0) -> Episode:
    return Episode(0, "a fault", harm, begun, healed, recovered)


def probe(sent: float, status: int = 200, gateway: str = "a") -> Probe:
    return Probe(gateway, sent, sent + 0.01, status)


def records(*entries: Entry, episodes: tuple[Episode, ...] = (), probes: tuple[Probe, ...] = ()) -> Records:
    return Records(
        entries=[entry(1.0, 1.1), *entries],
        episodes=list(episodes),
        probes=[probe(1.0), *probes],
        starts={"a": [0.0], "b": [0.0]},
        undisturbed={QUESTION: "red", CLOSE: "red"},
        leftovers=[],
        ended=100.0,
    )


def broken(found: Records) -> set[str]:
    return {violation.invariant for violation in check(found)}


def test_a_campaign_in_which_all_goes_well_breaks_nothing() -> None:
    harm = Harm("llm", A, is_death=True)
    good = records(
        entry(9.9, 10.1, "unavailable"),
        entry(10.5, 10.6, "unavailable"),
        entry(13.0, 13.2),
        episodes=(episode(harm),),
        probes=(probe(10.5, 503), probe(13.0)),
    )
    assert check(good) == []


@pytest.mark.parametrize("ends", [0, 2])
def test_a_request_ends_once(ends: int) -> None:
    assert broken(records(entry(2.0, 2.1, ends=ends))) == {"ends once"}


def test_a_client_that_waits_in_vain_breaks_it_even_while_a_part_is_down() -> None:
    harm = Harm("gateway a", A, outcomes=LOST | DOWN)
    assert broken(records(entry(9.0, 29.0, "hung"), episodes=(episode(harm),))) == {"ends once"}


@pytest.mark.parametrize(
    ("harm", "failed"),
    [
        (Harm("Redis"), entry(10.5, 10.6, "unavailable")),  # a fault that may fail nothing
        (Harm("llm", A), entry(14.5, 14.6, "unavailable")),  # after the recovery
        (Harm("llm", A), entry(9.0, 9.9, "unavailable")),  # before the fault
        (Harm("llm", A), entry(10.5, 10.6, "unavailable", gateway="b")),  # at the other gateway
        (Harm("llm", A), entry(10.5, 10.6, "internal_error")),  # in a way that does not follow
        (Harm("llm", A), entry(10.5, 10.6, "connection")),  # likewise
        (Harm("encoder", A, frozenset({"vision_encoder"})), entry(10.5, 10.6, "unavailable", kind="follow_up")),
        (Harm("gateway a", A, None, STOPPING, spares_in_flight=True), entry(9.9, 10.1, "connection")),
    ],
)  # fmt: skip
def test_only_what_needs_a_dead_part_fails(harm: Harm, failed: Entry) -> None:
    assert broken(records(failed, episodes=(episode(harm),), probes=(probe(14.0),))) == {"only the dead"}


def test_what_needs_a_dead_part_may_fail() -> None:
    encoder = Harm("encoder", A, frozenset({"vision_encoder"}))
    closer = entry(10.5, 10.6, "unavailable", kind="follow_up", question=CLOSE)  # it encodes too
    assert broken(records(closer, episodes=(episode(encoder),))) == set()
    follow_up = replace(closer, question=QUESTION)
    restarted = replace(episode(encoder), restarted=A)  # the whole Triton went down after all
    assert broken(records(follow_up, episodes=(restarted,))) == set()


def test_an_id_may_be_forgotten_by_a_gateway_that_was_started_since_and_by_no_other() -> None:
    forgotten = entry(20.0, 20.1, "image_not_found", kind="follow_up", id_since=5.0)
    found = records(forgotten)
    assert broken(found) == {"only the dead"}
    found.starts = {"a": [0.0, 6.0], "b": [0.0]}
    assert broken(found) == set()
    found.starts = {"a": [0.0, 4.0], "b": [0.0, 6.0]}
    assert broken(found) == {"only the dead"}


def test_a_gateway_that_was_started_since_cannot_tell_of_an_id_while_redis_is_down() -> None:
    lost = entry(10.5, 10.6, "unavailable", kind="follow_up", id_since=5.0)
    found = records(lost, episodes=(episode(Harm("Redis", of_redis=True)),))
    assert broken(found) == {"only the dead"}
    found.starts = {"a": [0.0, 6.0], "b": [0.0]}
    assert broken(found) == set()
    for other in (replace(lost, id_since=None), replace(lost, sent=14.5, ended=14.6)):
        found.entries = [other]
        assert broken(found) == {"only the dead"}


def test_answers_are_the_undisturbed_ones() -> None:
    assert broken(records(entry(2.0, 2.1, answer="blue"))) == {"same answers"}
    cut = entry(10.5, 10.6, "unavailable", answer="re", stream=True)
    fault = episode(Harm("llm", A))
    assert broken(records(cut, episodes=(fault,))) == set()
    assert broken(records(replace(cut, answer="bl"), episodes=(fault,))) == {"same answers"}


def test_ready_says_no_two_seconds_after_requests_began_to_fail() -> None:
    fault = episode(Harm("llm", A), recovered=20.0)
    fault.healed = 19.0
    failing = (entry(10.0, 11.0, "unavailable"), entry(15.0, 15.1, "unavailable"))
    for probes, wanted in (
        ((probe(12.0),), set()),  # within 2 s
        ((probe(14.0, 503),), set()),
        ((probe(14.0),), {"ready is true"}),
        ((probe(14.0, gateway="b"),), set()),
    ):
        assert broken(records(*failing, episodes=(fault,), probes=probes)) == wanted
    between = entry(11.5, 13.5)  # an answer: the failures are two stories
    assert broken(records(*failing, between, episodes=(fault,), probes=(probe(14.0),))) == set()
    again = (*failing, entry(16.0, 16.1, "unavailable"), entry(19.0, 19.1, "unavailable"))
    said_no = probe(14.0, 503)  # and then the part was back, and died again
    assert broken(records(*again, episodes=(fault,), probes=(said_no, probe(14.5), probe(15.5)))) == set()
    assert broken(records(*again, episodes=(fault,), probes=(said_no, probe(14.5), probe(18.0)))) == {"ready is true"}
    found = records(*failing, episodes=(fault,), probes=(probe(14.0),))
    found.checks = [between]
    assert broken(found) == set()


def test_ready_stays_while_no_part_is_down() -> None:
    fault = episode(Harm("Redis"))
    assert broken(records(episodes=(fault,), probes=(probe(10.5, 503),))) == {"ready is true"}
    assert broken(records(episodes=(fault,), probes=(probe(10.5, 0),))) == {"ready is true"}
    down = episode(Harm("llm", A))
    assert broken(records(episodes=(down,), probes=(probe(10.5, 503),))) == set()
    assert broken(records(episodes=(down,), probes=(probe(14.5, 503),))) == {"ready is true"}


def test_a_death_is_told_within_two_seconds() -> None:
    fault = episode(Harm("Triton", A, is_death=True))
    assert broken(records(episodes=(fault,), probes=(probe(11.9, 503),))) == set()
    assert broken(records(episodes=(fault,), probes=(probe(12.1, 503),))) == {"dead is told"}
    assert broken(records(episodes=(fault,), probes=(probe(11.0),))) == {"dead is told"}


@pytest.mark.parametrize(
    ("recovered", "starts", "wanted"),
    [
        (15.9, False, set()),
        (16.1, False, {"recovers"}),
        (16.1, True, set()),
        (31.1, True, {"recovers"}),
        (None, True, {"recovers"}),
    ],
)
def test_everything_recovers_within_its_limit(recovered: float | None, starts: bool, wanted: set[str]) -> None:
    fault = episode(Harm("llm", A, starts=starts), recovered=recovered)
    assert broken(records(episodes=(fault,))) == wanted


def test_what_a_fault_finds_itself_is_told() -> None:
    harm = Harm("gateway a", A, problems=["gateway a ended with status -9 after SIGTERM"])
    assert broken(records(episodes=(episode(harm),))) == {"ends cleanly"}


def test_nothing_is_left() -> None:
    found = records()
    found.leftovers = ["process 7: tritonserver"]
    assert broken(found) == {"nothing left"}


def test_a_busy_machine_is_given_more_time() -> None:
    assert patience_of(3.0) == 1.0
    assert patience_of(24.0) == 3.0
    fault = episode(Harm("llm", A), recovered=17.0)
    found = records(episodes=(fault,))
    assert broken(found) == {"recovers"}
    found.patience = 3.0
    assert broken(found) == set()
