"""Sample scenes: colours, shapes, sizes, characters and places of objects.

Three of the 48 colour-shape pairs never occur in training, neither as pixels nor as symbols. A shape of such a pair
also never gets an unnamed hue near the colour. These pairs measure whether colour and shape were learned apart.
"""

from __future__ import annotations

import colorsys
import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cache

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
# Of the varied renderer: other centres for the same names, as in CSS, paint programs and prints. They too are jittered.
WIDE_COLOURS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "red": ((0, 1.0, 1.0), (356, 0.85, 0.85), (0, 0.8, 0.7), (6, 0.75, 0.92)),
    "orange": ((39, 1.0, 1.0), (33, 1.0, 1.0), (24, 0.9, 0.9), (30, 0.75, 0.95)),
    "yellow": ((60, 1.0, 1.0), (51, 1.0, 1.0), (56, 0.7, 0.9), (57, 0.6, 1.0)),
    "green": ((120, 1.0, 0.5), (120, 0.75, 0.8), (120, 1.0, 1.0), (135, 0.6, 0.55), (110, 0.6, 0.7)),
    "cyan": ((180, 1.0, 1.0), (176, 0.7, 0.88), (184, 1.0, 0.78), (188, 0.6, 0.95)),
    "blue": ((240, 1.0, 1.0), (225, 0.7, 0.88), (213, 0.85, 1.0), (235, 0.9, 0.7)),
    "purple": ((300, 1.0, 0.5), (282, 1.0, 0.8), (271, 0.65, 0.6), (288, 0.6, 0.65), (266, 0.55, 0.85)),
    "pink": ((350, 0.25, 1.0), (330, 0.58, 1.0), (340, 0.35, 0.98), (322, 0.5, 0.95)),
}
# Hues (degrees) between the names.
_UNNAMED_HUES = ((76, 96), (150, 163), (201, 206), (246, 256), (300, 312))


