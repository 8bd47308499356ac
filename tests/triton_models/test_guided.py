"""Test guided rows of the batcher with the reference model's tokenizer and random scores."""

import json
import threading
from itertools import repeat
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.structured.answers import RandomDecoder, answered, text_prompt, vocabulary, written
from service.core.errors import InvalidRequest
from service.core.guide import guide_of
from service.core.request import Sampling
from service.text.prompt import Detokeniser
from tests.support.servers import eventually
from triton_models.batcher import Batcher, Closed, Limits, Sequence
from triton_models.guiding import Guiding

REPOSITORY = Path(__file__).parents[2] / "model_repository"
GUIDES, SPELLED, END = vocabulary(REPOSITORY)
FORM = {"choices": None, "regex": None, "json_schema": None}


def row(name="", *, max_tokens=64, sampling=None, **form) -> Sequence:
    guide = guide_of(**FORM | form)
    compiled = None if guide is None else GUIDES.compile(guide)
    return Sequence(name, text_prompt(), Sampling(max_tokens, guide=guide, **sampling or {}), END, compiled)


def answers(*rows: Sequence, seed=0, max_rows=8) -> dict[str, tuple[str, bool]]:
    """Each row's text, and whether it ended by itself."""
    batcher, found = Batcher(RandomDecoder(SPELLED, END, seed, max_rows), Limits()), {}
    for each, tokens, error in written(batcher, rows):
        assert not error
        detokeniser, ended = Detokeniser(SPELLED), tokens[-1] == END
        found[each.request_id] = detokeniser.push(tokens[: len(tokens) - ended]) + detokeniser.finish(), ended
    batcher.drain()
    return found


KNOBS = {
    "greedy": {},
    "drawn": {"temperature": 1.5},
    "drawn from few": {"temperature": 1.0, "top_k": 3},
    "drawn from the likeliest": {"temperature": 2.0, "top_p": 0.5},
    "penalised": {"repetition_penalty": 1.7},
    "penalised and drawn": {"repetition_penalty": 0.5, "temperature": 0.7},
}


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS)
def test_choices_never_answer_outside(knobs):
    choices = ["yes", "no", "no idea", "a large blue ring", "9/4", "Never, Straße"]
    rows = [row(str(seed), choices=choices, sampling=knobs | {"seed": seed}) for seed in range(40)]
    found = answers(*rows)
    assert all(ended and answer in choices for answer, ended in found.values()), found
    assert len({answer for answer, _ in found.values()}) > 2


def test_rows_of_all_kinds_share_a_batch_and_places_change():
    """Rows end at different times, so that the last row takes others' places."""
    forms = ({"choices": ["a", "bb"]}, {"regex": "[a-f]{1,30}"}, {}, {"json_schema": {"type": "integer", "minimum": 0}})
    rows = [row(f"{number} {number % 4}", **forms[number % 4], sampling={"temperature": 1.0}) for number in range(64)]
    for name, (answer, ended) in answers(*rows, max_rows=7).items():
        match name[-1]:
            case "0":
                assert ended
                assert answer in ("a", "bb")
            case "1":
                assert ended
                assert set(answer) <= set("abcdef")
            case "3" if ended:
                assert int(answer) >= 0


def test_answers_go_on_when_others_fill_the_states_of_their_guide():
    """The states of one guide's lexer are shared: 18 such answers fill them."""
    found = answers(*(row(str(number), regex="(a|b)*a(a|b){200}", max_tokens=240) for number in range(60)))
    assert all(answer and set(answer) <= set("ab") for answer, _ in found.values())
    assert {len(answer) for answer, ended in found.values() if not ended} <= {240}


class Echo(RandomDecoder):
    """Scores depend on nothing but the step, so that rows do not change each other's."""

    def _scores(self, rows):
        scores = super()._scores(1)
        return np.repeat(scores, rows, axis=0)


def tokens_beside(*others: Sequence) -> list[int]:
    batcher = Batcher(Echo(SPELLED, -1, seed=3), Limits())
    free = Sequence("free", text_prompt(), Sampling(30, temperature=0.9, seed=5, log_probs=True), -1)
    found = {each.request_id: tokens for each, tokens, _ in written(batcher, (free, *others))}
    batcher.drain()
    return found["free"]


