"""Measure the first token, prefix reuse, and how a burst of prompts delays running answers.

    python -m benchmarks.prefill [--repository model_repository] [--max-prefill-tokens 46 160 512]

It runs the `llm` model without Triton and network. It prints medians of CPU milliseconds, which other processes' load
disturbs least.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.decode import TEXT, VISUAL, prompt
from service.core.prompt import Prompt
from service.core.request import Sampling
from triton_models.batcher import Batcher, Limits, Sequence
from triton_models.decoder import OnnxDecoder

ROUNDS = 5
TURN = 16  # tokens of an answer and the next question
RUNNING, JOINING, ANSWER = 4, 16, 16  # running answers, prompts that arrive at once, tokens of each of their answers


def named(decoder: OnnxDecoder, generator: np.random.Generator) -> Prompt:
    """Make a prompt whose visual tokens have their own extra ids."""
    nameless = prompt(decoder, generator)
    extra = nameless.extra_ids.copy()
    extra[:VISUAL] = generator.integers(1, 1 << 60, VISUAL)
    return Prompt(nameless.input_ids, nameless.visual_tokens, extra)


def continued(first: Prompt, decoder: OnnxDecoder, generator: np.random.Generator) -> Prompt:
    ids = generator.integers(3, decoder.vocab_size, TURN).astype(np.int32)
    extra = np.concatenate([first.extra_ids, np.zeros(TURN, np.uint64)])
    return Prompt(np.concatenate([first.input_ids, ids]), first.visual_tokens, extra)


def first_token_ms(decoder: OnnxDecoder, asked: Prompt) -> float:
    started = time.process_time()
    decoder.prefill([asked], [decoder.recall(asked)])
    took = time.process_time() - started
    decoder.drop(0)
    return took * 1e3


def reuse(graph: Path) -> None:
    print(f"first token, CPU ms        of {VISUAL + TEXT} tokens  the same again  {TURN} tokens more")
    generator = np.random.default_rng(0)
    for what, kept_bytes in (("without reuse", 0), ("with reuse", 1 << 30)):
        decoder = OnnxDecoder(graph, max_rows=4, prefix_cache_bytes=kept_bytes)
        asked = [named(decoder, generator) for _ in range(ROUNDS + 1)]
        columns = []
        for each in asked:
            further = continued(each, decoder, generator)
            columns.append([first_token_ms(decoder, each) for each in (each, each, further)])
        medians = [statistics.median(column) for column in zip(*columns[1:], strict=True)]
        print(f"{what:24} {medians[0]:15.2f} {medians[1]:15.2f} {medians[2]:15.2f}")


def burst(graph: Path, max_prefill_tokens: int) -> tuple[list[float], list[float]]:
    """Return CPU milliseconds between two tokens of a running answer, and to the first token of each joining prompt."""
    decoder = OnnxDecoder(graph, max_rows=RUNNING + JOINING)
    generator = np.random.default_rng(0)
    batcher = Batcher(decoder, Limits(max_prefill_tokens=max_prefill_tokens))
    under_way = [Sequence("", prompt(decoder, generator), Sampling(100), end_id=-1) for _ in range(RUNNING)]
    joining = [Sequence("", prompt(decoder, generator), Sampling(ANSWER), end_id=-1) for _ in range(JOINING)]
    for each in under_way:
        batcher.submit(each)
    while batcher.waiting or batcher.running < RUNNING:
        batcher.iterate()
    for each in joining:
        batcher.submit(each)
    started = before = time.process_time()
    between, firsts = [], []
    while any(each.generated < ANSWER for each in joining):
        events = batcher.iterate()
        now = time.process_time()
        if any(event.sequence is under_way[0] for event in events):
            between.append((now - before) * 1e3)
            before = now
        firsts += [(now - started) * 1e3 for event in events if event.sequence in joining and event.generated == 1]
    return between, firsts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--max-prefill-tokens", type=int, nargs="+", default=[VISUAL + TEXT, 160, 512])
    given = parser.parse_args()
    graph = given.repository / "llm" / "1" / "model.onnx"
    reuse(graph)
    print(f"\n{JOINING} prompts join {RUNNING} answers, CPU ms")
    print("   max prefill tokens  between tokens: median   max  first token: median  last")
    for most in given.max_prefill_tokens:
        between, firsts = burst(graph, most)
        figures = [statistics.median(between), max(between), statistics.median(firsts), max(firsts)]
        print(f"{most:21} {figures[0]:23.1f} {figures[1]:5.0f} {figures[2]:20.0f} {figures[3]:5.0f}")


if __name__ == "__main__":
    main()
