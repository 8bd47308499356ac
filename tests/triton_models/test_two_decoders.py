"""Test two sets of weights behind one decoder: each row reads as if its own set were alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from service.core.card import LLM_CLIPS, ImageMarks, ModelCard
from service.core.prompt import Prompt
from service.core.request import Sampling
from triton_models.batcher import Batcher, Limits, Sequence
from triton_models.decoder import OnnxDecoder
from triton_models.language_model import open_language_model
from triton_models.two_decoders import TwoDecoders

from .test_decoder import GRAPH, TOLERANCE, join, prompt

ROWS = 8
Scratch = Callable[[Prompt, list[int]], np.ndarray]


@pytest.fixture(scope="module")
def scratch() -> Scratch:
    """Logits [V] after a prompt and some tokens, from one prefill of the prompt's own weights alone."""
    alone = {False: OnnxDecoder(GRAPH, max_rows=1), True: OnnxDecoder(GRAPH.with_name(LLM_CLIPS), max_rows=1)}

    def read(start: Prompt, tokens: list[int]) -> np.ndarray:
        decoder = alone[start.clip_weights]
        ids = np.concatenate([start.input_ids, np.array(tokens, np.int32)])
        logits = join(decoder, replace(start, input_ids=ids, extra_ids=np.zeros(ids.size, np.uint64)))[0]
        decoder.drop(0)
        return logits

    return read


@pytest.fixture
def decoder(card: ModelCard) -> TwoDecoders:
    opened = open_language_model(GRAPH, card, max_rows=ROWS, prefix_cache_bytes=1 << 24)
    assert isinstance(opened, TwoDecoders)
    return opened


def asked(decoder: TwoDecoders, seed: int, *, clips: bool, image: int | None = None) -> Prompt:
    return replace(prompt(decoder, seed, 3 + seed % 5, image=image), clip_weights=clips)  # type: ignore[arg-type]


def test_the_weights_differ(scratch: Scratch, decoder: TwoDecoders) -> None:
    ours, theirs = (scratch(asked(decoder, 1, clips=clips), []) for clips in (False, True))
    assert np.abs(ours - theirs).max() > 100 * TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_both_come_and_go_and_read_as_if_alone(decoder: TwoDecoders, scratch: Scratch, seed: int) -> None:
    generator = np.random.default_rng(seed)
    running: list[tuple[Prompt, list[int]]] = []

    def check(logits: np.ndarray, rows: list[tuple[Prompt, list[int]]]) -> None:
        assert len(logits) == len(rows)
        for found, (start, said) in zip(logits, rows, strict=True):
            np.testing.assert_allclose(found, scratch(start, said), atol=TOLERANCE)

    for turn in range(12):
        free = ROWS - len(running)
        if free and generator.random() < 0.6:
            starts = [
                asked(decoder, 100 * turn + place, clips=bool(generator.random() < 0.5))
                for place in range(int(generator.integers(1, min(free, 3) + 1)))
            ]
            new: list[tuple[Prompt, list[int]]] = [(start, []) for start in starts]
            check(join(decoder, *starts), new)  # type: ignore[arg-type]
            running += new
        if running:
            tokens = generator.integers(0, decoder.vocab_size, len(running))
            for (_, said), token in zip(running, tokens.tolist(), strict=True):
                said.append(token)
            check(decoder.step(tokens), running)
        while running and generator.random() < 0.5:
            row = int(generator.integers(len(running)))
            decoder.drop(row)
            running[row] = running[-1]
            running.pop()
        assert decoder.rows == len(running)


