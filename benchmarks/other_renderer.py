"""Draw scenes of the known world in another way than the models were trained on, with code of its own.

`drawn` is one way, on plain ground. `KINDS` are many: grounds, outlines, fonts, shapes of the picture, what cameras and
files do, few objects, small print. Only the sampled objects come from build_engines/scenes.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont

from build_engines.scenes.world import (
    CHARACTERS,
    COLOUR_NAMES,
    IMAGE_SIZE,
    NONE,
    SHAPES,
    SMALL_PRINT,
    Thing,
    World,
    sample_scene,
)

OVERSAMPLE = 4
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONT = FONTS / "DejaVuSerif-Bold.ttf"
AILERON = "Aileron"  # the font in Pillow
# Training sees the first two, and none of the others.
SMALL_PRINT_FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "STIXGeneralBol.ttf", "cmtt10.ttf", AILERON)
OTHER_FONTS = SMALL_PRINT_FONTS[2:]
CSS = {
    "red": ("red", "crimson", "firebrick"),
    "orange": ("orange", "darkorange"),
    "yellow": ("yellow", "gold"),
    "green": ("green", "forestgreen", "limegreen"),
    "cyan": ("cyan", "darkturquoise"),
    "blue": ("blue", "mediumblue", "royalblue"),
    "purple": ("purple", "darkviolet", "rebeccapurple"),
    "pink": ("pink", "lightpink", "hotpink"),
}
PADDING = (128, 128, 128)
Points = Sequence[tuple[float, float]]
Colour = tuple[int, int, int]
Ground = Callable[[np.random.Generator, tuple[int, int], Sequence[Thing]], Image.Image]
Wear = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True)
class Kind:
    """A way to draw. Widths in pixels of the 224 view; size in pixels of the picture."""

    ground: Ground
    size: tuple[int, int] = (448, 448)
    outline: float = 0.0
    ink_outline: float = 0.0
    fonts: Sequence[str] = ("DejaVuSans-Bold.ttf",)
    turned: bool = False
    css: bool = False
    padded: bool = False  # to the square, by the sender
    wear: Wear | None = None
    world: World = World()  # noqa: RUF009  (frozen)
    whole_count: bool = False  # also ask how many objects there are


def sampled(rng: np.random.Generator, kind: Kind) -> list[Thing]:
    """Sample the objects of a picture, with places in a picture of the kind's shape and of area 224 * 224."""
    ratio = math.sqrt(kind.size[0] / kind.size[1])
    things = sample_scene(rng, kind.world, (IMAGE_SIZE * ratio, IMAGE_SIZE / ratio))
    if kind.turned:
        things = [replace(thing, angle=float(rng.uniform(0, 360))) for thing in things]
    if kind.css:
        names = [CSS[COLOUR_NAMES[thing.colour]] for thing in things]
        drawn_names = [each[int(rng.integers(len(each)))] for each in names]
        rgbs = [tuple(part / 255 for part in ImageColor.getrgb(name)[:3]) for name in drawn_names]
        things = [replace(thing, rgb=(r, g, b)) for thing, (r, g, b) in zip(things, rgbs, strict=True)]
    return things


def pictured(rng: np.random.Generator, kind: Kind, things: Sequence[Thing]) -> Image.Image:
    """Draw the objects, of any size and shape of picture."""
    width, height = kind.size
    unit = math.sqrt(width * height) / IMAGE_SIZE * OVERSAMPLE
    image = kind.ground(rng, kind.size, things).resize(
        (width * OVERSAMPLE, height * OVERSAMPLE), Image.Resampling.BILINEAR
    )
    draw = ImageDraw.Draw(image)
    font = kind.fonts[int(rng.integers(len(kind.fonts)))]
    for thing in things:
        if SHAPES[thing.shape] == "ring":
            _draw_ring(image, thing, unit, kind.outline)
        else:
            draw.polygon(_turned(thing, unit), _rgb(thing))
            _draw_outline(draw, _turned(thing, unit), kind.outline * unit)
        if thing.character != NONE:
            _write(draw, thing, unit, font, kind.ink_outline)
    image = image.resize(kind.size, Image.Resampling.LANCZOS)
    if kind.wear is not None:
        image = kind.wear(image, rng)
    if kind.padded:
        side = max(image.size)
        square = Image.new("RGB", (side, side), PADDING)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
    return image


def _rgb(thing: Thing) -> Colour:
    red, green, blue = (round(255 * part) for part in thing.rgb)
    return red, green, blue


