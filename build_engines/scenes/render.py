"""Render a scene's pixels, and record which patch shows which object."""

from __future__ import annotations

import functools
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from build_engines.scenes.world import CHARACTERS, GRID, IMAGE_SIZE, NONE, PATCH_SIZE, SHAPES, Thing, legible_height

_OVERSAMPLE = 3
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_FONT_FILES = ("DejaVuSans-Bold.ttf", "DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf")
_CAPITAL_HEIGHT = 0.729  # of the font size, DejaVu
_OUTLINE = 1.2  # pixels of the 224 view around a legible character; less for small print


@dataclass(frozen=True)
class Picture:
    """Pixels of a scene and the patches of its objects.

    pixels: [side, side, 3] uint8 RGB. coverage: [things, 16, 16] float32, the share of each 224-view patch that an
    object fills.
    """

    pixels: np.ndarray
    coverage: np.ndarray


def render(things: list[Thing], rng: np.random.Generator, scale: int = 1) -> Picture:
    """Draw the objects on a textured, noisy, unevenly lit background.

    The image is 224 * `scale` pixels wide and high. It takes about 3 ms at scale 1 and 10 ms at scale 2.
    """
    side = IMAGE_SIZE * scale
    canvas = background(rng, scale)
    coverage = np.zeros((len(things), GRID, GRID), np.float32)
    for index, thing in enumerate(things):
        draw(canvas, coverage[index], thing, rng, scale)
    canvas *= light(rng, side)
    canvas += noise(rng, float(rng.uniform(2, 9)), side)
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    return Picture(pixels, coverage)


