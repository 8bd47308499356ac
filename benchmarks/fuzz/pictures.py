"""Real files of every format that the service takes, in the variants that encoders write, and of some that it refuses.

All are small, so that a campaign spends its time on many files and not on many pixels.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
from PIL import Image

from benchmarks.bombs import png_chunk
from benchmarks.pictures import encoded
from service.core.vision import UInt8Array

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def noise(width: int, height: int, seed: int = 0) -> UInt8Array:
    """[height, width, 3] uint8 RGB: smooth colours, brighter to the right."""
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return (np.asarray(smooth) * np.linspace(0.2, 1, width)[None, :, None]).astype(np.uint8)


def interlaced_png(pixels: UInt8Array) -> bytes:
    """An RGB PNG in Adam7's seven passes, which Pillow reads and does not write."""
    rows = [
        b"\0" + row.tobytes()
        for top, left, down, right in ADAM7
        for row in pixels[top::down, left::right]
        if row.size
    ]  # fmt: skip
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return PNG_SIGNATURE + b"".join([
        png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(b"".join(rows))), png_chunk(b"IEND"),
    ])  # fmt: skip


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a scene"
    return exif


@cache
def files() -> Mapping[str, bytes]:
    """Files by name; the name begins with the format's."""
    rgb = Image.fromarray(noise(96, 64))
    large = Image.fromarray(noise(640, 480, 1))
    tiny = Image.fromarray(noise(9, 7, 2))
    clear = rgb.copy()
    clear.putalpha(Image.linear_gradient("L").resize(rgb.size))
    frames = [Image.fromarray(noise(96, 64, seed)) for seed in range(3, 6)]
    palette = rgb.quantize(32)
    grey16 = Image.fromarray(noise(96, 64)[:, :, 0].astype(np.uint16) * 257)
    profile = bytes(range(256)) * 4
    animated = {"save_all": True, "append_images": frames, "duration": 40}
    jpeg: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "baseline": (rgb, {}),
        "whole colours": (rgb, {"subsampling": 0, "quality": 95}),
        "grey": (rgb.convert("L"), {}),
        "cmyk": (rgb.convert("CMYK"), {}),
        "restarts": (rgb, {"restart_marker_rows": 1}),
        "progressive": (rgb, {"progressive": True}),
        "progressive grey": (rgb.convert("L"), {"progressive": True}),
        "large": (large, {"quality": 80}),
        "large progressive": (large, {"progressive": True, "quality": 80}),
        "exif": (rgb, {"exif": _exif(6), "comment": b"a scene", "icc_profile": profile}),
        "tiny": (tiny, {}),
    }
    png: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "colours": (rgb, {}),
        "clear": (clear, {}),
        "grey": (rgb.convert("L"), {}),
        "grey clear": (clear.convert("LA"), {}),
        "palette": (palette, {"transparency": 3}),
        "bits": (rgb.convert("1"), {}),
        "16 bits": (grey16, {}),
        "large": (large, {}),
        "animated": (rgb, animated),
        "exif": (rgb, {"exif": _exif(8), "icc_profile": profile}),
        "tiny": (tiny, {}),
    }
    webp: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "lossy": (rgb, {}),
        "lossless": (rgb, {"lossless": True}),
        "clear": (clear, {}),
        "clear lossless": (clear, {"lossless": True}),
        "large": (large, {}),
        "animated": (rgb, animated),
        "exif": (rgb, {"exif": _exif(3), "icc_profile": profile, "xmp": b"<x:xmpmeta/>"}),
        "tiny": (tiny, {"lossless": True}),
    }
    gif: dict[str, tuple[Image.Image, dict[str, object]]] = {
        "still": (palette, {}),
        "plain": (palette, {"interlace": 0}),
        "clear": (palette, {"transparency": 3, "comment": b"a scene"}),
        "animated": (palette, animated | {"append_images": [frame.quantize(16) for frame in frames], "loop": 0}),
        "large": (large.quantize(256), {}),
        "bits": (rgb.convert("1"), {}),
    }
    others: dict[str, Callable[[], bytes]] = {
        kind: lambda kind=kind: encoded(rgb, kind) for kind in ("ICO", "PPM", "TGA", "JPEG2000")
    }
    made = {
        f"{kind} {name}": encoded(picture, kind, **options)
        for kind, variants in (("JPEG", jpeg), ("PNG", png), ("WEBP", webp), ("GIF", gif))
        for name, (picture, options) in variants.items()
    }
    made["PNG interlaced"] = interlaced_png(noise(33, 21, 7))
    made |= {kind: encoded(rgb, kind) for kind in ("AVIF", "BMP", "TIFF")}
    made |= {f"other {kind}": make() for kind, make in others.items()}
    return MappingProxyType(made)