def _turned(thing: Thing, unit: float, size: float = 1.0) -> list[tuple[float, float]]:
    corners = CIRCLE if SHAPES[thing.shape] in ("circle", "ring") else OUTLINES[SHAPES[thing.shape]]
    angle, radius = math.radians(thing.angle), thing.diameter / 2 * unit * size
    cos, sin = math.cos(angle), math.sin(angle)
    return [
        (thing.x * unit + radius * (x * cos - y * sin), thing.y * unit + radius * (x * sin + y * cos))
        for x, y in corners
    ]


def _draw_outline(draw: ImageDraw.ImageDraw, corners: Points, width: float) -> None:
    if width:
        draw.line([*corners, corners[0], corners[1]], (0, 0, 0), round(width), joint="curve")


def _draw_ring(image: Image.Image, thing: Thing, unit: float, outline: float) -> None:
    """Draw through a mask, so that the ground shows in the hole."""
    rim, hole = _turned(thing, unit), _turned(thing, unit, 0.55)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).polygon(rim, 255)
    ImageDraw.Draw(mask).polygon(hole, 0)
    image.paste(_rgb(thing), mask=mask)
    for edge in (rim, hole):
        _draw_outline(ImageDraw.Draw(image), edge, outline * unit)


def _write(draw: ImageDraw.ImageDraw, thing: Thing, unit: float, font: str, outline: float) -> None:
    bright = float(np.dot(thing.rgb, (0.3, 0.59, 0.11))) > 0.5
    ink, around = ((10, 10, 10), (245, 245, 245)) if bright else ((245, 245, 245), (10, 10, 10))
    size = thing.character_height * unit / 0.72
    face = ImageFont.load_default(round(size)) if font == AILERON else ImageFont.truetype(FONTS / font, round(size))
    down = 0.15 * thing.diameter * unit if SHAPES[thing.shape] == "triangle" and abs(thing.angle) <= 12 else 0.0
    place = (thing.x * unit, thing.y * unit + down)
    text = CHARACTERS[thing.character].upper()
    draw.text(place, text, ink, face, "mm", stroke_width=round(outline * unit), stroke_fill=around)


def plain(*colours: Colour) -> Ground:
    """One of these colours: the one that differs most from every object."""

    def ground(rng: np.random.Generator, size: tuple[int, int], things: Sequence[Thing]) -> Image.Image:
        order = [colours[int(i)] for i in rng.permutation(len(colours))]
        shown = np.array([thing.rgb for thing in things]) * 255
        best = max(order, key=lambda colour: min(60.0, float(np.abs(shown - np.array(colour)).max(1).min())))
        return Image.new("RGB", size, best)

    return ground


GREYS = tuple((value,) * 3 for value in (95, 120, 150, 180, 215))
TINTS = tuple(
    tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue / 12, saturation, value))
    for hue in range(12)
    for saturation, value in ((0.35, 0.95), (0.6, 0.4), (0.8, 0.75))
)
grey, white, black = plain(*GREYS), plain((255, 255, 255)), plain((0, 0, 0))
coloured = plain(*TINTS)  # type: ignore[arg-type]


def sloping(rng: np.random.Generator, size: tuple[int, int], things: Sequence[Thing]) -> Image.Image:
    """From one colour to another, top to bottom or left to right."""
    ends = [np.array(coloured(rng, (1, 1), things).getpixel((0, 0)), float) for _ in range(2)]
    down, across = np.linspace(0, 1, size[1])[:, None, None], np.linspace(0, 1, size[0])[None, :, None]
    share = down if rng.random() < 0.5 else across
    pixels = np.broadcast_to(ends[0] + share * (ends[1] - ends[0]), (size[1], size[0], 3))
    return Image.fromarray(pixels.astype(np.uint8))


