"""Pictures for the tests of media, and limits that they fit."""

from __future__ import annotations

from benchmarks.pictures import encoded, picture
from service.media.decoder import ImageLimits

LIMITS = ImageLimits(max_bytes=2_000_000, max_pixels=4_000_000)

__all__ = ["LIMITS", "encoded", "picture"]
