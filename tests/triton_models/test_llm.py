"""Test the `llm` model as Triton calls it, on the committed decoder graph.

Requests go in, responses come out: one a token, but where a test sets `stream_interval_ms`.
"""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from triton_python_backend_utils import InferenceRequest, MetricFamily, ResponseSender, start_arguments

from service.core.card import ModelCard
from service.core.request import Sampling
from service.text.prompt import load_tokenizer, token_bytes
from tests.support.servers import eventually
from tests.triton_models.conftest import TRACED, Recorded
from triton_models.batcher import Event, Sequence, ended
from triton_models.llm import Caller, TritonPythonModel

REPOSITORY = Path(__file__).parents[2] / "model_repository"
OUTPUTS = ["output_ids", "sequence_length", "cum_log_probs", "output_log_probs", "top_ids", "top_log_probs"]
CARD = ModelCard.from_json((REPOSITORY / "card.json").read_text())
V, H = CARD.vocab_size, CARD.hidden_size


def start(**parameters: str) -> TritonPythonModel:
    model = TritonPythonModel()
    parameters = {"stream_interval_ms": "0"} | parameters
    model.initialize(start_arguments(REPOSITORY / "llm", inputs=[], outputs=OUTPUTS, parameters=parameters))
    return model


@pytest.fixture
def model():
    model = start()
    yield model
    model.finalize()


def request(request_id="", *, seed=0, text=6, visual=32, max_tokens=8, outputs=("output_ids",), **inputs):
    generator = np.random.default_rng(seed)
    ids = np.concatenate([V + np.arange(visual), generator.integers(3, V, text)]).astype(np.int32)
    tensors = {
        "input_ids": ids[np.newaxis],
        "input_lengths": np.array([[ids.size]], np.int32),
        "request_output_len": np.array([[max_tokens]], np.int32),
        "prompt_embedding_table": generator.normal(size=(1, visual, H)).astype(np.float32),
        "prompt_vocab_size": np.array([[visual]], np.int32),
        "prompt_table_extra_ids": np.zeros((1, ids.size), np.uint64),
        "end_id": np.array([[-1]], np.int32),
        "pad_id": np.array([[CARD.pad_id]], np.int32),
        "streaming": np.array([[True]]),
    }
    return InferenceRequest(tensors | inputs, list(outputs), request_id)


def responses(asked: InferenceRequest):
    """Return all responses up to the final flag."""
    while True:
        response, final = asked.sender.next()
        yield response
        if final:
            return


def tokens(asked: InferenceRequest) -> list[int]:
    return [int(each.outputs["output_ids"].item()) for each in responses(asked) if each is not None]


def error(asked: InferenceRequest):
    (response,) = responses(asked)
    return response.error


def test_one_response_a_token_and_the_last_one_ends_the_stream(model):
    asked = request(max_tokens=5, outputs=OUTPUTS)
    model.execute([asked])
    answered = [each.outputs for each in responses(asked)]
    assert [each["output_ids"].shape for each in answered] == [(1, 1, 1)] * 5
    assert [each["sequence_length"].tolist() for each in answered] == [[[n]] for n in range(1, 6)]
    log_probs = [each["output_log_probs"].item() for each in answered]
    np.testing.assert_allclose([each["cum_log_probs"].item() for each in answered], np.cumsum(log_probs), rtol=1e-5)
    assert {each[name].shape for each in answered for name in OUTPUTS[4:]} == {(1, 1, 1, 0)}
    assert asked.sender.sent.empty()


