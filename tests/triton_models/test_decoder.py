"""Test the KV pool on the committed decoder graph: each row reads as if it were alone."""

import ctypes
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.core.prompt import Prompt
from service.core.request import Sampling
from service.text.prompt import visual_token_ids
from triton_models.batcher import Batcher, Event, Limits, Sequence
from triton_models.decoder import OnnxDecoder
from triton_models.kv_pool import BLOCK
from triton_models.session import open_session

GRAPH = Path(__file__).parents[2] / "model_repository" / "llm" / "1" / "model.onnx"
DEFAULT = Limits()
TOLERANCE = 1e-4  # on logits: float32 sums are taken in another order


@pytest.fixture
def decoder() -> OnnxDecoder:
    return OnnxDecoder(GRAPH, max_rows=8)


def prompt(decoder: OnnxDecoder, seed: int, text: int, visual: int = 32, image: int | None = None) -> Prompt:
    """Make a prompt: visual tokens, then text drawn from `seed`.

    The visual tokens are drawn from `image` and have extra ids, or else from `seed` and have none.
    """
    generator = np.random.default_rng(seed)
    ids = [decoder.vocab_size + np.arange(visual), generator.integers(0, decoder.vocab_size, text)]
    extra = np.zeros(visual + text, np.uint64)
    if image is not None:
        generator = np.random.default_rng(1000 + image)
        extra[:visual] = visual_token_ids(bytes([image]), visual)
    table = generator.normal(size=(visual, decoder.hidden_size)).astype(np.float32)
    return Prompt(np.concatenate(ids).astype(np.int32), table, extra)


class CopiesInputs:
    """A session on the CPU that copies inputs when they are bound and not when it runs, as ONNX Runtime does for CUDA.

    It stands in for CUDA's own session, which these tests never run.
    """

    def __init__(self, graph: Path, intra_op_threads: int, *_: Any) -> None:
        self._session = open_session(graph, intra_op_threads)
        self.get_inputs, self.get_outputs, self.run = (
            self._session.get_inputs, self._session.get_outputs, self._session.run,
        )  # fmt: skip

    def io_binding(self) -> "CopiedInputs":
        return CopiedInputs(self._session.io_binding())

    def run_with_iobinding(self, binding: "CopiedInputs") -> None:
        self._session.run_with_iobinding(binding.binding)


class CopiedInputs:
    def __init__(self, binding: Any) -> None:
        self.binding, self.bind_output = binding, binding.bind_output
        self._copies: list[np.ndarray] = []

    def bind_input(self, name: str, device: str, number: int, dtype: type, shape: tuple[int, ...], at: int) -> None:
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._copies.append(np.frombuffer(ctypes.string_at(at, nbytes), dtype).copy())
        self.binding.bind_input(name, device, number, dtype, shape, self._copies[-1].ctypes.data)


