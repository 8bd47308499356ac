"""A JPEG may be decoded at a fraction of its size, but never so small that what is seen changes."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image as Pillow

from service.media.decoder import ImageLimits, decode

LIMITS = ImageLimits(max_bytes=4_000_000, max_pixels=8_000_000)


def detailed(width: int, height: int) -> bytes:
    """A JPEG whose detail lies just within what a view of 224 pixels can show."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(columns * (2 * np.pi * 80 / width)) * np.sin(rows * (2 * np.pi * 80 / height))
    colours = np.stack([waves, np.roll(waves, width // 7, axis=1), -waves], axis=2)
    out = BytesIO()
    Pillow.fromarray((127 + 120 * colours).astype(np.uint8)).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def apart(data: bytes, size: int) -> float:
    """The mean difference of the view and one of the whole decode."""
    whole = np.asarray(Pillow.open(BytesIO(data)).convert("RGB").resize((size, size), Pillow.Resampling.BICUBIC))
    view = decode(data, LIMITS, (size,)).views[size].transpose(1, 2, 0)
    return float(np.abs(view.astype(int) - whole.astype(int)).mean())


@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(448, 448, 224), (895, 895, 224), (900, 900, 224), (1790, 1790, 224), (1800, 900, 224), (900, 1800, 224),
     (1800, 1800, 448)],
)  # fmt: skip
def test_a_draft_keeps_twice_the_pixels_of_the_view_on_both_sides(width, height, size):
    """Twice stays within 2.5 of 255 levels; a draft of the view's own size is 4.5 to 14 levels apart."""
    assert apart(detailed(width, height), size) < 3.5