@pytest.mark.parametrize("streaming", [True, False])
def test_the_likeliest_tokens_come_beside_each_token_if_asked(model, streaming):
    wishes = {"num_top_log_probs": np.array([[3]], np.int32), "streaming": np.array([[streaming]])}
    asked = request(max_tokens=4, outputs=OUTPUTS, **wishes)
    model.execute([asked])
    answered = [each.outputs for each in responses(asked)]
    shape = (1, 1, 1, 3) if streaming else (1, 1, 4, 3)
    assert {each[name].shape for each in answered for name in OUTPUTS[4:]} == {shape}
    for each in answered:
        np.testing.assert_array_equal(each["top_ids"][..., 0], each["output_ids"])  # it is greedy
        np.testing.assert_array_equal(each["top_log_probs"][..., 0], each["output_log_probs"])
        assert (np.diff(each["top_log_probs"]) <= 0).all()
    too_many = request(num_top_log_probs=np.array([[21]], np.int32))
    model.execute([too_many])
    assert "num_top_log_probs" in str(error(too_many))


def test_a_request_chooses_the_weights_that_answer_it(model):
    answers = []
    for wishes in ({}, {"clip_weights": np.array([[False]])}, {"clip_weights": np.array([[True]])}):
        asked = request(**wishes)
        model.execute([asked])
        answers.append(tokens(asked))
    assert answers[0] == answers[1] != answers[2]


def test_the_end_id_is_sent_last(model):
    asked = request()
    model.execute([asked])
    free = tokens(asked)
    ending = request(end_id=np.array([[free[2]]], np.int32))
    model.execute([ending])
    assert tokens(ending) == free[: free.index(free[2]) + 1]


def test_requests_of_one_call_are_answered_as_if_alone(model):
    wishes = [
        {"seed": seed, "text": 3 + seed, "max_tokens": 4 + seed, "temperature": np.array([[0.9]], np.float32)}
        for seed in range(6)
    ]
    alone = []
    for wish in wishes:
        one = request(**wish)
        model.execute([one])
        alone.append(tokens(one))
    together = [request(**wish) for wish in wishes]
    model.execute(together)
    assert [tokens(one) for one in together] == alone


def test_a_seed_repeats_its_answer_and_another_one_does_not(model):
    def sampled(seed: int) -> list[int]:
        asked = request(max_tokens=16, temperature=np.array([[1.5]], np.float32), seed=1)  # the same prompt each time
        asked._inputs.append(type(asked._inputs[0])("seed", np.array([[seed]], np.uint64)))
        model.execute([asked])
        return tokens(asked)

    assert sampled(2**64 - 1) == sampled(2**64 - 1)
    assert len({tuple(sampled(seed)) for seed in range(8)}) > 1


def test_stop_with_the_same_id_ends_the_request(model):
    asked, other = request("a", max_tokens=280), request("b", max_tokens=20)
    model.execute([asked, other])
    asked.sender.next()
    stop = request("a", stop=np.array([[True]]))
    model.execute([stop])
    assert list(responses(stop)) == [None]
    assert len(list(responses(asked))) < 280
    assert len(tokens(other)) == 20


def test_without_streaming_the_answer_comes_as_one_response(model):
    streamed, whole = request(max_tokens=12), request(max_tokens=12, streaming=np.array([[False]]))
    model.execute([streamed, whole])
    said = tokens(streamed)
    (response,) = responses(whole)
    assert response.outputs["output_ids"].tolist() == [[said]]
    assert len(said) == 12


def test_tokens_that_come_soon_after_a_response_wait_for_a_later_one():
    model = start(stream_interval_ms="60000")
    soon, whole = request(max_tokens=12), request(max_tokens=12, streaming=np.array([[False]]))
    model.execute([soon, whole])
    (said,) = (each.outputs["output_ids"].ravel().tolist() for each in responses(whole))
    parts = [each.outputs["output_ids"].ravel().tolist() for each in responses(soon)]
    assert parts == [said[:1], said[1:]]  # the first is never late, and the end brings what waited
    model.finalize()