@pytest.fixture(params=["cpu", "cuda"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OnnxDecoder:
    """A decoder on the CPU, or one as on a GPU, but for the numbers."""
    if request.param == "cuda":
        monkeypatch.setattr("triton_models.session.open_session", CopiesInputs)
    return OnnxDecoder(GRAPH, max_rows=8, provider=request.param)


def from_scratch(decoder: OnnxDecoder, start: Prompt, tokens: list[int]) -> np.ndarray:
    """Return the logits [V] after the prompt and the tokens, from one prefill without any cache."""
    ids = np.concatenate([start.input_ids, np.array(tokens, np.int32)])
    scratch = OnnxDecoder(GRAPH, max_rows=1)
    return join(scratch, Prompt(ids, start.visual_tokens, np.zeros(ids.size, np.uint64)))[0]


def join(decoder: OnnxDecoder, *prompts: Prompt) -> np.ndarray:
    """Prefill as the batcher does, with the pasts that the decoder recalls."""
    return decoder.prefill(prompts, [decoder.recall(each) for each in prompts])


def test_rows_of_different_lengths_come_and_go_and_read_as_if_alone(either):
    decoder = either
    generator = np.random.default_rng(0)
    starts = [prompt(decoder, seed, text) for seed, text in enumerate((3, 11, 7, 20, 1, 5))]
    said: list[list[int]] = [[] for _ in starts]
    rows: list[int] = []

    def check(logits: np.ndarray, which: list[int]) -> None:
        for found, row in zip(logits, which, strict=True):
            np.testing.assert_allclose(found, from_scratch(decoder, starts[row], said[row]), atol=TOLERANCE)

    def joins(*new: int) -> None:
        check(join(decoder, *(starts[row] for row in new)), list(new))
        rows.extend(new)

    def step(times: int) -> None:
        for _ in range(times):
            tokens = generator.integers(0, decoder.vocab_size, len(rows))
            for row, token in zip(rows, tokens.tolist(), strict=True):
                said[row].append(token)
            check(decoder.step(tokens), rows)

    def leave(row: int) -> None:
        decoder.drop(row)
        rows[row] = rows[-1]
        rows.pop()

    joins(0, 1)
    step(2)
    joins(2)
    step(2)
    leave(0)
    joins(3, 4)
    step(3)
    leave(3)
    leave(1)
    joins(5)
    step(2)
    leave(2)
    leave(1)
    leave(0)
    assert decoder.rows == 0


def test_the_pool_grows_and_shrinks_by_blocks_and_keeps_what_it_holds(decoder):
    short, long = prompt(decoder, 1, 2), prompt(decoder, 2, 6)
    join(decoder, long, short)
    assert decoder.columns == BLOCK
    said: list[list[int]] = [[], []]
    while decoder.columns < 3 * BLOCK:
        tokens = np.array([len(said[0]) % decoder.vocab_size, 5])
        logits = decoder.step(tokens)
        for row, token in enumerate(tokens.tolist()):
            said[row].append(token)
    np.testing.assert_allclose(logits[0], from_scratch(decoder, long, said[0]), atol=TOLERANCE)
    np.testing.assert_allclose(logits[1], from_scratch(decoder, short, said[1]), atol=TOLERANCE)
    decoder.drop(0)
    decoder.drop(0)
    assert decoder.columns == BLOCK
    logits = join(decoder, short)
    np.testing.assert_allclose(logits[0], from_scratch(decoder, short, []), atol=TOLERANCE)


def test_a_step_neither_copies_the_cache_nor_looks_at_rows_that_left(decoder, monkeypatch):
    join(decoder, prompt(decoder, 1, 4), prompt(decoder, 2, 4))
    decoder.drop(0)
    given, bind = [], decoder._engine.bind
    monkeypatch.setattr(decoder._engine, "bind", lambda feeds, outputs: given.append(feeds) or bind(feeds, outputs))
    for _ in range(3):
        decoder.step(np.array([3]))
    (feeds,) = given
    pasts = [array for name, array in feeds.items() if name in decoder._past]
    assert len(pasts) == len(decoder._past)
    assert all(np.shares_memory(past, decoder._pool.arrays) for past in pasts)
    assert {len(array) for array in feeds.values()} == {1}


@pytest.mark.parametrize("grows", [True, False])
def test_the_old_memory_of_a_cache_that_moved_is_free_before_the_next_step(either, grows):
    join(either, prompt(either, 1, 4), prompt(either, 2, 4 if grows else 3 * BLOCK))
    either.step(np.array([3, 3]))
    old, columns = weakref.ref(either._pool.arrays), either.columns
    if grows:
        join(either, prompt(either, 3, 3 * BLOCK))
    else:
        either.drop(1)
    assert either.columns != columns
    assert old() is None


def test_a_full_memory_while_the_prefix_cache_copies_fails_nobody(monkeypatch):
    def full(*_: object) -> None:
        raise MemoryError

    decoder = OnnxDecoder(GRAPH, max_rows=2, prefix_cache_bytes=1 << 24)
    monkeypatch.setattr(decoder.prefixes, "keep", full)
    start = prompt(decoder, 1, 9, image=1)
    np.testing.assert_allclose(join(decoder, start)[0], from_scratch(decoder, start, []), atol=TOLERANCE)
    np.testing.assert_allclose(decoder.step(np.array([5]))[0], from_scratch(decoder, start, [5]), atol=TOLERANCE)
    assert decoder.rows == 1


def test_a_prompt_without_an_image_is_read(decoder):
    text = prompt(decoder, 4, 6, visual=0)
    logits = join(decoder, text, prompt(decoder, 5, 3))
    np.testing.assert_allclose(logits[0], from_scratch(decoder, text, []), atol=TOLERANCE)


def test_a_prompt_that_the_graph_refuses_adds_no_row(decoder):
    wrong = prompt(decoder, 1, 4)
    beyond = Prompt(wrong.input_ids + 1, wrong.visual_tokens, wrong.extra_ids)  # the last visual id has no row
    join(decoder, wrong)
    with pytest.raises(Exception, match="invalid index"):
        join(decoder, beyond)
    assert decoder.rows == 1
    decoder.step(np.array([1]))


def generate(
    decoder: OnnxDecoder, wishes: list[tuple[Prompt, Sampling]], stagger: int, limits: Limits = DEFAULT
) -> list[list[int]]:
    """Return each request's tokens; `stagger` iterations pass between two arrivals."""
    return generated(Batcher(decoder, limits), wishes, stagger)


def generated(batcher: Batcher, wishes: list[tuple[Prompt, Sampling]], stagger: int) -> list[list[int]]:
    sequences = [Sequence("", start, sampling, end_id=-1) for start, sampling in wishes]
    events: list[Event] = []
    for each in sequences:
        batcher.submit(each)
        for _ in range(stagger):
            events += batcher.iterate()
    while batcher.running or batcher.waiting:
        events += batcher.iterate()
    return [[event.token for event in events if event.sequence is each] for each in sequences]


@pytest.mark.parametrize("stagger", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_same_prompt_alone_and_in_a_full_mixed_batch_says_the_same(decoder, temperature, stagger):
    wishes = [
        (prompt(decoder, seed, 2 + 3 * seed), Sampling(12 + 5 * seed, temperature, top_k=40, top_p=0.95, seed=seed))
        for seed in range(12)  # more than there are rows
    ]
    wishes[3] = (wishes[3][0], Sampling(20, 1.2, repetition_penalty=1.3, seed=9))  # others in the same batch
    alone = [generate(decoder, [wish], 0)[0] for wish in wishes]
    assert generate(decoder, wishes, stagger) == alone
    assert [len(tokens) for tokens in alone] == [wish[1].max_tokens for wish in wishes]


@pytest.mark.parametrize("text", [5, 25], ids=["as long", "longer"])
def test_a_poisoned_request_fails_alone_and_its_row_is_clean_for_the_next(decoder, text):
    """Where it is longer than the next one, nothing but scrubbing overwrites what is behind the next one's end."""
    fine = [(prompt(decoder, seed, 5), Sampling(10)) for seed in range(3)]
    expected = [generate(decoder, [each], 0)[0] for each in fine]
    start = prompt(decoder, 9, text)
    poisoned = Prompt(start.input_ids, np.full_like(start.visual_tokens, np.nan), start.extra_ids)
    found = generate(decoder, [fine[0], (poisoned, Sampling(10)), fine[1], fine[2]], 1)
    assert found[1] == [None]
    assert [found[0], *found[2:]] == expected
    assert generate(decoder, fine, 0) == expected  # in the rows that held the poison


def continued(start: Prompt, tokens: list[int]) -> Prompt:
    """Return the prompt continued by an answer and more text."""
    ids = np.concatenate([start.input_ids, np.array(tokens, np.int32)])
    return Prompt(ids, start.visual_tokens, np.concatenate([start.extra_ids, np.zeros(len(tokens), np.uint64)]))


KEPT_BYTES = {"off": 0, "room for one or two": 500_000, "room for all": 1 << 24}
PREFILLS = {"whole": DEFAULT, "in parts": Limits(max_prefill_tokens=10)}


@pytest.fixture(scope="module")
def akin() -> list[tuple[Prompt, Sampling]]:
    """Make repeats, other samples, earlier turns, other images of the same ids, and images without extra ids."""
    decoder = OnnxDecoder(GRAPH, max_rows=1)
    first, other = prompt(decoder, 1, 9, image=1), prompt(decoder, 1, 9, image=2)
    nameless, text = prompt(decoder, 1, 9), prompt(decoder, 4, 30, visual=0)
    starts = [first, first, other, nameless, continued(first, [7, 8, 9]), text, nameless]
    starts += [continued(first, [7, 8, 9, 10, 11]), continued(text, [5]), other, continued(other, [7, 8, 9]), first]
    return [(each, Sampling(8, 0.9 * (n % 2), top_k=40, top_p=0.95, seed=n)) for n, each in enumerate(starts)]


@pytest.fixture(scope="module")
def alone(akin: list[tuple[Prompt, Sampling]]) -> list[list[int]]:
    """Return each request's tokens when it runs alone and without reuse."""
    return [generate(OnnxDecoder(GRAPH, max_rows=1), [wish], 0)[0] for wish in akin]


@pytest.mark.parametrize("stagger", [0, 2, 60])
@pytest.mark.parametrize("limits", PREFILLS.values(), ids=PREFILLS)
@pytest.mark.parametrize("kept_bytes", KEPT_BYTES.values(), ids=KEPT_BYTES)
def test_what_is_reused_and_how_prompts_are_read_changes_no_answer(akin, alone, kept_bytes, limits, stagger):
    decoder = OnnxDecoder(GRAPH, max_rows=4, prefix_cache_bytes=kept_bytes)
    batcher = Batcher(decoder, limits)
    assert generated(batcher, akin, stagger) == alone
    assert decoder.prefixes.nbytes <= kept_bytes
    if kept_bytes == 0:
        assert batcher.prefix_hits == 0
    elif stagger == 60 and kept_bytes > 1e6:  # each arrives after the previous one has ended
        assert (batcher.prefix_hits, batcher.prefix_tokens) == (7, 40 + 41 + 44 + 30 + 40 + 41 + 40)


def test_what_is_not_finite_is_not_kept(decoder):
    decoder = OnnxDecoder(GRAPH, max_rows=2, prefix_cache_bytes=1 << 24)
    start = prompt(decoder, 9, 5, image=1)
    poisoned = Prompt(start.input_ids, np.full_like(start.visual_tokens, np.nan), start.extra_ids)
    assert generate(decoder, [(poisoned, Sampling(10))], 0) == [[None]]
    assert len(decoder.prefixes) == 0
