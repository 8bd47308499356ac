"""Test the in-flight batching loop on a decoder whose arithmetic can be done by hand."""

import itertools
import threading
from collections.abc import Sequence as SequenceOf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.prompt import Prompt
from service.core.request import Sampling
from triton_models.batcher import Batcher, Closed, Event, Limits, QueueFull, Sequence, ended

VOCABULARY = 50
NO_END = -1


class HistoryDecoder:
    """A decoder whose logits hash the row's whole history, so a mixed-up row changes the next token."""

    vocab_size = VOCABULARY

    def __init__(self, max_rows: int = 4) -> None:
        self.max_rows = max_rows
        self.history: list[list[int]] = []
        self.calls: list[tuple[str, int]] = []  # ("prefill" or "step", rows), ("read", tokens)
        self.known: list[int] = []  # first tokens of a prompt that need no prefill
        self.scrubbed: list[list[int]] = []
        self.fails: set[int] = set()  # a prompt or a batch with one of these tokens raises
        self.poison: set[int] = set()  # a row with one of these tokens gets NaN

    @property
    def rows(self) -> int:
        return len(self.history)

    def recall(self, prompt: Prompt) -> np.ndarray:
        return self.past(self.known) if prompt.input_ids.tolist()[: len(self.known)] == self.known else self.past([])

    @staticmethod
    def past(tokens: list[int]) -> np.ndarray:
        return np.array(tokens, np.float32).reshape(1, 1, -1, 1)

    def before_answer(self, prompt: Prompt) -> np.ndarray:
        return prompt.input_ids

    def read(self, prompt: Prompt, past: np.ndarray, tokens: int) -> np.ndarray:
        self.calls.append(("read", tokens - past.shape[2]))
        self._fail([prompt.input_ids.tolist()])
        return self.past([*past.ravel(), *prompt.input_ids[past.shape[2] : tokens]])

    def prefill(self, prompts: SequenceOf[Prompt], pasts: SequenceOf[np.ndarray]) -> np.ndarray:
        self.calls.append(("prefill", len(prompts)))
        joining = []
        for prompt, past in zip(prompts, pasts, strict=True):
            known = past.ravel().astype(int).tolist()
            assert len(known) < prompt.input_ids.size
            joining.append(known + prompt.input_ids[len(known) :].tolist())
        self._fail(joining)
        self.history += joining
        assert self.rows <= self.max_rows
        return self._logits(joining)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        self.calls.append(("step", len(tokens)))
        for row, token in zip(self.history, tokens.tolist(), strict=True):
            row.append(token)
        self._fail(self.history)
        return self._logits(self.history)

    def drop(self, row: int) -> None:
        self.history[row] = self.history[-1]
        self.history.pop()

    def scrub(self, row: int) -> None:
        self.scrubbed.append(self.history[row])

    def _fail(self, rows: list[list[int]]) -> None:
        if any(self.fails.intersection(row) for row in rows):
            raise RuntimeError("out of memory")

    def _logits(self, rows: list[list[int]]) -> np.ndarray:
        logits = np.stack([np.random.default_rng(row).normal(size=VOCABULARY) for row in rows]).astype(np.float32)
        logits[[bool(self.poison.intersection(row)) for row in rows]] = np.nan
        return logits


def sequence(*prompt: int, max_tokens: int = 5, end_id: int = NO_END, name: str = "", **sampling) -> Sequence:
    ids = np.array(prompt or (1, 2, 3), np.int32)
    text = Prompt(ids, np.zeros((0, 8), np.float32), np.zeros(ids.size, np.uint64))
    return Sequence(name, text, Sampling(max_tokens=max_tokens, **sampling), end_id)


def run(batcher: Batcher, most: int = 1000) -> list[Event]:
    events = []
    while batcher.running or batcher.waiting:
        events += batcher.iterate()
        most -= 1
        assert most, "the batcher does not end"
    return events


def tokens_of(events: list[Event], wanted: Sequence) -> list[int]:
    return [event.token for event in events if event.sequence is wanted and event.token is not None]


def alone(*prompt: int, **wishes) -> list[int]:
    batcher = Batcher(HistoryDecoder(), Limits())
    one = sequence(*prompt, **wishes)
    batcher.submit(one)
    return tokens_of(run(batcher), one)