def test_a_response_tells_of_every_token_that_waited():
    model = start(stream_interval_ms="60000")
    asked = request(max_tokens=6, outputs=OUTPUTS, num_top_log_probs=np.array([[2]], np.int32))
    model.execute([asked])
    first, rest = (each.outputs for each in responses(asked))
    assert [each["sequence_length"].item() for each in (first, rest)] == [1, 6]
    assert rest["output_log_probs"].shape == (1, 1, 5)
    assert rest["top_ids"].shape == (1, 1, 5, 2)
    told = [each["output_log_probs"].sum() for each in (first, rest)]
    np.testing.assert_allclose(rest["cum_log_probs"].item(), sum(told), rtol=1e-5)
    model.finalize()


def test_tokens_that_waited_are_sent_before_an_error():
    sender = InferenceRequest({}, [], "").sender
    caller = Caller(sender, ("output_ids",), interval_s=60.0)
    sequence = Sequence("", prompt=None, sampling=Sampling(), end_id=-1)
    for token in (3, 4, 5):
        caller.say(Event(sequence, token, 0.0, False, generated=token - 2))
    caller.say(Event(sequence, None, 0.0, True, "decode step failed: out of memory"))
    parts = [sender.next() for _ in range(3)]
    assert [part.outputs["output_ids"].ravel().tolist() for part, _ in parts[:2]] == [[3], [4, 5]]
    assert [final for _, final in parts] == [False, False, True]
    assert "out of memory" in parts[2][0].error.message()


@pytest.mark.parametrize("code", ["INTERNAL", None])
def test_a_caller_that_wants_its_answer_whole_gets_no_part_of_it_before_an_error_or_a_stop(code):
    sender = InferenceRequest({}, [], "").sender
    caller = Caller(sender, ("output_ids",), streaming=False)
    sequence = Sequence("", prompt=None, sampling=Sampling(), end_id=-1)
    for token in (3, 4):
        caller.say(Event(sequence, token, 0.0, False, generated=token - 2))
    if code is None:
        caller.say(Event(sequence, None, 0.0, True))
    else:
        caller.say(Event(sequence, None, 0.0, True, "decode step failed: out of memory", code))
    response, final = sender.next()
    assert final
    assert response is None if code is None else "out of memory" in response.error.message()
    assert sender.sent.empty()


def test_tokens_that_waited_are_sent_before_a_stop():
    model = start(stream_interval_ms="60000")
    asked = request("a", max_tokens=280)
    model.execute([asked])
    asked.sender.next()
    eventually(lambda: model._batcher.tokens >= 4, 20, "it decodes meanwhile")
    model.execute([request("a", stop=np.array([[True]]))])
    waited, last = responses(asked)
    assert waited.outputs["output_ids"].size > 1
    assert last is None
    model.finalize()


def test_tokens_that_waited_are_sent_before_an_unload():
    model = start(stream_interval_ms="60000")
    asked = request(max_tokens=280)
    model.execute([asked])
    asked.sender.next()
    eventually(lambda: model._batcher.tokens >= 4, 20, "it decodes meanwhile")
    model.finalize()
    waited, last = responses(asked)
    assert waited.outputs["output_ids"].size > 1
    assert "unloaded" in last.error.message()


def test_stop_without_an_id_is_refused_as_it_would_end_strangers(model):
    asked = request(max_tokens=20)
    model.execute([asked])
    stop = request(stop=np.array([[True]]))
    model.execute([stop])
    assert "stop needs the id" in error(stop).message()
    assert len(tokens(asked)) == 20


def test_a_cancelled_request_ends_within_eight_tokens(model):
    asked = request(max_tokens=280)
    asked.sender.cancelled = True
    model.execute([asked])
    assert len(tokens(asked)) <= 8


class Forgotten(ResponseSender):
    """Of a request that Triton knows no more."""

    def is_cancelled(self) -> bool:
        raise RuntimeError("unknown request")


def test_a_request_that_triton_has_forgotten_ends_within_eight_tokens(model):
    asked = request(max_tokens=280)
    asked.sender = Forgotten()
    model.execute([asked])
    assert len(tokens(asked)) <= 8