def test_a_free_row_draws_the_same_beside_guided_ones():
    alone = tokens_beside(*(row(str(number), max_tokens=30) for number in range(5)))
    forms = ("[a-z]{99}", "[0-9]{99}", "(ab){50}", ".{99}", "[^x]{99}")
    assert tokens_beside(*(row(form, regex=form, max_tokens=30) for form in forms)) == alone


def test_the_log_probability_is_the_models_own():
    batcher = Batcher(RandomDecoder(SPELLED, END), Limits())
    batcher.submit(row(regex="[a-c]", sampling={"temperature": 0.5, "log_probs": True}))
    (event,) = batcher.iterate()
    scores = RandomDecoder(SPELLED, END).prefill([text_prompt()], [])[0].astype(float)
    assert event.log_prob == pytest.approx(scores[event.token] - np.log(np.exp(scores).sum()), abs=1e-4)
    batcher.drain()


def test_a_batcher_whose_batch_failed_guides_the_next_rows():
    decoder = RandomDecoder(SPELLED, END)
    batcher = Batcher(decoder, Limits())
    batcher.submit(row(regex="[a-c]{50}"))
    batcher.iterate()
    decoder.vocab_size, right = 3, decoder.vocab_size  # scores that fit nothing
    decoder._bias = decoder._bias[:3]
    (failed,) = [event for event in batcher.iterate() if event.finished]
    assert "failed" in failed.error
    decoder.vocab_size, decoder._bias = right, np.zeros(right)
    ((_, tokens, error),) = written(batcher, [row(choices=["yes", "no"])])
    assert not error
    assert b"".join(SPELLED[token] for token in tokens).strip() in (b"yes", b"no")
    batcher.drain()


scalars = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
              st.integers(0, 3), st.integers(0, 5)),
    st.builds(lambda least, more: {"type": "integer", "minimum": least, "maximum": least + more},
              st.integers(-100, 100), st.integers(0, 200)),
    st.builds(lambda values: {"enum": values},
              st.lists(st.text(max_size=5) | st.integers(-9, 9) | st.none(), min_size=1, max_size=4)),
)  # fmt: skip
schemas = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.builds(lambda of, least, more: {"type": "array", "items": of, "minItems": least, "maxItems": least + more},
                  inner, st.integers(0, 2), st.integers(0, 2)),
        st.dictionaries(st.text(max_size=5), inner, max_size=3).flatmap(
            lambda fields: st.builds(
                lambda needed: {"type": "object", "properties": fields, "required": needed,
                                "additionalProperties": False},
                st.lists(st.sampled_from([*fields]), unique=True) if fields else st.just([]),
            )
        ),
        st.builds(lambda kinds: {"anyOf": kinds}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)  # fmt: skip


@given(schemas, st.integers(0, 2**32), st.sampled_from([0, 0.5, 2.0]))
@settings(deadline=None, max_examples=60)
def test_every_finished_answer_parses(schema, seed, temperature):
    one = row("1", json_schema=schema, max_tokens=200, sampling={"temperature": temperature, "seed": seed})
    answer, ended = answers(one, seed=seed)["1"]
    if ended:
        jsonschema_rs.validator_for(schema).validate(json.loads(answer))


@pytest.mark.slow
def test_random_forms_of_the_benchmark_are_followed():
    found = answered(REPOSITORY, 60, seed=1)
    assert not found.faults
    assert found.finished > 50


@pytest.fixture
def guided():
    taken, refused = [], []

    def start(tokenizer=REPOSITORY / "tokenizer.json", submit=taken.append, gone=()) -> Guiding:
        """Callers whose sequences are named in `gone` have gone."""
        return Guiding(
            tokenizer, len(SPELLED) + 3, END, max_waiting=9, submit=submit,
            refuse=lambda sequence, error: refused.append((sequence.request_id, error)),
            is_abandoned=lambda sequence: sequence.request_id in gone,
        )  # fmt: skip

    return start, taken, refused


