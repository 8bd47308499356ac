"""Draw pages that are not square, and ask about them: objects of the reference world at places all over a page.

An object has the size in pixels that it has in a scene of 224 pixels, times the page's shorter side over 224.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
from PIL import Image

from benchmarks.other_renderer import drawn
from build_engines.scenes.questions import Question, ask
from build_engines.scenes.world import IMAGE_SIZE, SIZE_NAMES, Thing, World, sample_scene

SIZES = {
    "tall": (300, 900),
    "wide": (900, 300),
    "screen": (640, 360),
    "a4": (595, 842),
    "photo": (640, 480),
}  # width, height in pixels
KINDS = ("read", "colour", "shape", "count", "exist", "relation")
PLACES = 200  # drawn for an object before a page is given up
SIZE_WORDS = re.compile("|".join(SIZE_NAMES))  # their meaning depends on how large the page is seen


@dataclass(frozen=True)
class Page:
    """A page as a PNG, and questions about it."""

    kind: str  # of SIZES
    png: bytes
    things: tuple[Thing, ...]  # x, y, diameter and character_height in the page's pixels
    questions: tuple[Question, ...]


def pages(kind: str, count: int, rng: np.random.Generator) -> Iterator[Page]:
    """Draw pages of one of SIZES, each with a question of each of KINDS that it gives."""
    width, height = SIZES[kind]
    for _ in range(count):
        things = scattered(rng, width, height)
        pixels = drawn(things, rng, (width, height))
        out = BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        asked = (_asked(rng, seen(things, width, height), each) for each in KINDS)
        yield Page(kind, out.getvalue(), tuple(things), tuple(each for each in asked if each is not None))


def scattered(rng: np.random.Generator, width: int, height: int) -> list[Thing]:
    """Sample four to seven objects, and place them on a page so that they do not touch."""
    scale = min(width, height) / IMAGE_SIZE
    while True:
        placed: list[Thing] = []
        for thing in sample_scene(rng, World(fewest=4, character_share=0.8, size_weights=(0.2, 0.4, 0.4))):
            radius = thing.diameter / 2 * scale
            for _ in range(PLACES):
                x, y = (float(rng.uniform(radius + 3, side - radius - 3)) for side in (width, height))
                if all(math.hypot(x - t.x, y - t.y) > radius + t.diameter / 2 + 4 for t in placed):
                    placed.append(
                        replace(thing, x=x, y=y, diameter=2 * radius, character_height=thing.character_height * scale)
                    )
                    break
        if len(placed) >= 4:
            return placed


def seen(things: list[Thing], width: int, height: int) -> list[Thing]:
    """The objects at their places in the smallest view of the page, the padded square of 224 pixels.

    A question is asked with every fit, so offsets must be clear there.
    """
    scale = IMAGE_SIZE / max(width, height)
    return [replace(thing, x=thing.x * scale, y=thing.y * scale) for thing in things]


def _asked(rng: np.random.Generator, things: list[Thing], kind: str) -> Question | None:
    for _ in range(20):
        question = ask(rng, things, kind)
        if question is not None and not SIZE_WORDS.search(question.text):
            return question
    return None