def test_one_sequence_is_prefilled_once_and_stepped_until_its_length():
    decoder = HistoryDecoder()
    batcher = Batcher(decoder, Limits())
    one = sequence(7, 8, max_tokens=4, log_probs=True)
    batcher.submit(one)
    events = run(batcher)
    assert decoder.calls == [("prefill", 1), ("step", 1), ("step", 1), ("step", 1)]
    assert [event.finished for event in events] == [False, False, False, True]
    history = [7, 8]
    for token in tokens_of(events, one):
        assert token == np.random.default_rng(history).normal(size=VOCABULARY).astype(np.float32).argmax()
        history.append(token)
    assert one.log_prob == pytest.approx(sum(event.log_prob for event in events))
    assert all(event.log_prob < 0 for event in events)


def test_the_end_id_is_sent_and_ends_the_sequence():
    first, second, *_ = alone(5, 6)
    assert alone(5, 6, end_id=first) == [first]
    assert alone(5, 6, end_id=second) == [first, second]


def test_a_sequence_joins_at_the_next_iteration_and_others_go_on():
    decoder = HistoryDecoder()
    batcher = Batcher(decoder, Limits())
    early, late = sequence(1, max_tokens=6), sequence(2, max_tokens=2)
    batcher.submit(early)
    events = batcher.iterate() + batcher.iterate()
    batcher.submit(late)
    joined = batcher.iterate()
    assert [event.sequence for event in joined] == [late]
    both = batcher.iterate()
    assert [event.sequence for event in both] == [early, late]
    assert batcher.running == 1
    events += joined + both + run(batcher)
    assert tokens_of(events, early) == alone(1, max_tokens=6)
    assert tokens_of(events, late) == alone(2, max_tokens=2)


wishes = st.builds(
    dict,
    max_tokens=st.integers(1, 8),
    temperature=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 3),
    end_id=st.integers(0, 9),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
)


prompts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9)
arrivals = st.tuples(st.integers(0, 3), st.tuples(prompts, wishes))  # iterations before the arrival, and the request


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(arrivals, min_size=1, max_size=14))
def test_company_never_changes_an_answer_and_each_sequence_ends_once(arrivals):
    decoder = HistoryDecoder(max_rows=4)
    batcher = Batcher(decoder, Limits())
    events, sent = [], []
    for iterations_before, (prompt, wish) in arrivals:
        for _ in range(iterations_before):
            events += batcher.iterate()
        one = sequence(*prompt, **wish)
        batcher.submit(one)
        sent.append((one, alone(*prompt, **wish)))
    events += run(batcher)
    for one, expected in sent:
        assert tokens_of(events, one) == expected
        assert [event.finished for event in events if event.sequence is one].count(True) == 1
    assert decoder.rows == 0


def test_prefill_and_decode_take_turns():
    decoder = HistoryDecoder(max_rows=8)
    batcher = Batcher(decoder, Limits(max_prefill_tokens=3))
    for first in range(6):
        batcher.submit(sequence(first, 2, 3, max_tokens=20))
    for _ in range(8):
        batcher.iterate()
    kinds = [kind for kind, _ in decoder.calls]
    assert kinds == ["prefill", "step"] * 4


def test_a_prefill_takes_requests_of_similar_length_within_its_tokens():
    decoder = HistoryDecoder(max_rows=8)
    batcher = Batcher(decoder, Limits(max_prefill_tokens=32, max_prefill_padding=0.25))
    long, short = sequence(*range(10)), sequence(1)
    near = [sequence(*range(9)), sequence(*range(8)), sequence(*range(10))]
    for each in (long, short, *near):
        batcher.submit(each)
    assert [event.sequence for event in batcher.iterate()] == [long, near[0], near[1]]
    batcher.iterate()
    assert [event.sequence for event in batcher.iterate()] == [short]  # first in line now


def test_a_prompt_longer_than_a_prefill_takes_is_read_in_parts_between_the_steps_of_others():
    decoder = HistoryDecoder()
    batcher = Batcher(decoder, Limits(max_prefill_tokens=4))
    running, long, behind = sequence(1, max_tokens=20), sequence(*range(11)), sequence(2)
    batcher.submit(running)
    events = batcher.iterate()
    batcher.submit(long)
    batcher.submit(behind)
    for _ in range(7):
        events += batcher.iterate()
    one, four = ("step", 1), ("read", 4)
    assert decoder.calls == [("prefill", 1), one, four, one, four, one, ("prefill", 1), ("step", 2)]
    events += run(batcher)
    assert tokens_of(events, running) == alone(1, max_tokens=20)
    assert tokens_of(events, long) == alone(*range(11))
    assert tokens_of(events, behind) == alone(2)


