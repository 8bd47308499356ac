"""Sample scenes: colours, shapes, sizes, characters and places of objects.

Three of the 48 colour-shape pairs never occur in training, neither as pixels nor as symbols. A shape of such a pair
also never gets an unnamed hue near the colour. These pairs measure whether colour and shape were learned apart.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 224
PATCH_SIZE = 14
GRID = IMAGE_SIZE // PATCH_SIZE

# Hue in degrees, saturation, value: the centre of each name's range. Objects are jittered around it.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1, 0.88, 0.84),
    "orange": (28, 0.90, 0.95),
    "yellow": (54, 0.85, 0.95),
    "green": (125, 0.75, 0.65),
    "cyan": (182, 0.75, 0.88),
    "blue": (223, 0.82, 0.85),
    "purple": (277, 0.72, 0.70),
    "pink": (332, 0.42, 0.97),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: dict[str, tuple[int, int]] = {"small": (24, 30), "medium": (38, 46), "large": (56, 68)}  # diameters in pixels
# 20 characters, drawn as capitals. No pair looks alike (no O next to 0, no B next to 8).
CHARACTERS = "0123456789aehklptuxw"
COLOUR_NAMES = tuple(COLOURS)
SIZE_NAMES = tuple(SIZES)

HELD_OUT_PAIRS = (("orange", "star"), ("blue", "triangle"), ("purple", "square"))
NONE = -1  # no character, or a colour without a name

_HELD_OUT = {(COLOUR_NAMES.index(c), SHAPES.index(s)) for c, s in HELD_OUT_PAIRS}
TRAINING_PAIRS = tuple((c, s) for c in range(8) for s in range(6) if (c, s) not in _HELD_OUT)
HELD_OUT = tuple(sorted(_HELD_OUT))
# Hues (degrees) between the names.
_UNNAMED_HUES = ((76, 96), (150, 163), (201, 206), (246, 256), (300, 312))


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes are indices into the tables above. x, y, diameter and character_height (0 without a character) are in
    pixels of the 224 view. angle is in degrees.
    """

    colour: int
    shape: int
    size: int
    character: int
    character_height: float
    x: float
    y: float
    diameter: float
    angle: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class World:
    """Settings for sampling scenes. The defaults are the world of the measured questions."""

    fewest: int = 3
    most: int = 7
    character_share: float = 0.5  # of the medium and large objects that can carry one
    unnamed_share: float = 0.0  # share of objects with an unnamed hue (training only)
    lattice_jitter: float | None = None  # pixels around patch-aligned positions (training curriculum); None: anywhere
    size_weights: tuple[float, float, float] = (0.34, 0.36, 0.30)
    held_out: bool = False  # one or two objects of the held-out pairs
    # Character heights in pixels, also on small objects. None: legible characters.
    small_print: tuple[float, float] | None = None
    repeat_share: float = 0.45  # scenes that repeat one colour, shape or pair, so that a count is not always "one"


# For measuring the closer view: characters fill less than one patch of the 224 view, and are twice as high at 448
# pixels.
SMALL_PRINT = World(size_weights=(0.6, 0.25, 0.15), character_share=0.75, small_print=(10.5, 12.0))


def legible_height(diameter: float) -> float:
    """Character height in pixels of the 224 view: at least one and a half patches."""
    return max(21.0, 0.54 * diameter)