def bare(name="", *, end_id=END, **form) -> Sequence:
    return Sequence(name, text_prompt(), Sampling(guide=guide_of(**FORM | form)), end_id)


def test_a_guide_is_compiled_before_its_sequence_goes_on(guided):
    start, taken, refused = guided
    guiding = start()
    names = [str(number) for number in range(5)]
    for name in names:
        guiding.submit(bare(name, choices=["yes", "no"]))
    eventually(lambda: len(taken) == len(names), 20, "all are compiled")
    guiding.close()
    assert [each.request_id for each in taken] == names
    assert all(each.guide is taken[0].guide for each in taken)
    assert not refused


def test_a_guide_that_cannot_be_compiled_ends_its_sequence_alone(guided):
    start, taken, refused = guided
    guiding = start()
    guiding.submit(bare("bad", regex="(a"))
    guiding.submit(bare("good", regex="a"))
    eventually(lambda: taken, 20, "the second is compiled")
    guiding.close()
    assert [each.request_id for each in taken] == ["good"]
    ((name, error),) = refused
    assert name == "bad"
    assert isinstance(error, InvalidRequest)


def test_a_stopped_sequence_goes_on_cancelled(guided):
    start, taken, _ = guided
    guiding = start()
    with guiding._work:  # nothing is compiled meanwhile
        for name in ("stopped", "other"):
            guiding.submit(bare(name, regex="a"))
        guiding.stop("stopped")
    eventually(lambda: len(taken) == 2, 20, "both have gone on")
    guiding.close()
    assert {each.request_id: (each.cancelled, each.guide is None) for each in taken} == {
        "stopped": (True, True),
        "other": (False, False),
    }


def test_nothing_is_compiled_for_a_caller_that_has_gone(guided):
    start, taken, _ = guided
    guiding = start(gone=("gone", "gone, as it was known"))
    for name, regex in (("gone", "a"), ("other", "b"), ("gone, as it was known", "b")):
        guiding.submit(bare(name, regex=regex))
    eventually(lambda: len(taken) == 3, 20, "all have gone on")
    guiding.close()
    assert {each.request_id: (each.cancelled, each.guide is None) for each in taken} == {
        "gone": (True, True),
        "other": (False, False),
        "gone, as it was known": (False, False),  # the batcher asks before the prefill
    }


def test_guides_that_wait_while_the_model_is_unloaded_are_refused_and_not_compiled(guided):
    start, taken, refused = guided
    compiling, closing = threading.Event(), threading.Event()

    def submit(sequence: Sequence) -> None:
        taken.append(sequence)
        compiling.set()
        closing.wait(20)

    guiding = start(submit=submit)
    for name in ("first", "second", "third"):
        guiding.submit(bare(name, regex="a"))
    assert compiling.wait(20)
    closer = threading.Thread(target=guiding.close)
    closer.start()
    eventually(lambda: guiding._is_closed, 20, "it is closed")
    closing.set()
    closer.join()
    assert [each.request_id for each in taken] == ["first"]
    assert [(name, type(error)) for name, error in refused] == [("second", Closed), ("third", Closed)]


def test_a_tokenizer_that_cannot_be_read_ends_guided_sequences(guided, tmp_path):
    start, taken, refused = guided
    guiding = start(tmp_path / "none.json")
    guiding.submit(bare("one", regex="a"))
    guiding.close()
    assert not taken
    assert "none.json cannot be read" in str(refused[0][1])


def test_a_sequence_with_another_end_is_refused(guided):
    start, *_ = guided
    guiding = start()
    with pytest.raises(InvalidRequest, match="end_id is -1, and a guided answer ends with 2"):
        guiding.submit(bare(regex="a", end_id=-1))
    guiding.close()


def test_many_rows_are_masked_in_one_go():
    rows = [row(str(number), regex=f"[a-z]{{{number}}}!", sampling={"temperature": 3.0}) for number in range(1, 33)]
    found = answers(*rows, max_rows=32)
    assert [len(found[str(number)][0]) for number in range(1, 33)] == [*range(2, 34)]
    assert all(map(str.endswith, (answer for answer, _ in found.values()), repeat("!")))
