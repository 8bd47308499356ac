"""Choose the frames of a clip that show something new, by their features. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from service.core.vision import FloatArray, Int8Rows, VisionFeatures

# The least difference that keeps a frame. Chosen with the reference model's encoder, on pairs of neighbouring frames of
# 36 clips of build_engines/scenes/clips.py (12 frames each, with noise of 2 grey levels, saved as JPEG of quality 80):
# none of 296 pairs without a change reaches it (the largest is 0.026), and 96 of 100 pairs with a change do.
LEAST_CHANGE = 0.05
CHANGED_PATCHES = 4  # a frame has changed as much as this many of its patches have at least: one cell's


class Change(NamedTuple):
    """A frame that shows something new."""

    place: int  # among the frames that are compared
    by: float  # its difference from the last frame that showed something new


def directions(frame: VisionFeatures) -> FloatArray:
    """Return the patches' features [256, D], each of length 1, in FP32. NaN for a patch without a direction.

    CLS is left out. The scales of rows that were kept as int8 are left out too: they change no direction.
    """
    rows = frame.features.values if isinstance(frame.features, Int8Rows) else frame.features
    patches = rows[1:].astype(np.float32)
    with np.errstate(invalid="ignore"):  # 0 / 0, and an infinity by its length
        shares: FloatArray = patches / np.linalg.norm(patches, axis=1, keepdims=True)
    return shares


def difference(one: FloatArray, other: FloatArray) -> float:
    """Return how much two frames differ by their `directions`: 0 if they are equal, 2 at most.

    That is 1 minus the cosine of a patch's features, at the patch with the CHANGED_PATCHES-th largest value: a thing
    that moves changes a few patches, and their mean would hardly tell. A patch without a direction does not differ.
    """
    cosines = np.nan_to_num(np.einsum("pd,pd->p", one, other), nan=1.0)
    return float(max(0.0, 1 - np.partition(cosines, CHANGED_PATCHES - 1)[CHANGED_PATCHES - 1]))


def changes_of(frames: Sequence[VisionFeatures]) -> list[Change]:
    """Find the frames that differ from the last one found, in order. The first one is always among them.

    It takes milliseconds a frame: run it in a thread.
    """
    found = [Change(0, np.inf)]
    last, kept = frames[0], directions(frames[0])
    for place, frame in enumerate(frames[1:], 1):
        if frame is last:  # frames with equal pixels have the same features
            continue
        shown = directions(frame)
        by = difference(kept, shown)
        if by >= LEAST_CHANGE:
            found.append(Change(place, by))
            last, kept = frame, shown
    return found


def largest(changes: Sequence[Change], most: int) -> list[int]:
    """Return the places of at most so many changes, the largest ones, in order."""
    return sorted(change.place for change in sorted(changes, key=lambda change: -change.by)[:most])
