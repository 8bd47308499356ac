"""Choose the frames of a clip that show something new, by their features. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from service.core.vision import VisionFeatures, dense

# The least difference that keeps a frame. Chosen with the reference model's encoder, on pairs of neighbouring frames of
# 36 clips of build_engines/scenes/clips.py (12 frames each, with noise of 2 grey levels, saved as JPEG of quality 80):
# none of 296 pairs without a change reaches it (the largest is 0.026), and 96 of 100 pairs with a change do.
LEAST_CHANGE = 0.05
CHANGED_PATCHES = 4  # a frame has changed as much as this many of its patches have at least: one cell's


class Change(NamedTuple):
    """A frame that shows something new."""

    place: int  # among the frames that are compared
    by: float  # its difference from the last frame that showed something new


def difference(one: VisionFeatures, other: VisionFeatures) -> float:
    """Return how much two frames differ: 0 if they are equal, 2 at most.

    That is 1 minus the cosine of a patch's features, at the patch with the CHANGED_PATCHES-th largest value: a thing
    that moves changes a few patches, and their mean would hardly tell. CLS is left out.
    """
    a, b = (dense(frame.features)[1:].astype(np.float32) for frame in (one, other))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = np.divide((a * b).sum(1), lengths, where=lengths > 0, out=np.ones_like(lengths))
    return float(max(0.0, 1 - np.partition(cosines, CHANGED_PATCHES - 1)[CHANGED_PATCHES - 1]))


def changes_of(frames: Sequence[VisionFeatures]) -> list[Change]:
    """Find the frames that differ from the last one found, in order. The first one is always among them."""
    found = [Change(0, np.inf)]
    for place, frame in enumerate(frames[1:], 1):
        by = difference(frames[found[-1].place], frame)
        if by >= LEAST_CHANGE:
            found.append(Change(place, by))
    return found


def largest(changes: Sequence[Change], most: int) -> list[int]:
    """Return the places of at most so many changes, the largest ones, in order."""
    return sorted(change.place for change in sorted(changes, key=lambda change: -change.by)[:most])
