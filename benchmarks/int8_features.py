"""Compare answers from full features with answers from int8 features.

    python -m benchmarks.int8_features            # starts its own Triton on GLIMPSE_MODEL_REPOSITORY

It asks the questions of the committed scenes. Each image is encoded once. Each question is answered greedily from these
features and from their Int8Rows. For each split it prints the share of equal answers and the share of right answers
from either, with Wilson's 95 % intervals.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np

from benchmarks.fidelity import TIMEOUT_S, Models, answer_to, own_models, steadily
from build_engines.evaluation.accuracy import NOT_IN_TOTAL, SCENES, Row, rows
from build_engines.evaluation.intervals import wilson
from service.core.request import Budget
from service.core.vision import Int8Rows, VisionFeatures, dense
from service.media.decoder import ImageLimits, decode

LIMITS = ImageLimits(10**7, 10**7)
ROWS_TIMED = 200


def right(row: Row, answer: str) -> bool:
    return answer.strip().lower() == row.answer.strip().lower()


async def ask(models: Models, row: Row, vision: VisionFeatures) -> str:
    budget = Budget(models.card.vision_tokens, models.card.default_visual_tokens)
    seen = await models.client.attend(vision, models.prompts.question(row.question), budget, TIMEOUT_S)
    return await answer_to(models, row.question, seen.visual_tokens, max_tokens=8)


async def compare(models: Models, questions: list[Row]) -> None:
    """Compare the answers of one split and print the result."""
    count: Counter[str] = Counter()
    for image, about in groupby(questions, key=lambda row: row.image):
        pixels = decode((SCENES / image).read_bytes(), LIMITS).pixels
        (exact,) = await steadily(partial(models.client.encode, pixels[np.newaxis], TIMEOUT_S))
        kept = replace(exact, features=Int8Rows.of(dense(exact.features)))
        for row in about:
            said = [await steadily(partial(ask, models, row, vision)) for vision in (exact, kept)]
            count.update(all=1, equal=said[0] == said[1], exact=right(row, said[0]), int8=right(row, said[1]))
    told = []
    for what, name in (("equal", "the same answer"), ("exact", "right in full"), ("int8", "right from int8")):
        low, high = wilson(count[what], count["all"])
        told.append(f"{name} {count[what] / count['all']:.4f} ({low:.4f} to {high:.4f})")
    print(f"{questions[0].split}, {count['all']} questions: {', '.join(told)}")
    print(f"  {exact.nbytes:,} bytes per image in full, {kept.nbytes:,} as int8")


def cost() -> None:
    """Print the milliseconds of converting to int8 and back."""
    for name, shape in (("ViT-B/14, 224 pixels", (257, 768)), ("its closer view", (1024, 768))):
        full = np.random.default_rng(0).standard_normal(shape, np.float32)
        kept = Int8Rows.of(full)
        there, back = [], []
        for _ in range(ROWS_TIMED):
            begun = time.perf_counter()
            Int8Rows.of(full)
            between = time.perf_counter()
            kept.dense()
            there.append(between - begun)
            back.append(time.perf_counter() - between)
        print(f"{name}: to int8 {np.median(there) * 1e3:.2f} ms, back {np.median(back) * 1e3:.2f} ms")


async def main() -> None:
    cost()
    async with own_models() as models:
        every = sorted(
            (row for row in rows(SCENES) if row.type != NOT_IN_TOTAL), key=lambda row: (row.split, row.image)
        )
        for _, questions in groupby(every, key=lambda row: row.split):
            await compare(models, list(questions))


if __name__ == "__main__":
    asyncio.run(main())