@pytest.mark.parametrize("ends", ["stopped", "abandoned", "faulty"])
def test_a_prompt_read_in_part_can_end_like_any_other(ends):
    decoder = HistoryDecoder()
    gone: list[Sequence] = []
    batcher = Batcher(decoder, Limits(max_prefill_tokens=4), lambda each: each in gone)
    long, other = sequence(*range(30), name="long"), sequence(40)
    batcher.submit(long)
    batcher.submit(other)
    assert batcher.iterate() == []
    assert long.past.shape[2] == 4
    if ends == "stopped":
        assert batcher.stop("long") == 1
    elif ends == "abandoned":
        gone.append(long)
    else:
        decoder.fails = {7}
    events = run(batcher)
    (last,) = [event for event in events if event.sequence is long]
    assert (last.token, last.finished) == (None, True)
    assert ("out of memory" in last.error) if ends == "faulty" else last.error is None
    assert tokens_of(events, other) == alone(40)
    assert decoder.calls.count(("read", 4)) <= 2


def test_what_is_known_of_a_prompt_is_not_read_again_and_counted_once():
    decoder = HistoryDecoder(max_rows=8)
    decoder.known = list(range(20))
    batcher = Batcher(decoder, Limits(max_prefill_tokens=6))
    ends = [sequence(*range(20), 30 + more) for more in range(3)]
    longer, other = sequence(*range(20), *range(30, 40)), sequence(5)
    for each in (*ends, longer, other):
        batcher.submit(each)
    events = run(batcher)
    assert decoder.calls[:5] == [("prefill", 4), ("step", 4), ("read", 6), ("step", 4), ("prefill", 1)]
    assert (batcher.prefix_hits, batcher.prefix_tokens) == (4, 80)
    for more, each in enumerate(ends):
        assert tokens_of(events, each) == alone(*range(20), 30 + more)
    assert tokens_of(events, longer) == alone(*range(20), *range(30, 40))


def test_no_more_rows_than_the_decoder_has_and_the_next_in_line_takes_a_free_one():
    decoder = HistoryDecoder(max_rows=2)
    batcher = Batcher(decoder, Limits())
    sequences = [sequence(first, max_tokens=3) for first in range(5)]
    for each in sequences:
        batcher.submit(each)
    events = run(batcher)
    order = list(dict.fromkeys(event.sequence for event in events))
    assert order == sequences
    assert max(rows for _, rows in decoder.calls) == 2


def test_a_full_queue_refuses_and_says_so():
    batcher = Batcher(HistoryDecoder(max_rows=1), Limits(max_queue=2))
    batcher.submit(sequence())
    batcher.submit(sequence())
    with pytest.raises(QueueFull, match="Exceeds maximum queue size 2"):
        batcher.submit(sequence())
    batcher.iterate()
    batcher.submit(sequence())


def test_stop_ends_running_and_waiting_sequences_of_that_id_only():
    decoder = HistoryDecoder(max_rows=2)
    batcher = Batcher(decoder, Limits())
    running, other, waiting = sequence(1, name="a"), sequence(2, name="b"), sequence(3, name="a")
    for each in (running, other, waiting):
        batcher.submit(each)
    events = batcher.iterate()
    assert batcher.stop("a") == 2
    assert batcher.stop("nobody") == 0
    events += run(batcher)
    assert tokens_of(events, other) == alone(2)
    for stopped in (running, waiting):
        last = [event for event in events if event.sequence is stopped][-1]
        assert (last.token, last.error, last.finished) == (None, None, True)
    assert len(tokens_of(events, running)) == 1
    assert tokens_of(events, waiting) == []


def test_a_stop_while_the_caller_is_asked_is_not_lost():
    """Another thread may stop the sequence during the slow check."""

    def still_there(asked: Sequence) -> bool:
        batcher.stop(asked.request_id)
        return False

    batcher = Batcher(HistoryDecoder(), Limits(cancel_check_tokens=1), still_there)
    one = sequence(1, name="a", max_tokens=40)
    batcher.submit(one)
    assert len(tokens_of(run(batcher), one)) < 5


