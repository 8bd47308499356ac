"""How many CPU seconds one image within the limits (20 MB, 50 megapixels) costs a decoding process at most.

The candidates are files that are slow to decode and pass every check, and the known bombs.
"""

from __future__ import annotations

import resource
import sys
import zlib
from collections.abc import Callable, Mapping
from struct import pack
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from benchmarks.bombs import BOMBS, png, scans
from benchmarks.fuzz.decoders import CPU_S, VIEWS, cpu_s
from benchmarks.fuzz.pictures import ADAM7, PNG_SIGNATURE, encoded, files, noise, png_chunk
from service.core.errors import GlimpseError
from service.media.decoder import ImageLimits
from service.media.workers import DecodingWorkers

LIMITS = ImageLimits()
SIDE = 7070  # of 50 megapixels
WEBP_SIZE = (16_383, 3051)  # the longest side that WebP has
BAR_S = 2.0
ImageFile.MAXBLOCK = 4 * LIMITS.max_pixels  # Pillow's buffer must hold a progressive JPEG whole


def smooth(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(width // 8, height // 8)).resize((width, height), Image.Resampling.BILINEAR)


def grain(width: int, height: int, bits: int) -> Image.Image:
    """Random values of so many bits, on which no predictor works."""
    drawn = np.random.default_rng(0).integers(0, 1 << bits, (height, width, 3), np.uint8)
    return Image.fromarray(drawn << (8 - bits))


def fitting(make: Callable[[int], bytes], knobs: range) -> bytes:
    """The largest file within the limit of bytes; the knob's largest value first."""
    for knob in knobs:
        if len(data := make(knob)) <= LIMITS.max_bytes:
            return data
    raise ValueError("no value of the knob fits")


def png_of(width: int, height: int, colours: int, depth: int, filtered: int, level: int, interlaced: bool) -> bytes:
    """Rows that all use one filter; Paeth's (4) takes longest to undo."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    shapes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    packer, parts = zlib.compressobj(level), []
    for top, left, down, right in shapes:
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        row = (
            bytes([filtered])
            + (bytes(range(1, 252)) * (columns * channels * depth // 8 // 251 + 1))[
                : (columns * channels * depth + 7) // 8
            ]
        )
        parts += [packer.compress(row) for _ in range(rows)]
    parts.append(packer.flush())
    header = png_chunk(b"IHDR", pack(">IIBBBBB", width, height, depth, colours, 0, 0, int(interlaced)))
    palette = png_chunk(b"PLTE", bytes(768)) if colours == 3 else b""
    return PNG_SIGNATURE + header + palette + png_chunk(b"IDAT", b"".join(parts)) + png_chunk(b"IEND")


SLOW: Mapping[str, Callable[[], bytes]] = {
    "PNG, 50 megapixels, RGBA, one colour": lambda: png(SIDE, SIDE, depth=8, colours=6),
    "PNG, 50 megapixels, RGBA, Paeth": lambda: png_of(SIDE, SIDE, 6, 8, 4, 9, False),
    "PNG, 50 megapixels, RGBA, 16 bits, Paeth": lambda: png_of(SIDE, SIDE, 6, 16, 4, 9, False),
    "PNG, 50 megapixels, RGBA, interlaced": lambda: png_of(SIDE, SIDE, 6, 8, 4, 9, True),
    "PNG, 50 megapixels, RGBA, 16 bits, interlaced": lambda: png_of(SIDE, SIDE, 6, 16, 4, 9, True),
    "PNG, 50 megapixels, grey, 16 bits, interlaced": lambda: png_of(SIDE, SIDE, 0, 16, 4, 9, True),
    "PNG, 50 megapixels, palette, interlaced": lambda: png_of(SIDE, SIDE, 3, 8, 4, 9, True),
    "PNG, a side of 65,535": lambda: png_of(65_535, 762, 6, 8, 4, 9, False),
    "PNG of noise, 20 MB": lambda: fitting(
        lambda side: encoded(grain(side, side, 8), "PNG", compress_level=1), range(2570, 1000, -20)
    ),
    "JPEG, 50 megapixels, baseline": lambda: fitting(
        lambda quality: encoded(smooth(SIDE, SIDE), "JPEG", quality=quality, subsampling=0), range(95, 20, -15)
    ),
    "JPEG, 50 megapixels, progressive": lambda: fitting(
        lambda quality: encoded(smooth(SIDE, SIDE), "JPEG", quality=quality, progressive=True, subsampling=0),
        range(95, 20, -15),
    ),
    "JPEG of noise, 50 megapixels, progressive": lambda: fitting(
        lambda quality: encoded(grain(SIDE, SIDE, 8), "JPEG", quality=quality, progressive=True), range(40, 0, -8)
    ),
    "JPEG of noise, 20 MB, quality 100, progressive": lambda: fitting(
        lambda side: encoded(grain(side, side, 8), "JPEG", quality=100, progressive=True, subsampling=0),
        range(3000, 1500, -100),
    ),
    "JPEG, 50 megapixels, 16 scans": lambda: scans(SIDE, SIDE, 10),  # with the six that hold something
    "JPEG, 25 megapixels, 32 scans": lambda: scans(5000, 5000, 26),
    "WebP, 50 megapixels, lossless": lambda: encoded(smooth(*WEBP_SIZE), "WEBP", lossless=True, quality=0, method=0),
    "WebP of noise, lossless, 20 MB": lambda: fitting(
        lambda side: encoded(grain(side, side, 8), "WEBP", lossless=True, quality=0, method=0), range(2570, 1000, -40)
    ),
    "WebP of coarse noise, lossless, 20 MB": lambda: fitting(
        lambda height: encoded(grain(WEBP_SIZE[0], height, 2), "WEBP", lossless=True, quality=0, method=0),
        range(WEBP_SIZE[1], 100, -300),
    ),
    "WebP, 50 megapixels, lossy": lambda: encoded(smooth(*WEBP_SIZE), "WEBP", quality=90, method=0),
    "WebP of noise, lossy, 20 MB": lambda: fitting(
        lambda quality: encoded(grain(*WEBP_SIZE, 8), "WEBP", quality=quality, method=0), range(60, 0, -15)
    ),
    "GIF, 50 megapixels": lambda: encoded(smooth(SIDE, SIDE).quantize(16, Image.Quantize.FASTOCTREE), "GIF"),
    "GIF of noise, 20 MB": lambda: fitting(
        lambda side: encoded(grain(side, side, 8).convert("P"), "GIF"), range(4600, 1000, -200)
    ),
    "GIF, 50 megapixels, one colour": lambda: encoded(Image.new("P", (SIDE, SIDE)), "GIF"),
}


async def one(data: bytes) -> tuple[float, str]:
    """CPU seconds of a fresh decoding process for this image, and what came of it.

    A process that was ended is gone from /proc, so its seconds are those of the ended children less its start.
    """
    workers = DecodingWorkers(LIMITS, 1, CPU_S, wall_s=600.0)  # on a busy machine the usual limit would come first
    workers.start()
    (pid,) = workers.pids
    await workers.decode(files()["PNG tiny"], VIEWS)  # waits for its start
    started = cpu_s(pid)
    ended_before = _ended_cpu_s()
    try:
        await workers.decode(data, VIEWS)
        word = "decoded"
    except GlimpseError as error:
        word = f"{type(error).__name__}: {error.message[:80]}"
    spent = cpu_s(pid) - started if pid in workers.pids else _ended_cpu_s() - ended_before - started
    workers.close()
    return spent, word


def _ended_cpu_s() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime


async def measure(only: str = "") -> dict[str, Any]:
    """Every candidate whose name holds this text, the costliest first."""
    found = []
    for name, make in {**SLOW, **BOMBS}.items():
        if only not in name:
            continue
        data = make()
        seconds, word = await one(data)
        sys.stderr.write(f"{seconds:6.2f} s  {name}: {word}\n")
        found.append({"image": name, "bytes": len(data), "cpu_s": round(seconds, 2), "outcome": word})
    found.sort(key=lambda each: -float(str(each["cpu_s"])))
    return {
        "limit_cpu_s": CPU_S,
        "most_cpu_s": found[0]["cpu_s"],
        "images": found,
        "wrong": [f"{each['image']} costs {each['cpu_s']} s" for each in found if float(str(each["cpu_s"])) > BAR_S],
    }