def test_no_more_is_decoded_for_a_caller_that_cannot_be_told():
    model = start(max_rows="1")
    broken, fine = request(max_tokens=280), request(max_tokens=3)
    broken.sender.broken = True
    model.execute([broken, fine])
    assert len(tokens(fine)) == 3
    model.finalize()
    assert MetricFamily.latest["glimpse_llm_tokens_total"].value < 140  # a busy machine may tell of a failure late


def test_a_caller_that_cannot_be_told_ends_its_own_request_only(model):
    broken, fine = request(max_tokens=280), request(max_tokens=20)
    broken.sender.broken = True
    model.execute([broken, fine])
    assert len(tokens(fine)) == 20
    after = request(max_tokens=3)
    model.execute([after])
    assert len(tokens(after)) == 3


def test_a_repeat_says_the_same_and_the_saving_is_told():
    model = start(prefix_cache_bytes=str(1 << 24))
    extra_ids = np.array([[*range(1, 33), *[0] * 6]], np.uint64)
    said = []
    for seed, named in ((1, 1), (1, 1), (2, 2), (1, 1), (1, 0)):  # other visual tokens have other extra ids
        asked = request(seed=seed, prompt_table_extra_ids=extra_ids * np.uint64(named))
        model.execute([asked])
        said.append(tokens(asked))
    model.finalize()
    assert said[0] == said[1] == said[3] == said[4] != said[2]
    told = {name: metric.value for name, metric in MetricFamily.latest.items()}
    assert told["glimpse_llm_prefix_hits_total"] == 2
    assert told["glimpse_llm_prefix_tokens_total"] == 2 * 37
    assert told["glimpse_llm_prefix_bytes"] > 2 * 38 * 16
    assert told["glimpse_llm_tokens_total"] == 5 * 8


def test_callers_that_number_their_visual_tokens_alike_share_nothing():
    """A client of Triton may name its rows 1, 2, 3. Another's rows must not answer it, nor be told apart by it."""
    model = start(prefix_cache_bytes=str(1 << 24))
    extra_ids = np.array([[*range(1, 33), *[0] * 6]], np.uint64)
    rows = [np.random.default_rng(seed).normal(size=(1, 32, H)).astype(np.float32) for seed in (1, 2)]
    said = []
    for table, named in ((rows[0], 0), (rows[0], 1), (rows[1], 1), (rows[1], 0)):
        asked = request(seed=1, prompt_embedding_table=table, prompt_table_extra_ids=extra_ids * np.uint64(named))
        model.execute([asked])
        said.append(tokens(asked))
    model.finalize()
    assert said[0] == said[1]
    assert said[2] == said[3] != said[0]


def test_a_full_queue_is_told_at_once():
    model = start(max_rows="1", max_queue="2")
    asked = [request(max_tokens=280) for _ in range(12)]
    model.execute(asked)
    first = [each.sender.next() for each in asked]
    refused = [response.error for response, _ in first if response.error is not None]
    assert len(refused) >= 8
    assert {(each.code, each.message()) for each in refused} == {
        ("UNAVAILABLE", "UNAVAILABLE: Exceeds maximum queue size 2")
    }
    model.finalize()


def test_unloading_ends_every_request_with_an_error():
    model = start(max_rows="2")
    asked = [request(max_tokens=280) for _ in range(5)]
    model.execute(asked)
    asked[0].sender.next()
    model.finalize()
    last = [list(responses(each))[-1] for each in asked]
    told = {(each.error.code, each.error.message()) for each in last}
    assert told == {("UNAVAILABLE", "UNAVAILABLE: the model is being unloaded")}
    late = request()
    model.execute([late])
    assert "unloaded" in error(late).message()