def test_whoever_joins_while_the_batch_fails_is_told_too():
    class LateBatcher(Batcher):
        def _reap(self) -> list[Event]:
            self.submit(late)
            return super()._reap()

    decoder = HistoryDecoder()
    decoder.vocab_size = 3  # the sampler fails on logits of another width
    batcher = LateBatcher(decoder, Limits())
    early, late = sequence(1, name="early", repetition_penalty=2.0), sequence(2, name="late")
    batcher.submit(early)
    events = batcher.iterate()
    batcher.close()
    told = {event.sequence.request_id for event in [*events, *batcher.drain()] if event.finished}
    assert told == {"early", "late"}


def test_a_cancelled_sequence_leaves_at_the_next_iteration():
    batcher = Batcher(HistoryDecoder(), Limits())
    gone, stays = sequence(1), sequence(2)
    batcher.submit(gone)
    batcher.submit(stays)
    events = batcher.iterate()
    gone.cancelled = True
    after = batcher.iterate()
    assert [event for event in after if event.sequence is gone] == [ended(gone)]
    assert ended(gone).generated == 1  # it had one token
    assert tokens_of(events + after + run(batcher), stays) == alone(2)


def test_a_caller_who_gave_up_while_waiting_is_never_prefilled():
    decoder = HistoryDecoder(max_rows=1)
    gave_up = sequence(2)
    batcher = Batcher(decoder, Limits(), is_abandoned=lambda each: each is gave_up)
    batcher.submit(sequence(1, max_tokens=3))
    batcher.submit(gave_up)
    events = run(batcher)
    assert events[-1] == Event(gave_up, None, 0.0, True)
    assert decoder.calls.count(("prefill", 1)) == 1


def test_of_a_group_only_the_sequences_whose_callers_have_gone_end():
    gone: list[Sequence] = []
    batcher = Batcher(HistoryDecoder(max_rows=2), Limits(), lambda each: each in gone)
    running = [sequence(1, name="stopped"), sequence(2, max_tokens=2)]
    leaves, stays = sequence(3), sequence(4)
    for each in (*running, leaves, stays):
        batcher.submit(each)
    batcher.iterate()
    batcher.iterate()  # one row ends
    gone.append(leaves)
    batcher.stop("stopped")  # and the other one
    events = batcher.iterate()
    assert events[:2] == [ended(running[0]), ended(leaves)]
    assert tokens_of(events + run(batcher), stays) == alone(4)


def test_an_end_in_the_iteration_that_reads_on_is_told():
    batcher = Batcher(HistoryDecoder(), Limits(max_prefill_tokens=4))
    long, waiting = sequence(*range(9)), sequence(1, name="stopped")
    for each in (long, waiting):
        batcher.submit(each)
    batcher.stop("stopped")
    assert batcher.iterate() == [ended(waiting)]
    assert batcher.read == [(long, 4)]


def test_nothing_is_recalled_for_a_sequence_that_has_no_room_in_the_prefill():
    """A recalled past is large."""
    recalled: list[list[int]] = []

    class Recalling(HistoryDecoder):
        def recall(self, prompt: Prompt) -> np.ndarray:
            recalled.append(prompt.input_ids.tolist())
            return super().recall(prompt)

    for limits, prompts, asked in (
        (Limits(max_prefill_tokens=4), [[1, 2, 3, 4], [5]], 1),
        (Limits(max_prefill_tokens=4), [[1, 2], [3, 4], [5, 6]], 2),
    ):
        recalled.clear()
        batcher = Batcher(Recalling(), limits)
        for prompt in prompts:
            batcher.submit(sequence(*prompt))
        batcher.iterate()
        assert recalled == prompts[:asked]


def test_callers_are_asked_every_few_tokens_whether_they_still_listen():
    asked = []
    batcher = Batcher(
        HistoryDecoder(), Limits(cancel_check_tokens=4), is_abandoned=lambda each: bool(asked.append(each))
    )
    one = sequence(1, max_tokens=12)
    batcher.submit(one)
    run(batcher)
    assert asked == [one, one]  # after 4 and 8 tokens


@pytest.mark.parametrize("prompts", [((1, 2), (49, 2)), ((1, 2), (49, 2), (3, 4))])
def test_a_failed_prefill_fails_the_faulty_request_and_not_its_group(prompts):
    decoder = HistoryDecoder()
    decoder.fails = {49}
    batcher = Batcher(decoder, Limits())
    group = [sequence(*prompt) for prompt in prompts]
    for each in group:
        batcher.submit(each)
    events = batcher.iterate()
    assert batcher.read == [(each, 2) for each in group] * 2  # together, then one by one
    events += run(batcher)
    for each, prompt in zip(group, prompts, strict=True):
        if 49 in prompt:
            (failed,) = [event for event in events if event.sequence is each]
            assert (failed.finished, failed.token) == (True, None)
            assert "out of memory" in failed.error
        else:
            assert tokens_of(events, each) == alone(*prompt)


