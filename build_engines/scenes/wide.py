"""Draw scenes as pictures of many kinds: the varied renderer.

`render` always draws in one way, so a model that learns from it alone knows little else. Here a scene's style is drawn
at random: the aspect ratio and how the picture was fitted to the square, the ground, outlines, fonts, ink, and what a
camera or a lossy file does to it. Objects stay apart from the ground in colour, so that every question keeps one
answer. `small`, `medium` and `large` are shares of the picture's own area, however it was fitted.

The fonts are those that matplotlib brings (DejaVu, STIX and Computer Modern, all free to use and to share).
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from build_engines.scenes.render import FONTS, Picture, background, noise, outline_of, patch_shares, render
from build_engines.scenes.world import CHARACTERS, GRID, IMAGE_SIZE, NONE, SHAPES, Thing, World, sample_scene

OVERSAMPLE = 3
PADDING = 127.5  # the reference model's mean, which the gateway pads with
# Those that the other renderer of benchmarks/ measures with, such as STIX, are not among them.
FONT_FILES = (
    *("DejaVuSans-Bold.ttf", "DejaVuSans.ttf", "DejaVuSans-BoldOblique.ttf", "DejaVuSansMono-Bold.ttf"),
    *("DejaVuSansMono.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSerif.ttf", "cmb10.ttf", "cmss10.ttf"),
)
GROUNDS = {"textured": 0.2, "flat": 0.3, "gradient": 0.13, "photograph": 0.15, "noise": 0.1, "page": 0.12}
LEAST_CONTRAST = 50.0  # of 255, in at least one channel, between an object and the ground
DARK, LIGHT = 12.0, 245.0

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Frame:
    """Where a picture lies in the 224 view: its extent (of area 224 * 224) is scaled and moved there."""

    extent: tuple[float, float]
    left: float
    top: float
    scale_x: float
    scale_y: float

    def seen(self, thing: Thing) -> Thing:
        """Move an object from the picture into the view."""
        mean = math.sqrt(self.scale_x * self.scale_y)
        return replace(
            thing,
            x=self.left + thing.x * self.scale_x,
            y=self.top + thing.y * self.scale_y,
            diameter=thing.diameter * mean,
            character_height=thing.character_height * mean,
            stretch=self.scale_x / self.scale_y,
        )


@dataclass(frozen=True)
class Style:
    """What all objects of a picture share. Widths in pixels of the 224 view."""

    outline: float  # around shapes; 0 for none
    outline_colour: float
    ink_outline: float  # around characters; 0 for none
    fonts: tuple[str, ...]
    shaded: bool


def draw_scene(rng: np.random.Generator, world: World, scale: int = 1) -> tuple[list[Thing], Picture]:
    """Sample and draw a scene of any world. The picture is 224 * `scale` pixels wide and high."""
    frame = draw_frame(rng) if world.wide else None
    things = sample_scene(rng, world, frame.extent) if frame else sample_scene(rng, world)
    if frame:
        things = [frame.seen(thing) for thing in things]
    if world.near:
        things = nearer(rng, things)
    return things, paint(rng, things, scale, frame) if frame else render(things, rng, scale)


def draw_frame(rng: np.random.Generator) -> Frame:
    """Draw an aspect ratio. Most other than 1 are squeezed to the square as BLIP-2 does it, some are padded to it."""
    kind, padded = rng.random(), rng.random() < 0.35
    most = 1.0 if kind < 0.4 else 1.9 if kind < 0.75 or padded else 3.2
    ratio = float(np.exp(rng.uniform(-1, 1) * math.log(most)))
    extent = (IMAGE_SIZE * math.sqrt(ratio), IMAGE_SIZE / math.sqrt(ratio))
    if not padded:
        return Frame(extent, 0.0, 0.0, IMAGE_SIZE / extent[0], IMAGE_SIZE / extent[1])
    scale = IMAGE_SIZE / max(extent)
    left, top = ((IMAGE_SIZE - side * scale) / 2 for side in extent)
    return Frame(extent, left, top, scale, scale)


def nearer(rng: np.random.Generator, things: Sequence[Thing]) -> list[Thing]:
    """Show a quarter of the view twice as large. Sizes lose their names there, objects elsewhere are left out."""
    left, top = (float(corner) for corner in rng.integers(0, 2, 2) * IMAGE_SIZE)
    moved = [
        replace(
            thing,
            x=2 * thing.x - left,
            y=2 * thing.y - top,
            diameter=2 * thing.diameter,
            character_height=2 * thing.character_height,
            size=NONE,
        )
        for thing in things
    ]
    return [t for t in moved if all(-0.4 * t.diameter < v < IMAGE_SIZE + 0.4 * t.diameter for v in (t.x, t.y))]


def draw_style(rng: np.random.Generator) -> Style:
    return Style(
        outline=float(rng.uniform(0.7, 3.5)) if rng.random() < 0.4 else 0.0,
        outline_colour=DARK if rng.random() < 0.75 else LIGHT,
        ink_outline=float(rng.uniform(0.6, 1.6)) if rng.random() < 0.45 else 0.0,
        fonts=tuple(FONT_FILES[int(i)] for i in rng.integers(len(FONT_FILES), size=1 if rng.random() < 0.7 else 3)),
        shaded=bool(rng.random() < 0.4),
    )


def paint(rng: np.random.Generator, things: Sequence[Thing], scale: int, frame: Frame) -> Picture:
    """Draw the objects in a style of their own, then degrade the picture as cameras and files do. About 5 ms."""
    side, style = IMAGE_SIZE * scale, draw_style(rng)
    canvas = draw_ground(rng, things, scale)
    shares = [draw_thing(canvas, thing, style, rng, scale) for thing in things]
    pixels = np.clip(degraded(canvas, rng), 0, 255).astype(np.uint8)
    left, top = round(frame.left * scale), round(frame.top * scale)
    pixels = pixels.copy()
    pixels[:, :left] = pixels[:, side - left :] = pixels[:top] = pixels[side - top :] = round(PADDING)
    return Picture(pixels, np.stack(shares) if shares else np.zeros((0, GRID, GRID), np.float32))


def draw_ground(rng: np.random.Generator, things: Sequence[Thing], scale: int) -> np.ndarray:
    """[side, side, 3] float32 in 0..255, apart from every object's colour."""
    side = IMAGE_SIZE * scale
    kind = str(rng.choice(list(GROUNDS), p=np.array(list(GROUNDS.values()))))
    if kind == "textured":
        return background(rng, scale)
    first, second = _ground_colour(rng, things), _ground_colour(rng, things)
    canvas = np.broadcast_to(first, (side, side, 3)).astype(np.float32)
    if kind == "gradient":
        angle, axis = rng.uniform(0, 2 * math.pi), np.linspace(-0.5, 0.5, side, dtype=np.float32)
        way = np.clip(math.cos(angle) * axis[None] + math.sin(angle) * axis[:, None] + 0.5, 0, 1)
        return (canvas + way[..., None] * (second - first)).astype(np.float32)
    if kind == "photograph":
        return canvas + _octaves(rng, side) * np.float32(rng.uniform(8, 40))
    if kind == "noise":
        grain = int(rng.integers(1, 4)) * scale
        number, channels = side // grain + 1, 3 if rng.random() < 0.6 else 1
        cells = rng.normal(0, rng.uniform(12, 55), (number, number, channels))
        return canvas + np.kron(cells, np.ones((grain, grain, 1)))[:side, :side].astype(np.float32)
    if kind == "page":
        return _page(rng, canvas, second, scale)
    return canvas