@dataclass(frozen=True)
class Thing:
    """One object.

    Attributes are indices into the tables above. x, y, diameter and character_height (0 without a character) are in
    pixels of the 224 view. angle is in degrees. stretch is the width over the height of a circle in the view, if the
    picture was squeezed to the square; the diameter is then that of a circle of equal area.
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
    stretch: float = 1.0


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
    wide: bool = False  # pictures of many kinds (wide.py), with wider colours, free turns and fewer or more objects
    near: bool = False  # a quarter of the picture, twice as large, as the closer view shows it (training only)


# For measuring the closer view: characters fill less than one patch of the 224 view, and are twice as high at 448
# pixels.
SMALL_PRINT = World(size_weights=(0.6, 0.25, 0.15), character_share=0.75, small_print=(10.5, 12.0))
WIDE = World(fewest=1, most=9, wide=True)
WIDE_SMALL_PRINT = replace(SMALL_PRINT, fewest=1, most=9, wide=True)
FEW_SHARE = 0.3  # of the wide scenes, which have one or two objects


def legible_height(diameter: float) -> float:
    """Character height in pixels of the 224 view: at least one and a half patches."""
    return max(21.0, 0.54 * diameter)


def sample_scene(
    rng: np.random.Generator, world: World, extent: tuple[float, float] = (IMAGE_SIZE, IMAGE_SIZE)
) -> list[Thing]:
    """Place objects that do not overlap, 3 to 7 by default. The order carries no meaning.

    extent: width and height of the picture, whose pixels the places are in.
    """
    things: list[Thing] = []
    wanted = int(rng.integers(world.fewest, world.most + 1))
    if world.wide and world.fewest == 1 and rng.random() < FEW_SHARE:
        wanted = int(rng.integers(1, 3))
    held_out = int(rng.integers(1, 3)) if world.held_out else 0
    # Some scenes repeat a theme: a colour, a shape or both.
    theme = TRAINING_PAIRS[rng.integers(len(TRAINING_PAIRS))] if rng.random() < world.repeat_share else None
    keeps_colour, keeps_shape = ((True, False), (False, True), (True, True))[int(rng.integers(3))]
    theme_share = rng.uniform(0.3, 0.95)
    for _ in range(wanted * 12):
        if len(things) == wanted:
            break
        size = draw_index(rng, world.size_weights)
        diameter = float(rng.uniform(*SIZES[SIZE_NAMES[size]]))
        place = _free_place(rng, world, diameter, things, extent)
        if place is None:
            continue
        if len(things) < held_out:
            colour, shape = HELD_OUT[rng.integers(len(HELD_OUT))]
        else:
            colour, shape = TRAINING_PAIRS[rng.integers(len(TRAINING_PAIRS))]
            if theme is not None and rng.random() < theme_share:
                themed = (theme[0] if keeps_colour else colour, theme[1] if keeps_shape else shape)
                colour, shape = (colour, shape) if themed in _HELD_OUT else themed
        hue = named_rgb(rng, colour, world.wide)
        if rng.random() < world.unnamed_share:
            colour, hue = NONE, _unnamed_rgb(rng, shape, world.wide)
        roomy = size > 0 or world.small_print is not None
        carries = roomy and SHAPES[shape] != "ring" and rng.random() < world.character_share
        character = int(rng.integers(len(CHARACTERS))) if carries else NONE
        height = legible_height(diameter) if world.small_print is None else float(rng.uniform(*world.small_print))
        if world.wide and world.small_print is None:
            height *= float(rng.uniform(0.88, 1.1))
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
                angle=float(rng.uniform(-180, 180) if world.wide and rng.random() < 0.5 else rng.uniform(-12, 12)),
                rgb=hue,
            )
        )
    return things


def draw_index(rng: np.random.Generator, shares: tuple[float, ...]) -> int:
    """Draw what `rng.choice(len(shares), p=shares)` draws, in 2 µs instead of 24."""
    return bisect_right(_thresholds(shares), rng.random())


@cache
def _thresholds(shares: tuple[float, ...]) -> list[float]:
    total = np.cumsum(shares)
    return (total / total[-1]).tolist()


def _free_place(
    rng: np.random.Generator, world: World, diameter: float, things: list[Thing], extent: tuple[float, float]
) -> tuple[float, float] | None:
    radius = diameter / 2
    if 2 * (radius + 2) >= min(extent):
        return None
    for _ in range(8):
        x, y = (float(rng.uniform(radius + 2, side - (radius + 2))) for side in extent)
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


def named_rgb(rng: np.random.Generator, colour: int, wide: bool) -> tuple[float, float, float]:
    """Draw a colour of this name, each part from 0 to 1; wide: of the varied renderer."""
    if wide:
        return _wide_rgb(rng, colour)
    hue, saturation, value = COLOURS[COLOUR_NAMES[colour]]
    return colorsys.hsv_to_rgb(
        (hue + float(rng.uniform(-6, 6))) / 360 % 1,
        min(1.0, saturation + float(rng.uniform(-0.07, 0.07))),
        min(1.0, value + float(rng.uniform(-0.07, 0.07))),
    )


def _wide_rgb(rng: np.random.Generator, colour: int) -> tuple[float, float, float]:
    name = COLOUR_NAMES[colour]
    centres = (COLOURS[name], *WIDE_COLOURS[name])
    hue, saturation, value = centres[int(rng.integers(len(centres)))]
    return colorsys.hsv_to_rgb(
        (hue + float(rng.uniform(-4, 4))) / 360 % 1,
        float(np.clip(saturation + rng.uniform(-0.08, 0.08), 0.0, 1.0)),
        float(np.clip(value + rng.uniform(-0.08, 0.08), 0.0, 1.0)),
    )


def _unnamed_rgb(rng: np.random.Generator, shape: int, wide: bool = False) -> tuple[float, float, float]:
    """A hue between the names, a dark colour or a grey; never near a colour held out for this shape.

    wide: greys of any value, and never near a held-out colour of the varied renderer either.
    """
    held_out = [c for c, s in HELD_OUT_PAIRS if SHAPES.index(s) == shape]
    forbidden = [COLOURS[c][0] for c in held_out]
    if wide:
        forbidden += [hue for c in held_out for hue, _, _ in WIDE_COLOURS[c]]
        if rng.random() < 0.4:
            grey = float(rng.uniform(0.0, 1.0))
            return grey, grey, grey
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