WRONG = {
    "positions": ({"max_tokens": 1000}, f"positions, but the model has {CARD.max_positions}"),
    "no token": ({"max_tokens": 0}, "request_output_len is 0: it must be at least 1"),
    "temperature": ({"temperature": np.array([[-1]], np.float32)}, "it must be 0 (greedy) or more"),
    "not a number": ({"temperature": np.array([[np.nan]], np.float32)}, "it must be 0 (greedy) or more"),
    "top k": ({"runtime_top_k": np.array([[-1]], np.int32)}, "runtime_top_k is -1: it must be 0"),
    "top p": ({"runtime_top_p": np.array([[1.5]], np.float32)}, "runtime_top_p is 1.5: it must be above 0"),
    "penalty": (
        {"repetition_penalty": np.array([[0]], np.float32)},
        "repetition_penalty is 0.0: it must be 0.01 to 10",
    ),
    "tiny penalty": ({"repetition_penalty": np.array([[1e-38]], np.float32)}, "it must be 0.01 to 10"),
    "large penalty": ({"repetition_penalty": np.array([[10.5]], np.float32)}, "it must be 0.01 to 10"),
    "two numbers": ({"temperature": np.array([[1, 2]], np.float32)}, "temperature must be one number"),
    "length": ({"input_lengths": np.array([[99]], np.int32)}, "input_lengths is 99"),
    "rows": ({"prompt_vocab_size": np.array([[31]], np.int32)}, "prompt_embedding_table is [32, "),
    "too many rows": (
        {"prompt_embedding_table": np.zeros((1, CARD.max_positions + 1, H), np.float32)},
        f"prompt_embedding_table has {CARD.max_positions + 1} rows",
    ),
    "too many ids": (
        {"input_ids": np.full((1, 10**6), 5, np.int32), "input_lengths": np.array([[10**6]], np.int32)},
        "1000000 prompt tokens",
    ),
    "width": ({"prompt_embedding_table": np.zeros((1, 32, H + 1), np.float32)}, "prompt_embedding_table is [32, "),
    "table": ({"prompt_embedding_table": np.full((1, 32, H), np.inf, np.float32)}, "is not finite"),
    "ids": ({"input_ids": np.full((1, 38), V + 32, np.int32)}, f"input_ids must be 0 to {V + 31}"),
    "negative": ({"input_ids": np.full((1, 38), -1, np.int32)}, "input_ids must be 0 to"),
    "extra ids": ({"prompt_table_extra_ids": np.zeros((1, 4), np.uint64)}, "prompt_table_extra_ids has 4 ids for 38"),
    "two sequences": ({"input_ids": np.zeros((2, 38), np.int32)}, "one sequence a request"),
}