def test_a_failed_step_fails_the_rows_in_it_and_the_loop_goes_on():
    decoder = HistoryDecoder()
    batcher = Batcher(decoder, Limits())
    in_the_step = [sequence(1), sequence(2)]
    for each in in_the_step:
        batcher.submit(each)
    batcher.iterate()
    decoder.fails = set(range(VOCABULARY))
    failed = batcher.iterate()
    assert {event.sequence for event in failed} == set(in_the_step)
    assert all(event.finished and "out of memory" in event.error for event in failed)
    assert decoder.rows == batcher.running == 0
    assert len(decoder.scrubbed) == 2
    decoder.fails = set()
    after = sequence(3)
    batcher.submit(after)
    assert tokens_of(run(batcher), after) == alone(3)


def test_a_row_that_is_not_finite_fails_alone_and_leaves_nothing_behind():
    decoder = HistoryDecoder()
    decoder.poison = {48}
    batcher = Batcher(decoder, Limits())
    fine, poisoned = sequence(1, 2), sequence(48, 2)
    batcher.submit(poisoned)
    batcher.submit(fine)
    events = run(batcher)
    (failed,) = [event for event in events if event.sequence is poisoned]
    assert "not finite" in failed.error
    assert decoder.scrubbed == [[48, 2]]
    assert tokens_of(events, fine) == alone(1, 2)


def test_a_fault_outside_the_decoder_fails_who_had_a_part_in_it_and_the_loop_goes_on():
    decoder = HistoryDecoder(max_rows=2)
    batcher = Batcher(decoder, Limits())
    running, waiting = [sequence(1), sequence(2)], sequence(3)
    for each in (*running, waiting):
        batcher.submit(each)
    batcher.iterate()
    sound, decoder.step = decoder.step, lambda tokens: np.zeros((1, 3), np.float32)  # fewer rows than sequences
    failed = batcher.iterate()
    assert [event.sequence for event in failed] == running
    assert all(event.finished and "the batch failed" in event.error for event in failed)
    assert decoder.rows == 0
    decoder.step = sound
    assert tokens_of(run(batcher), waiting) == alone(3)


@pytest.mark.parametrize("ends", ["a prefill fails", "a part fails", "the caller has gone"])
def test_a_sequence_that_ended_in_its_prefill_is_not_ended_again_by_a_later_fault(ends):
    decoder = HistoryDecoder()
    over = sequence(49, *range(20 if ends == "a part fails" else 1), name="over")
    batcher = Batcher(
        decoder, Limits(max_prefill_tokens=8), lambda each: ends == "the caller has gone" and each is over
    )
    running = sequence(1, name="running")
    batcher.submit(running)
    batcher.iterate()
    decoder.fails = {49}
    batcher.submit(over)
    ended: list[str] = []
    while not ended:
        ended += [event.sequence.request_id for event in batcher.iterate() if event.finished]
    batcher._sampler.draw = lambda *_: 1 / 0
    ended += [event.sequence.request_id for event in batcher.iterate()]
    assert ended == ["over", "running"]


class WholeDecoder(HistoryDecoder):
    """As an encoder-decoder: it reads a prompt at once, and its rows go on from a start token."""

    START = 49

    def before_answer(self, _: Prompt) -> np.ndarray:
        return np.array([self.START], np.int32)

    def read(self, prompt: Prompt, past: np.ndarray, tokens: int) -> np.ndarray:
        return super().read(prompt, past, max(tokens, prompt.input_ids.size))

    def prefill(self, prompts: SequenceOf[Prompt], pasts: SequenceOf[np.ndarray]) -> np.ndarray:
        self.calls.append(("prefill", len(prompts)))
        assert {past.size for past in pasts} <= {0, *(prompt.input_ids.size for prompt in prompts)}
        joining = [[*prompt.input_ids.tolist(), self.START] for prompt in prompts]
        self.history += joining
        return self._logits(joining)


