"""Let many random forms be answered by a decoder of random scores, and check every finished answer."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.structured.forms import drawn
from service.core.card import LLM_TOKENIZER, ModelCard
from service.core.prompt import Prompt
from service.core.request import Sampling
from service.text.guides import Guides
from service.text.prompt import Detokeniser, load_tokenizer, token_bytes
from triton_models.batcher import NO_PAST, Batcher, Limits
from triton_models.batcher import Sequence as Row

MAX_TOKENS = 256
CLOSING = (b'"', b"}", b"]", b'"}', b",", b'":')  # likelier, or random strings would not end


class RandomDecoder:
    """A decoder whose scores are random, whatever it reads; closing brackets and quotes are likely."""

    def __init__(self, spelled: Sequence[bytes], end_id: int, seed: int = 0, max_rows: int = 32) -> None:
        self.vocab_size = len(spelled)
        self.max_rows = max_rows
        self.rows = 0
        self._random = np.random.default_rng(seed)
        likely = [token for token, each in enumerate(spelled) if each in CLOSING or token == end_id]
        self._bias = np.zeros(self.vocab_size)
        self._bias[likely] = 3

    def recall(self, _: Prompt) -> npt.NDArray[np.floating]:
        return NO_PAST

    def before_answer(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        return prompt.input_ids

    def read(self, _: Prompt, __: npt.NDArray[np.floating], tokens: int) -> npt.NDArray[np.floating]:
        return np.zeros((1, 1, tokens, 1), np.float32)

    def prefill(self, prompts: Sequence[Prompt], _: Sequence[npt.NDArray[np.floating]]) -> npt.NDArray[np.floating]:
        self.rows += len(prompts)
        return self._scores(len(prompts))

    def step(self, _: npt.NDArray[np.int64]) -> npt.NDArray[np.floating]:
        return self._scores(self.rows)

    def drop(self, _: int) -> None:
        self.rows -= 1

    def scrub(self, _: int) -> None: ...

    def _scores(self, rows: int) -> npt.NDArray[np.floating]:
        return (self._random.normal(size=(rows, self.vocab_size)) * 2 + self._bias).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of the forms."""

    finished: int
    cut: int  # by max_tokens
    faults: list[str]  # finished answers that do not fit, and errors
    seconds: float
    slowest_compile_ms: float  # of CPU time


def vocabulary(repository: Path) -> tuple[Guides, list[bytes], int]:
    """Return a compiler for the repository's tokenizer, its tokens' bytes and its end's id."""
    card = ModelCard.from_json((repository / "card.json").read_text())
    tokenizer = load_tokenizer(repository / LLM_TOKENIZER)
    spelled = token_bytes(tokenizer)
    return (
        Guides(spelled, card.end_id, lambda text: tokenizer.encode(text, add_special_tokens=False).ids),
        spelled,
        card.end_id,
    )


def text_prompt(size: int = 8) -> Prompt:
    return Prompt(np.arange(5, 5 + size, dtype=np.int32), np.zeros((0, 1), np.float32), np.zeros(size, np.uint64))


def written(batcher: Batcher, rows: Iterable[Row]) -> Iterator[tuple[Row, list[int], str]]:
    """Yield each row when it ends, with its tokens and its error, which may be empty."""
    waiting, tokens = iter(rows), dict[int, tuple[Row, list[int]]]()
    more = True
    while more or batcher.running or batcher.waiting:
        while more and batcher.waiting < 8:
            if (row := next(waiting, None)) is None:
                more = False
            else:
                tokens[id(row)] = (row, [])
                batcher.submit(row)
        for event in batcher.iterate():
            if event.token is not None:
                tokens[id(event.sequence)][1].append(event.token)
            if event.finished:
                yield *tokens.pop(id(event.sequence)), event.error or ""


def answered(repository: Path, count: int, seed: int = 0) -> Answered:
    """Answer `count` random forms, greedily and drawn."""
    guides, spelled, end_id = vocabulary(repository)
    forms = random.Random(seed)
    fits, slowest = {}, 0.0

    def rows() -> Iterator[Row]:
        nonlocal slowest
        for number in range(count):
            guide, fit = drawn(forms)
            begun = time.thread_time()
            compiled = guides.compile(guide)
            slowest = max(slowest, time.thread_time() - begun)
            sampling = Sampling(
                MAX_TOKENS,
                temperature=forms.choice((0, 0.7, 1.5)),
                top_k=forms.choice((0, 5)),
                seed=number,
                repetition_penalty=forms.choice((1, 1.2)),
                guide=guide,
            )
            row = Row(str(number), text_prompt(), sampling, end_id, compiled)
            fits[id(row)] = fit
            yield row

    begun = time.perf_counter()
    batcher = Batcher(RandomDecoder(spelled, end_id, seed), Limits())
    finished, cut, faults = 0, 0, []
    for row, tokens, error in written(batcher, rows()):
        if error:
            faults.append(f"{row.sampling.guide}: {error}")
        elif tokens[-1] != end_id:
            cut += 1
        else:
            detokeniser = Detokeniser(spelled)
            answer = detokeniser.push(tokens[:-1]) + detokeniser.finish()
            finished += 1
            if not _fits(fits[id(row)], answer):
                faults.append(f"{row.sampling.guide}: {answer!r}")
    batcher.drain()
    return Answered(finished, cut, faults, time.perf_counter() - begun, 1e3 * slowest)


def _fits(fit: object, answer: str) -> bool:
    try:
        return bool(fit(answer))  # type: ignore[operator]
    except ValueError:  # no JSON
        return False
