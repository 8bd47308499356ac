"""Draw scenes of the known world in another way than the models were trained on: flat colours on plain ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from build_engines.scenes.world import CHARACTERS, IMAGE_SIZE, NONE, SHAPES, Thing

OVERSAMPLE = 4
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSerif-Bold.ttf"
Points = list[tuple[float, float]]


def drawn(
    things: Sequence[Thing], rng: np.random.Generator, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)
) -> np.ndarray:
    """uint8 [height, width, 3]: things without noise, light or texture, with dark outlines in half of the scenes.

    `size` is width and height in pixels, which the things' places and sizes count too.
    """
    ground = int(rng.integers(90, 250))
    picture = Image.new("RGB", (size[0] * OVERSAMPLE, size[1] * OVERSAMPLE), (ground,) * 3)
    draw = ImageDraw.Draw(picture)
    outline = (20, 20, 20) if rng.random() < 0.5 else None
    for thing in things:
        _draw(draw, thing, (ground,) * 3, outline)
    return np.asarray(picture.resize(size, Image.Resampling.LANCZOS))


def _draw(
    draw: ImageDraw.ImageDraw, thing: Thing, ground: tuple[int, int, int], outline: tuple[int, int, int] | None
) -> None:
    x, y, radius = thing.x * OVERSAMPLE, thing.y * OVERSAMPLE, thing.diameter / 2 * OVERSAMPLE
    fill = tuple(round(255 * part) for part in thing.rgb)
    width = OVERSAMPLE if outline else 0
    box = (x - radius, y - radius, x + radius, y + radius)
    match SHAPES[thing.shape]:
        case "circle":
            draw.ellipse(box, fill, outline, width)
        case "ring":
            draw.ellipse(box, fill, outline, width)
            inner = 0.55 * radius
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), ground, outline, width)
        case shape:
            points = [(x + radius * px, y + radius * py) for px, py in OUTLINES[shape]]
            draw.polygon(points, fill, outline, width)
    if thing.character != NONE:
        dark = sum(thing.rgb) > 1.3
        font = ImageFont.truetype(str(FONT), round(thing.character_height * OVERSAMPLE / 0.73))
        text = CHARACTERS[thing.character].upper()
        draw.text((x, y), text, (15, 15, 15) if dark else (245, 245, 245), font, anchor="mm")


def _star() -> Points:
    corners = [(i, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
    return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in corners]


def _cross(arm: float = 0.34) -> Points:
    return [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]  # fmt: skip


OUTLINES: dict[str, Points] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star(),
    "cross": _cross(),
}
