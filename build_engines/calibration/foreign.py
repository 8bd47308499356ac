"""Make and collect out-of-distribution pictures: noise, plain colours, pages of text, photographs.

The kinds for fitting and the kinds for measuring share no photograph and no seed.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

Use = Literal["fit", "measure"]
KINDS = ("noise", "plain colour", "page of text", "photograph")
SIDES = (160, 640)  # pixels; pictures are of any size and shape between
FONTS = tuple(sorted((Path(matplotlib.get_data_path()) / "fonts" / "ttf").glob("*.ttf")))
WORDS = """
the of and to in a is that it was for on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people
"""
# Photographs that packages ship, by package and file. Half of them are for fitting, the others for measuring.
PHOTOGRAPHS: dict[Use, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "fit": (
        ("skimage/data", ("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png")),
        ("skimage/data", ("clock_motion.png", "coffee.png", "coins.png", "page.png", "ihc.png")),
    ),
    "measure": (
        ("skimage/data", ("grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png")),
        ("skimage/data", ("motorcycle_left.png", "retina.jpg", "rocket.jpg", "text.png")),
        ("sklearn/datasets/images", ("china.jpg", "flower.jpg")),
        ("matplotlib/mpl-data/sample_data", ("grace_hopper.jpg",)),
    ),
}


@dataclass(frozen=True, slots=True)
class Foreign:
    """An out-of-distribution image, as a file."""

    kind: str
    name: str
    data: bytes


def foreign(use: Use, number: int, seed: int = 0) -> Iterator[Foreign]:
    """Yield `number` pictures of each kind, the same every time."""
    for kind in KINDS:
        for index in range(number):
            rng = np.random.default_rng((seed, ("fit", "measure").index(use), KINDS.index(kind), index))
            if kind == "photograph":
                name, picture = _photograph(rng, photographs(use), index)
            else:
                name, picture = f"{kind} {index}", DRAWN[kind](rng)
            yield Foreign(kind, name, _file(picture, rng))


def _file(picture: Image.Image, rng: np.random.Generator) -> bytes:
    """Encode as JPEG or PNG, as uploads are."""
    out = io.BytesIO()
    if rng.random() < 0.6:
        picture.convert("RGB").save(out, "JPEG", quality=int(rng.integers(75, 96)))
    else:
        picture.convert("RGB").save(out, "PNG")
    return out.getvalue()


def _size(rng: np.random.Generator) -> tuple[int, int]:
    width, height = (int(side) for side in rng.integers(*SIDES, 2))
    return width, height


def _noise(rng: np.random.Generator) -> Image.Image:
    """Independent pixels or blotches, in grey or colour, of any contrast."""
    width, height = _size(rng)
    grain = int(rng.choice((1, 1, 2, 4, 8, 16)))
    channels = int(rng.choice((1, 3)))
    shape = (height // grain + 1, width // grain + 1, channels)
    centre, spread = rng.uniform(60, 195), rng.uniform(25, 120)
    drawn = (
        rng.normal(centre, spread, shape)
        if rng.random() < 0.5
        else rng.uniform(centre - spread, centre + spread, shape)
    )
    pixels = np.clip(np.broadcast_to(drawn, (*shape[:2], 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling(int(rng.choice((0, 2, 3)))))


def _plain_colour(rng: np.random.Generator) -> Image.Image:
    """One colour, or a slope from one to another."""
    width, height = _size(rng)
    first, second = rng.integers(0, 256, (2, 3))
    if rng.random() < 0.6:
        return Image.new("RGB", (width, height), tuple(int(value) for value in first))
    ramp = np.linspace(0, 1, width)[None, :, None]
    pixels = np.broadcast_to(first * (1 - ramp) + second * ramp, (height, width, 3)).astype(np.uint8)
    turned = Image.fromarray(pixels)
    return turned.rotate(90, expand=True) if rng.random() < 0.5 else turned


def _page(rng: np.random.Generator) -> Image.Image:
    """Lines of words in one of matplotlib's fonts, dark on light or light on dark."""
    width, height = (max(side, 240) for side in _size(rng))
    ink, paper = (int(rng.integers(0, 90)), int(rng.integers(200, 256)))
    if rng.random() < 0.2:
        ink, paper = paper, ink
    page = Image.new("RGB", (width, height), (paper,) * 3)
    draw, size = ImageDraw.Draw(page), int(rng.integers(9, 26))
    letters = [font for font in FONTS if "DejaVu" in font.name and "Display" not in font.name]
    font = ImageFont.truetype(letters[int(rng.integers(len(letters)))], size)
    margin = int(rng.integers(5, 30))
    for top in range(margin, height - margin, round(size * 1.4)):
        words = " ".join(rng.choice(WORDS.split(), width // size + 2))
        if rng.random() < 0.12:  # the end of a paragraph
            words = words[: len(words) // 3] + "."
        draw.text((margin, top), words[: int(1.9 * (width - 2 * margin) / size)], fill=(ink,) * 3, font=font)
    return page


DRAWN: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "noise": _noise,
    "plain colour": _plain_colour,
    "page of text": _page,
}


def photographs(use: Use) -> list[Path]:
    """List the installed files. Raises ModuleNotFoundError, which names a package that is missing."""
    return [_folder(*folder.split("/", 1)) / name for folder, names in PHOTOGRAPHS[use] for name in names]


def _photograph(rng: np.random.Generator, among: list[Path], index: int) -> tuple[str, Image.Image]:
    """Give each photograph as a whole first, then parts of them, of a third of a side or more."""
    file = among[index % len(among)]
    picture = Image.open(file).convert("RGB")
    if index >= len(among):
        share = rng.uniform(0.35, 1.0)
        width, height = round(picture.width * share), round(picture.height * share)
        left = int(rng.integers(0, picture.width - width + 1))
        top = int(rng.integers(0, picture.height - height + 1))
        picture = picture.crop((left, top, left + width, top + height))
        if rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture.thumbnail((SIDES[1], SIDES[1]))
    return f"{file.stem} {index}", picture


def _folder(package: str, inside: str) -> Path:
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            f"the photographs of {package} are not installed: run `python3 scripts/set_up.py build`"
        )
    return Path(found.origin).parent / inside