@pytest.mark.parametrize(("inputs", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_request_is_told_what_is_wrong(model, inputs, message):
    wrong, fine = request(**inputs), request(max_tokens=2)
    model.execute([wrong, fine])
    told = error(wrong)
    assert told.code == "INVALID_ARG"
    assert message in told.message()
    assert len(tokens(fine)) == 2


@pytest.mark.parametrize("extreme", [0.01, 10.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e38])
def test_extreme_numbers_leave_a_constraint_in_force(model, extreme, temperature):
    numbers = {"repetition_penalty": extreme, "temperature": temperature, "runtime_top_p": 1e-38 if temperature else 1}
    asked = guided("regex", "violet", **{name: np.array([[value]], np.float32) for name, value in numbers.items()})
    model.execute([asked])
    spelled = token_bytes(load_tokenizer(REPOSITORY / "tokenizer.json"))
    assert b"".join(spelled[token] for token in tokens(asked)).strip() == b"violet"


def test_a_request_that_cannot_be_taken_ends_alone_even_if_its_caller_has_gone(model, monkeypatch):
    read = model._reader.read

    def full(request_id: str, inputs: dict) -> Sequence:
        if request_id == "large":
            raise MemoryError("no memory for the table")
        return read(request_id, inputs)

    monkeypatch.setattr(model._reader, "read", full)
    large, gone, fine = request("large"), request("large"), request(max_tokens=2)
    gone.sender.broken = True
    model.execute([gone, large, fine])
    assert error(large).message() == "INTERNAL: no memory for the table"
    assert len(tokens(fine)) == 2


def test_the_models_threads_yield_the_cores_as_they_are_told():
    """On Linux the niceness is a thread's own. What one has given up, it may not take back."""
    found: list[int] = []

    def load() -> None:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        model = start(nice="3")
        found.extend(os.getpriority(os.PRIO_PROCESS, each) - before for each in (0, model._loop.native_id))
        model.finalize()

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert found == [3, 3] or os.getpriority(os.PRIO_PROCESS, 0) > 16


def test_a_repository_without_a_card_fails_the_load(tmp_path):
    shutil.copytree(REPOSITORY / "llm", tmp_path / "llm")
    model = TritonPythonModel()
    with pytest.raises(OSError, match=r"card\.json"):
        model.initialize(start_arguments(tmp_path / "llm", inputs=[], outputs=OUTPUTS))


def text(value: str) -> np.ndarray:
    return np.frombuffer(value.encode(), np.uint8)[np.newaxis]


def guided(kind: str, guide: str, **inputs) -> InferenceRequest:
    form = {"guided_decoding_guide_type": text(kind), "guided_decoding_guide": text(guide)}
    return request(**{"end_id": np.array([[CARD.end_id]], np.int32)} | form | inputs)


def test_guided_answers_have_their_form_beside_free_ones(model):
    spelled = token_bytes(load_tokenizer(REPOSITORY / "tokenizer.json"))
    forms = [("regex", "violet|9/4"), ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 7}')]
    asked = [guided(*forms[0]), request(seed=1), guided(*forms[1])]
    model.execute(asked)
    choice, free, number = (b"".join(spelled[token] for token in tokens(each)).strip() for each in asked)
    assert choice in (b"violet", b"9/4")
    assert number in (b"3", b"4", b"5", b"6", b"7")
    alone = request(seed=1)
    model.execute([alone])
    assert free == b"".join(spelled[token] for token in tokens(alone)).strip()


WRONG_GUIDES = {
    "unknown": (guided("xml", "a"), "must be json_schema or regex"),
    "half": (request(guided_decoding_guide=text("a")), "must be json_schema or regex"),
    "malformed": (guided("regex", "(a"), "guided_decoding_guide cannot be followed: unclosed group"),
    "no object": (guided("json_schema", "[]"), "guided_decoding_guide must be a JSON object"),
    "long": (guided("regex", "(a|b)" * 500), "guided_decoding_guide has 2500 characters: send 1 to 2048"),
    "long schema": (guided("json_schema", f'{{"title": "{"a" * 20_000}"}}'), "json_schema has 20,012 bytes"),
    "counts": (guided("regex", "(a{250}){250}[^x]{1000}"), "guided_decoding_guide repeats something 1000 times"),
    "no text": (
        guided("regex", "a", guided_decoding_guide=np.array([[0x61, 0xFF]], np.uint8)),
        "guided_decoding_guide or its type is not UTF-8",
    ),
    "huge": (guided("regex", "a" * 600_000), "guided_decoding_guide has 600,000 bytes"),
    "no end": (
        guided("regex", "a", end_id=np.array([[-1]], np.int32)),
        "end_id is -1, and a guided answer ends with 2",
    ),
}


@pytest.mark.parametrize(("asked", "why"), WRONG_GUIDES.values(), ids=WRONG_GUIDES)
def test_a_guide_that_cannot_be_followed_is_refused(model, asked, why):
    model.execute([asked])
    told = error(asked)
    assert told.code == "INVALID_ARG"
    assert why in told.message()


# An answer alone comes to more states of this one than a guide may have.
TOO_COMPLEX = "|".join(
    f".*[{letters}].{{{most}}}[{letters}]"
    for letters, most in (("aeiou", 200), ("bcdfg", 190), ("hjklm", 180), ("npqrs", 170), ("tvwx", 160))
)


def test_a_guide_that_becomes_too_complex_is_the_callers_to_mend(model):
    hot = {"temperature": np.array([[9]], np.float32)}
    asked, other = guided("regex", TOO_COMPLEX, max_tokens=270, **hot), request(max_tokens=20)
    model.execute([asked, other])
    told = list(responses(asked))[-1].error
    assert told.code == "INVALID_ARG"
    assert told.message().startswith("INVALID_ARGUMENT: guided_decoding_guide became too complex")
    assert len(tokens(other)) == 20


def test_stop_ends_a_request_whose_guide_is_not_compiled_yet(model):
    asked, other = (guided("regex", "[a-z]{200}", request_id=name, max_tokens=250) for name in ("a", "b"))
    with model._guiding._work:  # nothing is compiled meanwhile
        model.execute([asked, other])
        stop = request("a", stop=np.array([[True]]))
        model.execute([stop])
    assert list(responses(stop)) == [None]
    assert list(responses(asked)) == [None]
    assert len(tokens(other)) > 20


def test_a_guided_request_behind_the_end_is_told(model):
    model.finalize()
    late = guided("regex", "a")
    model.execute([late])
    assert "unloaded" in error(late).message()


def ended_spans(recorded: Recorded) -> list[tuple[int, str, bool]]:
    """Of each span that has ended: its tokens, its fault, and whether it failed."""
    return [
        (span.attributes["glimpse.completion_tokens"], span.attributes.get("error.type", ""), not span.status.is_ok)
        for span in recorded.ended()
    ]


def traced(*given, **more):
    asked = request(*given, **more)
    asked.parameters = lambda: json.dumps(TRACED)
    return asked


def test_a_span_ends_with_its_answer(model, recorded):
    asked = traced(max_tokens=5)
    model.execute([asked])
    assert len(tokens(asked)) == 5
    assert ended_spans(recorded) == [(5, "", False)]


def test_the_span_of_a_stopped_answer_tells_its_tokens(model, recorded):
    asked = traced("a", max_tokens=280)
    model.execute([asked])
    asked.sender.next()
    model.execute([traced("b", stop=np.array([[True]])), traced("a", stop=np.array([[True]]))])
    said = 1 + sum(each is not None for each in responses(asked))
    assert ended_spans(recorded) == [(said, "", False)]


def test_the_span_of_a_refused_request_ends_as_failed(recorded):
    model = start(max_queue="1")
    for asked in (traced(max_tokens=100_000), traced(temperature=np.array([[-1.0]], np.float32))):
        model.execute([asked])
        list(responses(asked))
    assert ended_spans(recorded)[0] == (0, "InvalidRequest", True)
    model._batcher.close()
    closed = traced()
    model.execute([closed])
    list(responses(closed))
    assert ended_spans(recorded)[-1] == (0, "Closed", True)
    model.finalize()


def test_the_span_of_an_answer_that_the_unloaded_model_leaves_ends_as_failed(recorded):
    model = start()
    asked = traced(max_tokens=280)
    model.execute([asked])
    asked.sender.next()
    model.finalize()
    ((said, fault, failed),) = ended_spans(recorded)
    assert said >= 1
    assert (fault, failed) == ("Closed", True)
    assert recorded.ended_before_close == 1


def test_a_parent_that_is_no_text_starts_no_span(model, recorded):
    asked = request(max_tokens=2)
    asked.parameters = lambda: json.dumps({"traceparent": 7})
    model.execute([asked])
    assert len(tokens(asked)) == 2
    assert not recorded.ended()


def test_a_failed_answer_has_a_failed_span(recorded):
    caller = Caller(InferenceRequest({}, [], "").sender, ("output_ids",), span=recorded.start("llm"))
    sequence = Sequence("", prompt=None, sampling=Sampling(), end_id=-1)
    sequence.generated = 2
    caller.say(Event(sequence, 3, 0.0, False, generated=1))
    caller.say(ended(sequence, "decode step failed: out of memory"))
    assert ended_spans(recorded) == [(2, "decoder", True)]
