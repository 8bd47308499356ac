"""The scenes that the service is measured on: `python -m build_engines.scenes.held_out` writes benchmarks/scenes.

Their seeds are used nowhere else. Split `new`: scenes of the training world. Split `held_out_pairs`: every question
depends on an object whose colour-shape pair never occurs in training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from build_engines.scenes.questions import TYPES, Question, ask
from build_engines.scenes.render import render
from build_engines.scenes.world import HELD_OUT, Thing, World, sample_scene

SEED = 2026
NEW, PAIRS = "new", "held_out_pairs"
QUALITY = 90  # WebP
DIRECTORY = Path(__file__).parents[2] / "benchmarks" / "scenes"


@dataclass(frozen=True)
class HeldOutScene:
    name: str
    split: str
    pixels: np.ndarray
    things: list[Thing]
    questions: list[Question]


def held_out_scenes(split: str, number: int) -> Iterator[HeldOutScene]:
    """The same scenes every time: the first 250 of 1,000 are the 250 that are shipped."""
    for index in range(number):
        rng = np.random.default_rng((SEED, (NEW, PAIRS).index(split), index))
        things = sample_scene(rng, World(held_out=split == PAIRS))
        questions: dict[str, Question] = {}
        for kind in TYPES:
            for _ in range(24):
                question = ask(rng, things, kind)
                if question is not None and (split == NEW or _about_a_held_out_pair(question, things, index)):
                    questions[question.text] = question
                    break
        pixels = render(things, rng).pixels
        yield HeldOutScene(f"{split}_{index:03d}.webp", split, pixels, things, list(questions.values()))


def _about_a_held_out_pair(question: Question, things: list[Thing], index: int) -> bool:
    """Existence is asked half and half; a count of zero is about nothing."""
    if question.type == "exist" and question.answer != ("yes", "no")[index % 2]:
        return False
    return question.answer != "0" and any((things[i].colour, things[i].shape) in HELD_OUT for i in question.asked)


def write(directory: Path = DIRECTORY, new: int = 280, pairs: int = 130) -> None:
    """Images as WebP, questions as JSON lines: image, question, answer, type, split."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for split, number in ((NEW, new), (PAIRS, pairs)):
        for scene in held_out_scenes(split, number):
            Image.fromarray(scene.pixels).save(directory / scene.name, "WEBP", quality=QUALITY, method=6)
            lines += [
                {"image": scene.name, "question": q.text, "answer": q.answer, "type": q.type, "split": split}
                for q in scene.questions
            ]
    (directory / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    write()
