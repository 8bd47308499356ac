"""Generate the groups of images that the service is measured on.

`python -m build_engines.scenes.held_out_several` writes build_engines/evaluation/several. The seeds of these groups are
used nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from build_engines.scenes.balance import Balance
from build_engines.scenes.held_out import SEED
from build_engines.scenes.questions import Question
from build_engines.scenes.several import SEVERAL_KINDS, SeveralScene, ask_several, draw_several
from build_engines.scenes.world import World

SEVERAL = "several"
SPLIT = 4  # of the seeds; 0 to 2 are the splits of single images, 3 is that of the clips
SIZES = (2, 2, 3, 2, 4)  # images of a group, in turn
COMMITTED = 60  # groups
QUESTIONS_OF_A_KIND = 1  # of a group
QUALITY = 85  # WebP
DIRECTORY = Path(__file__).parents[1] / "evaluation" / SEVERAL


@dataclass(frozen=True)
class HeldOutGroup:
    """Two to four images, the names of their files, and the questions about them."""

    names: list[str]
    scenes: list[SeveralScene]
    questions: list[Question]


def held_out_groups(number: int = COMMITTED, first: int = 0) -> Iterator[HeldOutGroup]:
    """Yield the same groups every time. Kinds and answers are balanced over the groups so far.

    `first` is the first one's seed.
    """
    balances = {size: Balance(SEVERAL_KINDS, most=max(COMMITTED, number)) for size in SIZES}
    for index in range(first, first + number):
        rng = np.random.default_rng((SEED, SPLIT, index))
        size = SIZES[index % len(SIZES)]
        scenes = draw_several(rng, World(), size)
        questions = balances[size].choose(partial(ask_several, rng, scenes), len(SEVERAL_KINDS), QUESTIONS_OF_A_KIND)
        names = [f"{SEVERAL}_{index:03d}_{place + 1}.webp" for place in range(size)]
        yield HeldOutGroup(names, scenes, questions)


def write(directory: Path = DIRECTORY, number: int = COMMITTED) -> None:
    """Write the images, and last the questions as JSON lines: images, question, answer, type, split."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for group in held_out_groups(number):
        for name, scene in zip(group.names, group.scenes, strict=True):
            Image.fromarray(scene.pixels).save(directory / name, "WEBP", quality=QUALITY, method=6)
        lines += [
            {"images": group.names, "question": q.text, "answer": q.answer, "type": q.type, "split": SEVERAL}
            for q in group.questions
        ]
    (directory / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    write()
