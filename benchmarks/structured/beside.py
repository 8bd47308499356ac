"""Measure what free answers lose beside guided ones: the reference model's LLM, rounds in alternation."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.structured.answers import vocabulary
from service.core.card import ModelCard
from service.core.guide import Guide, guide_of
from service.core.prompt import Prompt
from service.core.request import Sampling
from service.text.guides import Guides
from triton_models.batcher import Batcher, Limits, Sequence
from triton_models.decoder import OnnxDecoder

FREE, BESIDE = 16, 16  # rows
NO_END = -1  # free answers end by their length, so that all rounds have the same rows
FIELDS = {"x": {"type": "number"}, "shape": {"enum": ["ring", "star"]}, "name": {"type": "string", "maxLength": 12}}
OBJECT = {"type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False}
# Their answers are longer than a round.
LONG_FORMS: tuple[dict[str, object], ...] = (
    {"json_schema": {"type": "array", "minItems": 100, "items": OBJECT}},
    {"json_schema": {"type": "array", "minItems": 200, "items": {"type": "string", "minLength": 3, "maxLength": 9}}},
    {"regex": r"([a-z]{2,9} [0-9]{1,3}(\.[0-9]{2})?, ){60}"},
    {"regex": r"[A-Z][\w ]{250}"},
)


@dataclass(frozen=True, slots=True)
class Rate:
    """The free answers' tokens in one second of time, and of the decoding thread's CPU time."""

    wall: float
    cpu: float


@dataclass(frozen=True, slots=True)
class Beside:
    """Free answers' tokens a second, beside as many other free rows and beside guided ones."""

    alone: list[Rate]  # of each round
    beside: list[Rate]

    @property
    def loss(self) -> float:
        """Of tokens a second: the median over pairs of rounds that follow each other."""
        return 1 - statistics.median(b.wall / a.wall for a, b in zip(self.alone, self.beside, strict=True))

    @property
    def cpu_loss(self) -> float:
        """Of tokens a second of the decoding thread's CPU time, which other processes hardly change."""
        return 1 - statistics.median(b.cpu / a.cpu for a, b in zip(self.alone, self.beside, strict=True))


def measured(repository: Path, rounds: int, tokens: int, *, guided: bool = True) -> Beside:
    """Alternate rounds of one batcher. Without `guided`, both kinds are free: the loss is then the noise."""
    card = ModelCard.from_json((repository / "card.json").read_text())
    guides, _, end_id = vocabulary(repository)
    decoder = OnnxDecoder(repository / "llm" / "1" / "model.onnx", max_rows=FREE + BESIDE)
    batcher = Batcher(decoder, Limits())
    generator = np.random.default_rng(0)
    prompts = [_prompt(card, generator) for _ in range(FREE + BESIDE)]
    forms = [_guide(form) for form in LONG_FORMS]
    found: dict[bool, list[Rate]] = {False: [], True: []}
    for number in range(2 * rounds + 2):
        is_beside = (number + number // 2) % 2 == 1  # a b b a a b b a
        rate = _round(batcher, prompts, guides, forms if is_beside and guided else [], tokens, end_id)
        if number >= 2:  # the first pair warms up
            found[is_beside].append(rate)
    batcher.drain()
    return Beside(found[False], found[True])


def _round(
    batcher: Batcher, prompts: list[Prompt], guides: Guides, forms: list[Guide], tokens: int, end_id: int
) -> Rate:
    """Answer all prompts at once, and count the free rows' tokens."""
    rows = []
    for place, prompt in enumerate(prompts):
        guide = forms[place % len(forms)] if forms and place >= FREE else None
        sampling = Sampling(tokens, guide=guide)
        compiled = guides.compile(guide) if guide else None
        rows.append(Sequence(str(place), prompt, sampling, end_id if guide else NO_END, compiled))
    for row in rows:
        batcher.submit(row)
    while batcher.waiting:
        batcher.iterate()
    begun, cpu_begun, before = time.perf_counter(), time.thread_time(), sum(row.generated for row in rows[:FREE])
    while any(row.generated < tokens for row in rows[:FREE]):
        batcher.iterate()
    wall_s, cpu_s = time.perf_counter() - begun, time.thread_time() - cpu_begun
    while batcher.running:
        batcher.iterate()
    drawn = FREE * tokens - before
    return Rate(drawn / wall_s, drawn / cpu_s)


def _prompt(card: ModelCard, generator: np.random.Generator) -> Prompt:
    visual = np.arange(card.vocab_size, card.vocab_size + 32)
    text = generator.integers(5, card.vocab_size, 13)
    table = generator.normal(size=(32, card.hidden_size)).astype(np.float32)
    return Prompt(np.concatenate([visual, text]).astype(np.int32), table, np.zeros(45, np.uint64))


def _guide(form: dict[str, object]) -> Guide:
    guide = guide_of(**{"choices": None, "regex": None, "json_schema": None} | form)  # type: ignore[arg-type]
    assert guide is not None
    return guide