def test_a_decoder_that_reads_a_whole_prompt_is_asked_once_and_its_rows_join_the_others():
    decoder = WholeDecoder()
    batcher = Batcher(decoder, Limits(max_prefill_tokens=4))
    short, long = sequence(1, 2, max_tokens=9), sequence(*range(20))
    batcher.submit(short)
    batcher.submit(long)
    events = run(batcher)
    assert [call for call in decoder.calls if call[0] != "step"] == [("prefill", 1), ("read", 20), ("prefill", 1)]
    assert ("step", 2) in decoder.calls
    for wish in (short, long):
        ids = wish.prompt.input_ids.tolist()
        assert tokens_of(events, wish) == alone(*ids, WholeDecoder.START, max_tokens=wish.sampling.max_tokens)


@pytest.mark.parametrize("repeats", ["prompt", "start"])
def test_a_repetition_penalty_counts_what_the_answer_continues(repeats):
    """The likeliest token is one of the prompt's, which does not count, or the start token, which does."""

    def scores(ids: tuple[int, int]) -> np.ndarray:
        return HistoryDecoder()._logits([[*ids, WholeDecoder.START]])[0]

    pairs = itertools.product(range(WholeDecoder.START), repeat=2)
    ids = next(
        pair for pair in pairs if scores(pair).argmax() == (pair[0] if repeats == "prompt" else WholeDecoder.START)
    )
    batcher = Batcher(WholeDecoder(), Limits())
    penalised = sequence(*ids, max_tokens=1, repetition_penalty=1e9)
    batcher.submit(penalised)
    likeliest, second = np.argsort(scores(ids))[::-1][:2].tolist()
    assert tokens_of(run(batcher), penalised) == [likeliest if repeats == "prompt" else second]


def test_a_closed_batcher_takes_nothing_and_gives_back_what_is_left():
    batcher = Batcher(HistoryDecoder(max_rows=1), Limits())
    running, waiting = sequence(1), sequence(2)
    batcher.submit(running)
    batcher.submit(waiting)
    batcher.iterate()
    batcher.close()
    assert batcher.wait() is False
    with pytest.raises(Closed):
        batcher.submit(sequence())
    assert batcher.drain() == [running, waiting]
    assert batcher.drain() == []


def test_the_loop_sleeps_until_there_is_work():
    batcher = Batcher(HistoryDecoder(), Limits())
    answered, seen = threading.Event(), []

    def loop() -> None:
        while batcher.wait():
            seen.extend(batcher.iterate())
            if seen and seen[-1].finished:
                answered.set()

    thread = threading.Thread(target=loop)
    thread.start()
    one = sequence(4)
    batcher.submit(one)
    assert answered.wait(10)
    batcher.close()
    thread.join(10)
    assert not thread.is_alive()
    assert tokens_of(seen, one) == alone(4)


def test_every_token_tells_how_many_there_are_and_how_likely_they_are_together():
    decoder = HistoryDecoder()
    batcher = Batcher(decoder, Limits())
    one = sequence(7, 8, max_tokens=4, log_probs=True, top_log_probs=2)
    other = sequence(9, max_tokens=2, log_probs=True)
    batcher.submit(one)
    batcher.submit(other)
    events = run(batcher)
    assert all((event.likeliest is not None) is (event.sequence is one) for event in events)
    for asked, count in ((one, 4), (other, 2)):
        told = [event for event in events if event.sequence is asked]
        assert [event.generated for event in told] == list(range(1, count + 1))
        sums = np.cumsum([event.log_prob for event in told])
        assert [event.total_log_prob for event in told] == pytest.approx(sums)
        assert all(event.error is None for event in told)
        assert (asked.generated, asked.log_prob) == (count, pytest.approx(sums[-1]))
    assert batcher.tokens == 6
    assert batcher.iterations == len(decoder.calls) == 4


def test_an_iteration_without_work_is_counted_and_runs_nothing():
    decoder = HistoryDecoder()
    batcher = Batcher(decoder, Limits())
    assert batcher.iterate() == []
    assert (batcher.iterations, batcher.tokens, decoder.calls) == (1, 0, [])


@pytest.mark.parametrize("where", ["read", "prefill", "step"])
def test_a_failure_of_the_decoder_is_told_with_where_it_was(where):
    decoder = HistoryDecoder()
    batcher = Batcher(decoder, Limits(max_prefill_tokens=4))
    one = sequence(*range(9 if where == "read" else 3))
    batcher.submit(one)
    if where == "step":
        batcher.iterate()
    decoder.fails = set(range(VOCABULARY))
    said = "decode step" if where == "step" else "prefill"
    assert batcher.iterate() == [ended(one, f"{said} failed: out of memory")]
    assert (batcher.running, batcher.waiting, decoder.rows) == (0, 0, 0)


