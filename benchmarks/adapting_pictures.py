"""Write new pictures with questions, and no answers, as people have them: the data of `docs/adapting.md`'s figures.

    python -m benchmarks.adapting_pictures --out /tmp/pictures --pictures 5000

Three in ten pictures have small print and 448 pixels a side. The seeds are used for no other scenes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from build_engines.scenes.questions import TYPES, ask
from build_engines.scenes.render import render
from build_engines.scenes.world import SMALL_PRINT, World, sample_scene

SEED = 4711
SMALL_OF_TEN = 3


def write(out: Path, pictures: int) -> None:
    """Write pictures as JPEG or WebP, and questions.jsonl with one line a question: image, question."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(pictures):
        rng = np.random.default_rng((SEED, index))
        small = index % 10 < SMALL_OF_TEN
        things = sample_scene(rng, SMALL_PRINT if small else World())
        asked = {}
        for kind in (*TYPES, *(["read"] * 2 if small else [])):
            question = ask(rng, things, kind)
            if question is not None:
                asked[question.text] = question
        name = f"{index:05d}.{'jpg' if rng.random() < 0.7 else 'webp'}"
        picture = Image.fromarray(render(things, rng, 2 if small else 1).pixels)
        picture.save(out / name, quality=int(rng.integers(80, 96)))
        lines += [json.dumps({"image": name, "question": text}) + "\n" for text in asked]
    (out / "questions.jsonl").write_text("".join(lines))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--pictures", type=int, default=5000, help="number (default: %(default)s)")
    options = parser.parse_args(arguments)
    write(options.out, options.pictures)


if __name__ == "__main__":
    main()
