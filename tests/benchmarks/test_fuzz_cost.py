"""The search for the costliest image sends what decoders take, and reads the CPU time of the process that decodes."""

from __future__ import annotations

from io import BytesIO

import pytest
from PIL import Image

from benchmarks.bombs import BOMBS
from benchmarks.fuzz.cost import fitting, grain, one, png_of
from benchmarks.fuzz.pictures import encoded


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(("colours", "depth"), [(0, 1), (0, 16), (2, 8), (3, 8), (4, 8), (6, 8), (6, 16)])
@pytest.mark.parametrize("filtered", [0, 1, 4])
def test_a_png_of_any_kind_is_whole(colours, depth, filtered, interlaced):
    data = png_of(37, 21, colours, depth, filtered, 9, interlaced)
    with Image.open(BytesIO(data), formats=["PNG"]) as picture:
        picture.load()
        assert picture.size == (37, 21)
        assert bool(picture.info.get("interlace")) is interlaced


def test_the_largest_file_that_fits_is_taken():
    assert len(fitting(lambda megabytes: bytes(megabytes * 1_000_000), range(30, 0, -3))) == 18_000_000


async def test_a_larger_image_costs_more_cpu_time():
    small, word = await one(encoded(grain(64, 64, 8), "PNG"))
    large, _ = await one(encoded(grain(2000, 2000, 8), "PNG", compress_level=1))
    assert word == "decoded"
    assert 0 <= small < 0.05 < large < 2.0


async def test_a_bomb_costs_next_to_nothing():
    seconds, word = await one(BOMBS["1,000 empty scans"]())
    assert word.startswith("InvalidImage")
    assert seconds < 0.2
