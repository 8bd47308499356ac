"""Generate the scenes that the service is measured on.

`python -m build_engines.scenes.held_out` writes build_engines/evaluation/scenes. The seeds of these scenes are used
nowhere else.

- `new`: scenes of the training world.
- `held_out_pairs`: every question depends on an object whose colour-shape pair never occurs in training.
- `small_print`: 448 pixels wide and high, with characters that are too small for the 224-pixel view.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from build_engines.scenes.questions import TYPES, Question, ask
from build_engines.scenes.render import render
from build_engines.scenes.world import HELD_OUT, SMALL_PRINT, Thing, World, sample_scene

SEED = 2026
NEW, PAIRS, SMALL = "new", "held_out_pairs", "small_print"
SPLITS = (NEW, PAIRS, SMALL)
COMMITTED = {NEW: 280, PAIRS: 130, SMALL: 100}  # scenes
WORLDS = {NEW: World(), PAIRS: World(held_out=True), SMALL: SMALL_PRINT}
READ_AGAIN = 2  # additional questions about small print
QUALITY = 90  # WebP
DIRECTORY = Path(__file__).parents[1] / "evaluation" / "scenes"


@dataclass(frozen=True)
class HeldOutScene:
    """One scene with its questions.

    pixels: uint8 [224, 224, 3], or [448, 448, 3] for small print. coverage: [things, 16, 16], as in `Picture`.
    """

    name: str
    split: str
    pixels: np.ndarray
    coverage: np.ndarray
    things: list[Thing]
    questions: list[Question]


def held_out_scenes(split: str, number: int, first: int = 0, scale: int | None = None) -> Iterator[HeldOutScene]:
    """Yield the same scenes every time. The first 280 of 1,000 are the shipped 280.

    scale: side in units of 224 pixels, if it is not the one that the split is shipped at.
    """
    for index in range(first, first + number):
        rng = np.random.default_rng((SEED, SPLITS.index(split), index))
        things = sample_scene(rng, WORLDS[split])
        questions: dict[str, Question] = {}
        for kind in (*TYPES, *["read"] * (READ_AGAIN if split == SMALL else 0)):
            for _ in range(24):
                question = ask(rng, things, kind)
                if question is not None and (split != PAIRS or _about_a_held_out_pair(question, things, index)):
                    questions[question.text] = question
                    break
        picture = render(things, rng, scale or (2 if split == SMALL else 1))
        name = f"{split}_{index:03d}.webp"
        yield HeldOutScene(name, split, picture.pixels, picture.coverage, things, list(questions.values()))


def _about_a_held_out_pair(question: Question, things: list[Thing], index: int) -> bool:
    """Whether a held-out pair is asked about. Half of the existence answers are yes; a count of zero is excluded."""
    if question.type == "exist" and question.answer != ("yes", "no")[index % 2]:
        return False
    return question.answer != "0" and any((things[i].colour, things[i].shape) in HELD_OUT for i in question.asked)


def write(directory: Path = DIRECTORY, numbers: Mapping[str, int] = COMMITTED, first: int = 0) -> None:
    """Write this number of scenes of each split, starting at `first`.

    Images are WebP. The questions are written last, as JSON lines: image, question, answer, type, split.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for split, number in numbers.items():
        for scene in held_out_scenes(split, number, first):
            Image.fromarray(scene.pixels).save(directory / scene.name, "WEBP", quality=QUALITY, method=6)
            lines += [
                {"image": scene.name, "question": q.text, "answer": q.answer, "type": q.type, "split": split}
                for q in scene.questions
            ]
    (directory / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    write()