def grainy(rng: np.random.Generator, size: tuple[int, int], things: Sequence[Thing]) -> Image.Image:
    """Strong coloured noise of single pixels around a grey, as of a photograph at night."""
    centre = float(np.asarray(grey(rng, (1, 1), things))[0, 0, 0])
    pixels = centre + rng.normal(0, 45, (size[1] // 2, size[0] // 2, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)


def cloudy(rng: np.random.Generator, size: tuple[int, int], things: Sequence[Thing]) -> Image.Image:
    """A photograph's spectrum: random phases whose strength falls with frequency, around a grey."""
    centre = float(np.asarray(grey(rng, (1, 1), things))[0, 0, 0])
    side = 256
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequency[0, 0] = 1.0
    shared = rng.standard_normal((side, side))
    channels = []
    for _ in range(3):
        spectrum = np.fft.fft2(shared + 0.6 * rng.standard_normal((side, side))) / frequency
        wave = np.fft.ifft2(spectrum).real
        channels.append(centre + 28 * (wave - wave.mean()) / wave.std())
    pixels = np.clip(np.stack(channels, 2), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def screen(rng: np.random.Generator, size: tuple[int, int], _: Sequence[Thing]) -> Image.Image:
    """A window with a title bar, a menu at its side and lines of small text, on a light or dark page."""
    dark = rng.random() < 0.3
    page, ink = ((32, 34, 38), (200, 200, 200)) if dark else ((250, 250, 250), (60, 60, 60))
    image = Image.new("RGB", size, page)
    draw, face = ImageDraw.Draw(image), ImageFont.truetype(FONTS / "DejaVuSans.ttf", 15)
    draw.rectangle((0, 0, size[0], 44), (70, 74, 82) if dark else (222, 225, 230))
    for button in range(3):
        draw.ellipse((14 + 22 * button, 15, 28 + 22 * button, 29), (150, 150, 150))
    draw.rectangle((0, 44, 60, size[1]), (48, 51, 57) if dark else (238, 240, 243))
    words = ("file", "edit", "view", "search results", "untitled window", "help", "saved just now", "all items")
    for top in range(60, size[1] - 30, 56):
        draw.text((75 + float(rng.uniform(0, size[0] - 240)), top), words[int(rng.integers(len(words)))], ink, face)
    return image


def blurred(sigma: float) -> Wear:
    """sigma in pixels of the 224 view."""

    def wear(image: Image.Image, _: np.random.Generator) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(sigma * math.sqrt(image.width * image.height) / IMAGE_SIZE))

    return wear


def saved(quality: int) -> Wear:
    def wear(image: Image.Image, _: np.random.Generator) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return wear


def noisy(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, np.float32) + rng.normal(0, 22, (image.height, image.width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


VIEW = (IMAGE_SIZE, IMAGE_SIZE)
KINDS: dict[str, Kind] = {
    "plain grey": Kind(grey),
    "white": Kind(white),
    "black": Kind(black),
    "coloured": Kind(coloured),
    "gradient": Kind(sloping),
    "noise behind": Kind(grainy),
    "photograph-like": Kind(cloudy),
    "black outlines": Kind(grey, outline=2.0, ink_outline=1.2),
    "turned": Kind(grey, turned=True),
    "CSS colours": Kind(grey, css=True),
    "other fonts": Kind(grey, fonts=OTHER_FONTS),
    "blur 2.5": Kind(grey, wear=blurred(2.5), size=VIEW),
    "blur 1.2": Kind(grey, wear=blurred(1.2), size=VIEW),
    "noise": Kind(grey, wear=noisy, size=VIEW),
    "JPEG 15": Kind(grey, wear=saved(15), size=VIEW),
    "JPEG 40": Kind(grey, wear=saved(40), size=VIEW),
    "112 pixels": Kind(grey, size=(112, 112)),
    "1600x1600": Kind(grey, size=(1600, 1600)),
    "640x360": Kind(grey, size=(640, 360)),
    "300x900": Kind(grey, size=(300, 900)),
    "300x900 padded": Kind(grey, size=(300, 900), padded=True),
    "screenshot 1064x918": Kind(screen, size=(1064, 918)),
    "one object": Kind(grey, world=World(fewest=1, most=1), whole_count=True),
    "two objects": Kind(grey, world=World(fewest=2, most=2), whole_count=True),
}
SMALL_KINDS: dict[str, Kind] = {
    f"{font.removesuffix('.ttf')} {'outlined' if outline else 'flat'} {side}": Kind(
        grey, (side, side), fonts=(font,), ink_outline=outline, world=SMALL_PRINT
    )
    for side in (448, 1024)
    for font in SMALL_PRINT_FONTS
    for outline in (0.6, 0.0)
}


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


def _star() -> list[tuple[float, float]]:
    corners = [(i, 1.0 if i % 2 == 0 else 0.42) for i in range(10)]
    return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in corners]


def _cross(arm: float = 0.34) -> list[tuple[float, float]]:
    return [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]  # fmt: skip


OUTLINES: dict[str, Points] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.8), (-0.95, 0.8)],
    "star": _star(),
    "cross": _cross(),
}
CIRCLE: Points = [(math.cos(k * math.pi / 32), math.sin(k * math.pi / 32)) for k in range(64)]