def test_other_ends_without_a_token_are_told_alike():
    decoder = HistoryDecoder()
    decoder.poison = {48}
    batcher = Batcher(decoder, Limits())
    poisoned = sequence(48, 2)
    batcher.submit(poisoned)
    assert batcher.iterate() == [Event(poisoned, None, 0.0, True, "the model's logits are not finite")]
    waiting = sequence(3, name="a")
    batcher.submit(waiting)
    batcher.stop("a")
    assert batcher.iterate() == [Event(waiting, None, 0.0, True)]
    decoder.step = lambda tokens: np.zeros((1, 3), np.float32)  # a token of the vocabulary's end would be beyond it
    running = [sequence(1), sequence(2)]
    for each in running:
        batcher.submit(each)
    batcher.iterate()
    failed = batcher.iterate()
    assert [(event.sequence, *event[1:4]) for event in failed] == [(each, None, 0.0, True) for each in running]
    assert all(event.error.startswith("the batch failed: ") for event in failed)


def test_after_a_fault_outside_the_decoder_nothing_of_the_batch_is_left():
    decoder = HistoryDecoder(max_rows=2)
    asked: list[Sequence] = []
    batcher = Batcher(decoder, Limits(cancel_check_tokens=1), lambda each: asked.append(each) or False)
    gone = [sequence(1, temperature=1.0, seed=5, name="gone"), sequence(2, name="gone")]
    for each in gone:
        batcher.submit(each)
    batcher.iterate()
    sound, decoder.step = decoder.step, lambda tokens: np.zeros((1, 3), np.float32)
    batcher.iterate()
    assert [row[0] for row in decoder.scrubbed] == [2, 1]  # each of them, before it is dropped
    assert batcher.stop("gone") == 0
    assert batcher.running == 0
    decoder.step = sound
    asked.clear()
    after = [sequence(3), sequence(4, temperature=1.0, seed=6)]
    for each in after:
        batcher.submit(each)
    events = run(batcher)
    assert tokens_of(events, after[0]) == alone(3)
    assert tokens_of(events, after[1]) == alone(4, temperature=1.0, seed=6)
    assert not set(asked) & set(gone)


def test_the_refusals_say_why():
    batcher = Batcher(HistoryDecoder(), Limits(max_queue=1))
    batcher.submit(sequence())
    with pytest.raises(QueueFull, match=r"^Exceeds maximum queue size 1$"):
        batcher.submit(sequence())
    batcher.close()
    with pytest.raises(Closed, match=r"^the model is being unloaded$"):
        batcher.submit(sequence())


@pytest.mark.parametrize(("waited", "asked"), [(0, 0), (1, 1), (2, 1)])
def test_only_a_sequence_that_had_to_wait_is_asked_before_its_prefill(waited, asked):
    """Asking is slow, and a sequence that is admitted in the next iteration was submitted a moment ago."""
    times: list[Sequence] = []
    batcher = Batcher(HistoryDecoder(max_rows=1), Limits(), lambda each: times.append(each) or False)
    first, second = sequence(1, max_tokens=max(1, waited)), sequence(2, max_tokens=1)
    batcher.submit(first)
    if waited:
        batcher.submit(second)  # it waits for so many iterations
        run(batcher)
    else:
        run(batcher)
        batcher.submit(second)
        run(batcher)
    assert times == [second] * asked


def test_a_sequence_that_is_over_is_not_asked_for():
    times: list[Sequence] = []
    batcher = Batcher(HistoryDecoder(), Limits(cancel_check_tokens=2), lambda each: times.append(each) or False)
    batcher.submit(sequence(1, max_tokens=4))
    run(batcher)
    assert len(times) == 1  # after 2 tokens; after 4 it has ended


def test_a_caller_that_has_gone_ends_its_running_sequence_at_the_next_question():
    gone: list[Sequence] = []
    batcher = Batcher(HistoryDecoder(), Limits(cancel_check_tokens=2), lambda each: each in gone)
    one, other = sequence(1, max_tokens=30), sequence(2, max_tokens=9)
    for each in (one, other):
        batcher.submit(each)
    events = batcher.iterate()
    gone.append(one)
    events += run(batcher)
    assert len(tokens_of(events, one)) == 2
    assert tokens_of(events, other) == alone(2, max_tokens=9)