def _ground_colour(rng: np.random.Generator, things: Sequence[Thing]) -> np.ndarray:
    """float32 [3]: black, white, a grey or a colour; the first of some draws that differs from every object."""
    colours = np.array([thing.rgb for thing in things]).reshape(-1, 3) * 255
    best, contrast = np.zeros(3, np.float32), -1.0
    for _ in range(12):
        kind = rng.random()
        if kind < 0.3:
            drawn = np.full(3, rng.choice([0.0, 255.0, rng.uniform(0, 20), rng.uniform(235, 255)]))
        elif kind < 0.65:
            drawn = np.full(3, rng.uniform(20, 235)) + rng.uniform(-10, 10, 3)
        else:
            drawn = rng.uniform(0, 255, 3)
        found = float(np.abs(colours - drawn).max(1).min()) if len(colours) else 255.0
        if found > contrast:
            best, contrast = drawn.astype(np.float32), found
        if contrast >= LEAST_CONTRAST:
            break
    return best


def _octaves(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3] float32 of deviation one: coarse blobs to fine grain, as in photographs."""
    total = np.zeros((side, side, 3), np.float32)
    for cells in (2, 5, 11, 26, 60):
        grey = rng.standard_normal((cells, cells, 1)) + 0.5 * rng.standard_normal((cells, cells, 3))
        for channel in range(3):
            octave = Image.fromarray(grey[..., channel].astype(np.float32))
            total[..., channel] += np.asarray(octave.resize((side, side), Image.Resampling.BILINEAR)) / cells**0.3
    return total / total.std()


def _page(rng: np.random.Generator, canvas: np.ndarray, second: np.ndarray, scale: int) -> np.ndarray:
    """A screen's page behind the objects: bars, boxes and lines of small text."""
    page = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    draw, side = ImageDraw.Draw(page), page.width
    colour = tuple(int(part) for part in np.clip(second, 0, 255))
    ink = (40, 40, 40) if canvas[0, 0].sum() > 380 else (215, 215, 215)
    draw.rectangle((0, 0, side, int(rng.uniform(6, 24)) * scale), fill=colour)
    if rng.random() < 0.5:
        draw.rectangle((0, 0, int(rng.uniform(6, 30)) * scale, side), fill=colour)
    font = _font(FONT_FILES[int(rng.integers(len(FONT_FILES)))], int(rng.integers(5, 9)) * scale)
    for line in range(int(rng.integers(0, 9))):
        text = "".join(chr(int(code)) for code in rng.integers(97, 123, int(rng.integers(4, 24))))
        draw.text((rng.uniform(0, side), (line + rng.random()) * side / 9), text, ink, font)
    return np.asarray(page, np.float32)