def sample_scene(rng: np.random.Generator, world: World) -> list[Thing]:
    """Place 3 to 7 objects that do not overlap. The order carries no meaning."""
    things: list[Thing] = []
    wanted = int(rng.integers(world.fewest, world.most + 1))
    held_out = int(rng.integers(1, 3)) if world.held_out else 0
    # Some scenes repeat a theme: a colour, a shape or both.
    theme = TRAINING_PAIRS[rng.integers(len(TRAINING_PAIRS))] if rng.random() < world.repeat_share else None
    keeps_colour, keeps_shape = ((True, False), (False, True), (True, True))[int(rng.integers(3))]
    theme_share = rng.uniform(0.3, 0.95)
    for _ in range(wanted * 12):
        if len(things) == wanted:
            break
        size = int(rng.choice(3, p=world.size_weights))
        diameter = float(rng.uniform(*SIZES[SIZE_NAMES[size]]))
        place = _free_place(rng, world, diameter, things)
        if place is None:
            continue
        if len(things) < held_out:
            colour, shape = HELD_OUT[rng.integers(len(HELD_OUT))]
        else:
            colour, shape = TRAINING_PAIRS[rng.integers(len(TRAINING_PAIRS))]
            if theme is not None and rng.random() < theme_share:
                themed = (theme[0] if keeps_colour else colour, theme[1] if keeps_shape else shape)
                colour, shape = (colour, shape) if themed in _HELD_OUT else themed
        hue = _named_rgb(rng, colour)
        if rng.random() < world.unnamed_share:
            colour, hue = NONE, _unnamed_rgb(rng, shape)
        roomy = size > 0 or world.small_print is not None
        carries = roomy and SHAPES[shape] != "ring" and rng.random() < world.character_share
        character = int(rng.integers(len(CHARACTERS))) if carries else NONE
        height = legible_height(diameter) if world.small_print is None else float(rng.uniform(*world.small_print))
        things.append(
            Thing(
                colour=colour,
                shape=shape,
                size=size,
                character=character,
                character_height=height if carries else 0.0,
                x=place[0],
                y=place[1],
                diameter=diameter,
                angle=float(rng.uniform(-12, 12)),
                rgb=hue,
            )
        )
    return things


def _free_place(
    rng: np.random.Generator, world: World, diameter: float, things: list[Thing]
) -> tuple[float, float] | None:
    radius = diameter / 2
    for _ in range(8):
        x, y = (float(v) for v in rng.uniform(radius + 2, IMAGE_SIZE - radius - 2, 2))
        if world.lattice_jitter is not None:
            offset = 0.0 if round(diameter / PATCH_SIZE) % 2 else 0.5
            x, y = (
                (math.floor(v / PATCH_SIZE) + 0.5 + offset) * PATCH_SIZE
                + float(rng.uniform(-1, 1)) * world.lattice_jitter
                for v in (x, y)
            )
            if not (radius <= x <= IMAGE_SIZE - radius and radius <= y <= IMAGE_SIZE - radius):
                continue
        if all(math.hypot(x - t.x, y - t.y) > radius + t.diameter / 2 + 2 for t in things):
            return x, y
    return None


def _named_rgb(rng: np.random.Generator, colour: int) -> tuple[float, float, float]:
    hue, saturation, value = COLOURS[COLOUR_NAMES[colour]]
    return colorsys.hsv_to_rgb(
        (hue + float(rng.uniform(-6, 6))) / 360 % 1,
        min(1.0, saturation + float(rng.uniform(-0.07, 0.07))),
        min(1.0, value + float(rng.uniform(-0.07, 0.07))),
    )


def _unnamed_rgb(rng: np.random.Generator, shape: int) -> tuple[float, float, float]:
    """A hue between the names, a dark colour or a grey; never near a colour held out for this shape."""
    forbidden = [COLOURS[c][0] for c, s in HELD_OUT_PAIRS if SHAPES.index(s) == shape]
    while True:
        kind = rng.random()
        if kind < 0.15:
            value = float(rng.choice([rng.uniform(0.03, 0.12), rng.uniform(0.95, 1.0)]))
            return value, value, value
        if kind < 0.4:
            hue, saturation, value = rng.uniform(0, 360), rng.uniform(0.6, 0.95), rng.uniform(0.28, 0.42)
        else:
            low, high = _UNNAMED_HUES[rng.integers(len(_UNNAMED_HUES))]
            hue, saturation, value = rng.uniform(low, high), rng.uniform(0.6, 0.95), rng.uniform(0.6, 0.98)
        if all(min(abs(hue - f), 360 - abs(hue - f)) > 20 for f in forbidden):
            return colorsys.hsv_to_rgb(float(hue) / 360, float(saturation), float(value))
