"""Make pictures for image files that are not scenes."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image as Pillow

RNG = np.random.default_rng(0)


def picture(width: int = 224, height: int = 224) -> Pillow.Image:
    """Draw smooth colours, brighter to the right, so that a turned picture is another one."""
    noise = RNG.integers(0, 255, (8, 8, 3), np.uint8)
    smooth = Pillow.fromarray(noise).resize((width, height), Pillow.Resampling.BICUBIC)
    ramp = np.linspace(0, 1, width)[None, :, None]
    return Pillow.fromarray((np.asarray(smooth) * ramp).astype(np.uint8))


def encoded(image: Pillow.Image, kind: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