def overview(pixels: np.ndarray) -> np.ndarray:
    """[side, side, 3] uint8 -> [224, 224, 3], resized as in the gateway."""
    return np.asarray(Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def crops(pixels: np.ndarray) -> np.ndarray:
    """The closer view [448, 448, 3] uint8 -> its quarters [4, 224, 224, 3], row by row."""
    quarters = pixels.reshape(2, IMAGE_SIZE, 2, IMAGE_SIZE, 3).transpose(0, 2, 1, 3, 4)
    return quarters.reshape(4, IMAGE_SIZE, IMAGE_SIZE, 3)


def compressed(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Compress the pixels as JPEG or WebP, like shipped scenes and uploads. About 2 ms."""
    buffer = io.BytesIO()
    if rng.random() < 0.7:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(80, 96)))
    else:
        Image.fromarray(pixels).save(buffer, "WEBP", quality=int(rng.integers(80, 96)), method=0)
    return np.asarray(Image.open(buffer).convert("RGB"))


def background(rng: np.random.Generator, scale: int) -> np.ndarray:
    """[side, side, 3] float32 in 0..255: a dull colour with blotches and sometimes stripes or checks."""
    value, tint = rng.uniform(70, 215), rng.uniform(-16, 16, 3)
    cells = int(rng.integers(4, 40))
    blotches = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32)).resize(
        (IMAGE_SIZE * scale, IMAGE_SIZE * scale), Image.Resampling.BILINEAR
    )
    texture = np.asarray(blotches) * rng.uniform(4, 20)
    axis = np.arange(IMAGE_SIZE * scale, dtype=np.float32) / np.float32(scale)
    kind = rng.random()
    if kind < 0.25:
        angle, period = rng.uniform(0, math.pi), rng.uniform(8, 50)
        wave = math.cos(angle) * axis[None] + math.sin(angle) * axis[:, None]
        texture = texture + np.sin(wave * (2 * math.pi / period)) * rng.uniform(4, 18)
    elif kind < 0.4:
        width = rng.uniform(8, 40)
        texture = texture + ((axis[None] // width + axis[:, None] // width) % 2 - 0.5) * rng.uniform(6, 30)
    canvas = (value + texture)[..., None] + tint
    return canvas.astype(np.float32)


def light(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3] gains: brightness, a slope across the image, and a slight colour cast."""
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    slope = rng.uniform(-0.1, 0.1, 2)
    plane = rng.uniform(0.85, 1.12) * (1 + slope[0] * axis[None] + slope[1] * axis[:, None])
    return (plane[..., None] * (1 + rng.uniform(-0.04, 0.04, 3))).astype(np.float32)


@functools.cache
def _noise_tile(side: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((side * 2, side * 2, 3)).astype(np.float32)


def noise(rng: np.random.Generator, amplitude: float, side: int) -> np.ndarray:
    """Take a random window of one large tile of Gaussian noise, which is ten times faster than new noise."""
    top, left = (int(v) for v in rng.integers(0, side, 2))
    return _noise_tile(side)[top : top + side, left : left + side] * amplitude


def draw(canvas: np.ndarray, shares: np.ndarray, thing: Thing, rng: np.random.Generator, scale: int) -> None:
    """Blend one object into the canvas and its [16, 16] patch shares, both in place."""
    image_side = IMAGE_SIZE * scale
    outline_width = _OUTLINE * scale * min(1.0, thing.character_height / legible_height(0))
    thing = replace(
        thing,
        x=thing.x * scale,
        y=thing.y * scale,
        diameter=thing.diameter * scale,
        character_height=thing.character_height * scale,
    )
    half = math.ceil(thing.diameter / 2) + 2
    left, top = math.floor(thing.x) - half, math.floor(thing.y) - half
    side = 2 * half + 1
    centre = ((thing.x - left) * _OVERSAMPLE, (thing.y - top) * _OVERSAMPLE)
    mask = _shape_mask(thing, side, centre)
    fill = np.array(thing.rgb, np.float32) * 255
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    slope = rng.uniform(-0.1, 0.1, 2)
    shade = 1 + slope[0] * axis[None] + slope[1] * axis[:, None]
    layers = [(mask, fill[None, None] * shade[..., None])]
    if thing.character != NONE:
        dark_ink = rng.random() < 0.5
        ink, outline = (12.0, 245.0) if dark_ink else (245.0, 12.0)
        body, edge = _character_masks(thing, side, centre, outline_width, rng)
        layers += [(edge, np.full((1, 1, 3), outline, np.float32)), (body, np.full((1, 1, 3), ink, np.float32))]
    # The window may reach beyond the image's border by the margin.
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(image_side, top + side), min(image_side, left + side)
    window = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    region = canvas[y0:y1, x0:x1]
    for alpha, colour in layers:
        share = alpha[window][..., None]
        region += share * (np.broadcast_to(colour, (side, side, 3))[window] - region)
    union = mask if len(layers) == 1 else np.maximum(mask, layers[1][0])
    shares[:] = patch_shares(union, (left, top), scale)


def patch_shares(mask: np.ndarray, corner: tuple[int, int], scale: int) -> np.ndarray:
    """The share of each patch, float32 [16, 16], that a mask [side, side] fills whose left top corner is there."""
    left, top = corner
    image_side, patch = IMAGE_SIZE * scale, PATCH_SIZE * scale
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(image_side, top + len(mask)), min(image_side, left + len(mask))
    whole = np.zeros((image_side, image_side), np.float32)
    whole[y0:y1, x0:x1] = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    shares: np.ndarray = whole.reshape(GRID, patch, GRID, patch).mean(axis=(1, 3))
    return shares


def _shape_mask(thing: Thing, side: int, centre: tuple[float, float]) -> np.ndarray:
    """[side, side] float32 in [0, 1], antialiased."""
    image = Image.new("L", (side * _OVERSAMPLE, side * _OVERSAMPLE))
    draw = ImageDraw.Draw(image)
    radius = thing.diameter / 2 * _OVERSAMPLE
    cx, cy = centre
    name = SHAPES[thing.shape]
    if name in ("circle", "ring"):
        draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=255)
        if name == "ring":
            hole = radius * 0.54
            draw.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=0)
    else:
        turn = math.radians(thing.angle)
        cos, sin = math.cos(turn), math.sin(turn)
        draw.polygon(
            [(cx + radius * (x * cos - y * sin), cy + radius * (x * sin + y * cos)) for x, y in outline_of(name)],
            fill=255,
        )
    return np.asarray(image.reduce(_OVERSAMPLE), np.float32) / 255


@functools.cache
def outline_of(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners in units of the radius, y down."""
    if shape == "square":
        a = 0.84
        return ((-a, -a), (a, -a), (a, a), (-a, a))
    if shape == "triangle":
        return ((0, -0.95), (1.0, 0.8), (-1.0, 0.8))
    if shape == "star":
        return tuple(
            (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5) + 0.04)
            for k in range(10)
            for r in ((1.06, 0.45)[k % 2],)
        )
    w = 0.34  # cross
    return (
        *((-w, -1.0), (w, -1.0), (w, -w), (1.0, -w), (1.0, w), (w, w)),
        *((w, 1.0), (-w, 1.0), (-w, w), (-1.0, w), (-1.0, -w), (-w, -w)),
    )


@functools.cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / file), size)


def _character_masks(
    thing: Thing, side: int, centre: tuple[float, float], outline_width: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The character and its outline: two [side, side] float32 masks in [0, 1]."""
    size = round(thing.character_height / _CAPITAL_HEIGHT * _OVERSAMPLE)
    font = _font(_FONT_FILES[int(rng.integers(len(_FONT_FILES)))], size)
    text = CHARACTERS[thing.character].upper()
    x, y = centre[0], centre[1] + (0.12 * thing.diameter * _OVERSAMPLE if SHAPES[thing.shape] == "triangle" else 0)
    y += size * _CAPITAL_HEIGHT / 2  # anchor "ms": middle of the base line
    masks = []
    for stroke in (0, round(outline_width * _OVERSAMPLE)):
        image = Image.new("L", (side * _OVERSAMPLE, side * _OVERSAMPLE))
        ImageDraw.Draw(image).text((x, y), text, fill=255, font=font, anchor="ms", stroke_width=stroke)
        turned = image.rotate(-thing.angle, Image.Resampling.NEAREST, center=centre)
        masks.append(np.asarray(turned.reduce(_OVERSAMPLE), np.float32) / 255)
    return masks[0], masks[1]