@pytest.mark.parametrize(
    ("lengths", "together"),
    [((8, 4), 2), ((8, 3), 1), ((8, 8, 8, 4), 4), ((8, 8, 8, 8), 4), ((8, 8, 8, 8, 8), 4), ((9, 9, 9, 9), 3),
     ((4, 8), 2), ((3, 8), 1), ((10, 10, 11), 3), ((10, 11, 11, 10), 3)],
)  # fmt: skip
def test_a_prefill_fills_its_tokens_and_its_padding_up_to_the_limit(lengths, together):
    """32 or 33 cells at most, a quarter of them padding: rows times the longest."""
    decoder = HistoryDecoder(max_rows=8)
    batcher = Batcher(decoder, Limits(max_prefill_tokens=33 if 11 in lengths else 32, max_prefill_padding=0.25))
    for length in lengths:
        batcher.submit(sequence(*range(length)))
    batcher.iterate()
    assert decoder.calls == [("prefill", together)]


def test_a_prompt_as_long_as_a_prefill_takes_is_read_at_once_and_one_longer_is_not():
    for length, calls in ((4, [("prefill", 1)]), (5, [("read", 4)])):
        decoder = HistoryDecoder()
        batcher = Batcher(decoder, Limits(max_prefill_tokens=4))
        batcher.submit(sequence(*range(length)))
        batcher.iterate()
        assert decoder.calls == calls


def test_running_rows_leave_room_for_the_others_only():
    decoder = HistoryDecoder(max_rows=3)
    batcher = Batcher(decoder, Limits())
    for first in range(2):
        batcher.submit(sequence(first, max_tokens=9))
    batcher.iterate()
    for first in range(3):
        batcher.submit(sequence(10 + first, max_tokens=2))
    batcher.iterate()
    batcher.iterate()
    assert decoder.calls == [("prefill", 2), ("step", 2), ("prefill", 1)]
    assert (batcher.running, batcher.waiting) == (3, 2)


@pytest.mark.parametrize("call", ["read", "prefill"])
def test_a_stop_during_the_prefill_itself_is_not_lost(call):
    """Then the sequence is neither in the queue nor among the rows."""
    stopped: list[int] = []

    class Stopping(HistoryDecoder):
        def read(self, prompt: Prompt, past: np.ndarray, tokens: int) -> np.ndarray:
            stopped.append(batcher.stop("a"))
            return super().read(prompt, past, tokens)

        def prefill(self, prompts: SequenceOf[Prompt], pasts: SequenceOf[np.ndarray]) -> np.ndarray:
            stopped.append(batcher.stop("a"))
            return super().prefill(prompts, pasts)

    batcher = Batcher(Stopping(), Limits(max_prefill_tokens=4))
    one = sequence(*range(9 if call == "read" else 3), name="a", max_tokens=50)
    batcher.submit(one)
    events = batcher.iterate()
    assert stopped == [1]
    assert batcher.stop("a") == 1  # in one place only
    events += batcher.iterate()
    assert events[-1] == ended(one)
    assert len(tokens_of(events, one)) == (call == "prefill")
    assert (batcher.running, batcher.waiting, batcher.stop("a")) == (0, 0, 0)


@pytest.mark.parametrize("known", [[1], [1, 2]])
def test_a_prefix_that_is_known_is_counted_by_its_tokens_and_none_is_not(known):
    decoder = HistoryDecoder(max_rows=1)
    decoder.known = known
    batcher = Batcher(decoder, Limits())
    for prompt in ((1, 2, 3), (5, 6, 7), (1, 2, 4)):
        batcher.submit(sequence(*prompt))
    events = run(batcher)
    assert (batcher.prefix_hits, batcher.prefix_tokens) == (2, 2 * len(known))
    assert {event.sequence.past.shape[2] for event in events} == {0}  # its row has it


def test_work_is_waited_for_in_the_queue_and_in_the_rows():
    batcher = Batcher(HistoryDecoder(), Limits())
    batcher.submit(sequence(1, max_tokens=3))
    assert batcher.wait() is True  # in the queue
    batcher.iterate()
    assert (batcher.waiting, batcher.running) == (0, 1)
    assert batcher.wait() is True  # in a row
    batcher.close()
    assert batcher.wait() is False


def test_without_a_word_64_wait_and_a_prefill_takes_160_tokens():
    assert Limits() == Limits(64, 160, 0.25, 4)