def draw_thing(canvas: np.ndarray, thing: Thing, style: Style, rng: np.random.Generator, scale: int) -> np.ndarray:
    """Blend one object into the canvas, in place. Returns its share of each patch, float32 [16, 16]."""
    stretch_x, stretch_y = math.sqrt(thing.stretch), 1 / math.sqrt(thing.stretch)
    half = math.ceil((0.53 * thing.diameter + style.outline) * scale * max(stretch_x, stretch_y) * 1.02) + 2
    left, top = math.floor(thing.x * scale) - half, math.floor(thing.y * scale) - half
    side = 2 * half + 1
    unit = OVERSAMPLE * scale
    window = Window(
        side * OVERSAMPLE,
        (thing.x * unit - left * OVERSAMPLE, thing.y * unit - top * OVERSAMPLE),
        (stretch_x, stretch_y),
    )
    body, edge = _shape_masks(thing, style.outline, window, unit)
    fill = np.array(thing.rgb, np.float32) * 255
    if style.shaded:
        axis, slope = np.linspace(-1, 1, side, dtype=np.float32), rng.uniform(-0.12, 0.12, 2)
        fill = fill * (1 + slope[0] * axis[None] + slope[1] * axis[:, None])[..., None]
    layers: list[tuple[np.ndarray, Any]] = [(body, fill)]
    if style.outline:
        layers.append((edge, style.outline_colour))
    if thing.character != NONE:
        bright = float(np.dot(thing.rgb, (0.3, 0.59, 0.11)))
        either = style.ink_outline > 0 and rng.random() < 0.5
        ink = DARK if (bright > 0.5) != either else LIGHT
        inked, around = _character_masks(thing, style, window, unit, rng)
        layers += [(around, DARK + LIGHT - ink)] if style.ink_outline else []
        layers.append((inked, ink))
    shown = np.maximum(body, edge)
    _blend(canvas, layers, (left, top))
    return patch_shares(shown, (left, top), scale)


@dataclass(frozen=True)
class Window:
    """A square around an object, in oversampled pixels: its side, the object's centre, the stretch in x and y."""

    side: int
    centre: tuple[float, float]
    stretch: tuple[float, float]

    def place(self, points: Points, radius: float, degrees: float) -> list[tuple[float, float]]:
        """Turn corners in units of the radius, then stretch and move them."""
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        (cx, cy), (sx, sy) = self.centre, self.stretch
        return [(cx + sx * radius * (x * cos - y * sin), cy + sy * radius * (x * sin + y * cos)) for x, y in points]


@functools.cache
def _round(radius: float) -> tuple[tuple[float, float], ...]:
    return tuple((radius * math.cos(k * math.pi / 24), radius * math.sin(k * math.pi / 24)) for k in range(48))


def _shape_masks(thing: Thing, outline: float, window: Window, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """The shape and its outline: two [side, side] float32 masks in [0, 1]."""
    name, radius = SHAPES[thing.shape], thing.diameter / 2 * unit
    rims = [window.place(_round(1.0) if name in ("circle", "ring") else outline_of(name), radius, thing.angle)]
    if name == "ring":
        rims.append(window.place(_round(0.54), radius, 0.0))
    body, edge = (Image.new("L", (window.side, window.side)) for _ in range(2))
    draw = ImageDraw.Draw(body)
    draw.polygon(rims[0], fill=255)
    if name == "ring":
        draw.polygon(rims[1], fill=0)
    if outline:
        for rim in rims:
            ImageDraw.Draw(edge).line([*rim, rim[0], rim[1]], 255, max(1, round(outline * unit)), joint="curve")
    return _mask(body), _mask(edge)


def _mask(image: Image.Image) -> np.ndarray:
    return np.asarray(image.reduce(OVERSAMPLE), np.float32) / 255


@functools.cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / file), size)