def test_a_failed_prefill_of_one_adds_no_row_of_the_other(
    decoder: TwoDecoders, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = asked(decoder, 1, clips=True)
    join(decoder, before)  # type: ignore[arg-type]

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    both = [asked(decoder, 2, clips=False), asked(decoder, 3, clips=True), asked(decoder, 4, clips=False)]
    with monkeypatch.context() as patched:
        patched.setattr(decoder._clips, "prefill", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            join(decoder, *both)  # type: ignore[arg-type]
    assert decoder.rows == 1
    join(decoder, *both)  # type: ignore[arg-type]
    logits = decoder.step(np.array([7, 8, 9, 10]))
    for found, start, token in zip(logits, [before, *both], (7, 8, 9, 10), strict=True):
        np.testing.assert_allclose(found, scratch(start, [token]), atol=TOLERANCE)


def test_a_prefill_that_fails_after_its_row_was_added_leaves_no_row(
    decoder: TwoDecoders, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("broken")

    asked_both = [asked(decoder, 2, clips=False, image=1), asked(decoder, 3, clips=True, image=2)]
    with monkeypatch.context() as patched:
        patched.setattr(decoder.prefixes, "keep", fails)
        with pytest.raises(RuntimeError, match="broken"):
            join(decoder, *asked_both)  # type: ignore[arg-type]
    assert (decoder.rows, decoder._own.rows, decoder._clips.rows) == (0, 0, 0)
    for found, start in zip(join(decoder, *asked_both), asked_both, strict=True):  # type: ignore[arg-type]
        np.testing.assert_allclose(found, scratch(start, []), atol=TOLERANCE)


def test_a_row_that_leaves_while_memory_is_full_is_gone(
    decoder: TwoDecoders, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = [asked(decoder, seed, clips=seed == 2) for seed in (1, 2, 3)]
    join(decoder, *starts)  # type: ignore[arg-type]
    dropped = decoder._own.drop

    def drops_and_fails(row: int) -> None:
        dropped(row)
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(decoder._own, "drop", drops_and_fails)
        with pytest.raises(MemoryError):
            decoder.drop(0)
    assert decoder.rows == decoder._own.rows + decoder._clips.rows == 2
    logits = decoder.step(np.array([5, 6]))
    for found, start, token in zip(logits, (starts[2], starts[1]), (5, 6), strict=True):
        np.testing.assert_allclose(found, scratch(start, [token]), atol=TOLERANCE)


def test_a_step_that_fails_in_one_graph_ends_all_rows_and_the_next_answers_are_right(
    decoder: TwoDecoders, card: ModelCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other graph has already read its token, so none of its rows can go on."""

    def fails(*_: object) -> None:
        raise RuntimeError("broken")

    batcher = Batcher(decoder, Limits())
    for clips in (False, True):
        prompt = asked(decoder, 4, clips=clips)
        batcher.submit(Sequence(str(clips), prompt, Sampling(max_tokens=6), end_id=-1))
    while batcher.running < 2:
        batcher.iterate()
    with monkeypatch.context() as patched:
        patched.setattr(decoder._clips, "step", fails)
        failed: list[str] = []
        while batcher.running:
            failed += [event.sequence.request_id for event in batcher.iterate() if event.error]
    assert sorted(failed) == ["False", "True"]
    assert (decoder.rows, decoder._own.rows, decoder._clips.rows) == (0, 0, 0)
    mixed = [asked(decoder, seed, clips=seed % 2 == 0) for seed in range(4)]
    assert answers(batcher, mixed, card) == [answers(batcher, [each], card)[0] for each in mixed]


def test_a_prompt_is_recalled_for_its_own_weights_alone(decoder: TwoDecoders, scratch: Scratch) -> None:
    own, clips = (asked(decoder, 5, clips=each, image=3) for each in (False, True))
    join(decoder, own)  # type: ignore[arg-type]
    assert decoder.recall(own).shape[2] == own.input_ids.size - 1
    assert decoder.recall(clips).shape[2] == 0
    np.testing.assert_allclose(join(decoder, clips)[0], scratch(clips, []), atol=TOLERANCE)  # type: ignore[arg-type]
    assert decoder.recall(clips).shape[2] == clips.input_ids.size - 1


def test_a_row_that_is_not_finite_is_scrubbed_in_its_own_decoder(decoder: TwoDecoders, scratch: Scratch) -> None:
    poisoned = asked(decoder, 6, clips=True)
    poisoned = replace(poisoned, visual_tokens=np.full_like(poisoned.visual_tokens, np.nan))
    join(decoder, asked(decoder, 7, clips=False), poisoned)  # type: ignore[arg-type]
    decoder.scrub(1)
    decoder.drop(1)
    after = asked(decoder, 8, clips=True)
    np.testing.assert_allclose(join(decoder, after)[0], scratch(after, []), atol=TOLERANCE)  # type: ignore[arg-type]
    np.testing.assert_allclose(decoder.step(np.array([3, 4]))[1], scratch(after, [4]), atol=TOLERANCE)


def answers(batcher: Batcher, prompts: list[Prompt], card: ModelCard) -> list[list[int]]:
    every = [Sequence(str(at), each, Sampling(max_tokens=6), card.end_id) for at, each in enumerate(prompts)]
    for sequence in every:
        batcher.submit(sequence)
    said: dict[str, list[int]] = {sequence.request_id: [] for sequence in every}
    while batcher.running or batcher.waiting:
        for event in batcher.iterate():
            assert event.error is None
            if event.token is not None:
                said[event.sequence.request_id].append(event.token)
    return list(said.values())


def test_a_batcher_answers_both_at_once_as_it_answers_each_alone(decoder: TwoDecoders, card: ModelCard) -> None:
    batcher = Batcher(decoder, Limits())
    mixed = [asked(decoder, seed, clips=seed % 2 == 0) for seed in range(6)]
    assert answers(batcher, mixed, card) == [answers(batcher, [each], card)[0] for each in mixed]
    assert decoder.rows == 0


@pytest.mark.parametrize("other", [{"decoder_start_id": 0}, {"image_marks": ImageMarks(1, 2, 3)}])
def test_only_a_decoder_only_llm_has_other_weights_for_clips(card: ModelCard, other: dict) -> None:
    with pytest.raises(ValueError, match="only a decoder-only LLM"):
        open_language_model(GRAPH, replace(card, **other), max_rows=1)