@functools.cache
def _capital_height(file: str) -> float:
    """Of the font size."""
    _, top, _, bottom = _font(file, 200).getbbox("H")
    return (bottom - top) / 200


def _character_masks(
    thing: Thing, style: Style, window: Window, unit: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The character and its outline: two [side, side] float32 masks in [0, 1]. It stays about upright."""
    file = style.fonts[int(rng.integers(len(style.fonts)))]
    height = thing.character_height * unit
    font, text = _font(file, round(height / _capital_height(file))), CHARACTERS[thing.character].upper()
    bold = max(0, round(float(rng.uniform(-0.6, 0.6)) * unit))  # some are thicker than the font
    tilt = math.radians(thing.angle if abs(thing.angle) <= 12 else float(rng.uniform(-12, 12)))
    down = 0.12 * thing.diameter * unit if SHAPES[thing.shape] == "triangle" and abs(thing.angle) <= 12 else 0.0
    cos, sin = math.cos(tilt), math.sin(tilt)
    (cx, cy), (sx, sy) = window.centre, window.stretch
    side = 2 * math.ceil(height)
    # From a window's pixel back to the upright, unstretched text: its centre is the shape's.
    back = (cos / sx, sin / sy, -cos * cx / sx - sin * (cy + down * sy) / sy + side / 2,
            -sin / sx, cos / sy, sin * cx / sx - cos * (cy + down * sy) / sy + side / 2)  # fmt: skip
    masks = []
    for stroke in (bold, bold + max(1, round(style.ink_outline * unit))):
        image = Image.new("L", (side, side))
        ImageDraw.Draw(image).text(
            (side / 2, side / 2 + height / 2), text, fill=255, font=font, anchor="ms", stroke_width=stroke
        )
        size = (window.side, window.side)
        masks.append(_mask(image.transform(size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR)))
    return masks[0], masks[1]


def _blend(canvas: np.ndarray, layers: Sequence[tuple[np.ndarray, Any]], corner: tuple[int, int]) -> None:
    left, top = corner
    side, image = len(layers[0][0]), len(canvas)
    y0, x0, y1, x1 = max(0, top), max(0, left), min(image, top + side), min(image, left + side)
    window = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    region = canvas[y0:y1, x0:x1]
    for mask, colour in layers:
        full = np.broadcast_to(np.asarray(colour, np.float32), (side, side, 3))
        region += mask[window][..., None] * (full[window] - region)


def degraded(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Apply none, one or two of: light, blur, fewer pixels, noise, JPEG. [side, side, 3] float32 in 0..255."""
    for way in rng.permutation(len(_WAYS))[: int(rng.choice(3, p=(0.4, 0.42, 0.18)))]:
        canvas = _WAYS[way](canvas, rng)
    return canvas


def _image(canvas: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _lit(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    axis, slope = np.linspace(-1, 1, len(canvas), dtype=np.float32), rng.uniform(-0.15, 0.15, 2)
    plane = rng.uniform(0.75, 1.15) * (1 + slope[0] * axis[None] + slope[1] * axis[:, None])
    return (canvas * plane[..., None] * (1 + rng.uniform(-0.04, 0.04, 3))).astype(np.float32)


def _blurred(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    most = 2.8 if len(canvas) == IMAGE_SIZE else 2.2  # larger pictures are for reading small print
    sigma = float(rng.uniform(0.4, most))
    return np.asarray(_image(canvas).filter(ImageFilter.GaussianBlur(sigma)), np.float32)


def _coarse(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Fewer pixels, brought back to the view's size."""
    least = 90 if len(canvas) == IMAGE_SIZE else 300  # larger pictures are for reading small print
    image, side = _image(canvas), round(rng.uniform(least, len(canvas)))
    down, up = (
        (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)[int(i)]
        for i in (rng.integers(2), rng.integers(3))
    )
    return np.asarray(image.resize((side, side), down).resize(image.size, up), np.float32)


def _noisy(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return canvas + noise(rng, float(rng.uniform(3, 26)), len(canvas))


def _jpeg(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    buffer = io.BytesIO()
    _image(canvas).save(buffer, "JPEG", quality=int(rng.integers(10, 75)))
    return np.asarray(Image.open(buffer).convert("RGB"), np.float32)


_WAYS = (_lit, _blurred, _coarse, _noisy, _jpeg)
