"""What is asked, and when. Pure: no clock, no I/O, the same seed gives the same requests.

An image is a number: equal numbers are equal bytes. Numbers below KNOWN were asked about before the measurement began.

    cold          every question brings an image never seen
    follow_up     every question is about a known image, by its id where the system has ids
    mixed         a share of follow-ups, the rest cold
    multi_image   every question brings several images never seen
    repeat        every question brings its image's bytes, drawn from IMAGES by Zipf's law
    same          every question brings the bytes of one image, at first never seen
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

KNOWN = 16  # images that follow-ups are about
IMAGES = 200  # of `repeat`
Shape = Literal["cold", "follow_up", "mixed", "multi_image", "repeat", "same"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One question."""

    images: tuple[int, ...]
    question: int  # which one; the asker takes it modulo what it has
    follow_up: bool  # the image may be named by its id
    cancel_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked. Its name in reports is `label`."""

    SHAPES: ClassVar = get_args(Shape)

    shape: Shape
    share: float = 0.5  # of follow-ups in `mixed`
    images: int = 4  # of one question in `multi_image`
    zipf: float = 1.1  # exponent of `repeat`
    cancels: float = 0.0  # share of requests whose client hangs up
    cancel_within_s: float = 1.0

    @property
    def label(self) -> str:
        follow_ups = round(100 * self.share)
        return f"mixed_{follow_ups}_{100 - follow_ups}" if self.shape == "mixed" else self.shape


def asks(workload: Workload, seed: int, first_new: int) -> Iterator[Ask]:
    """Without end. New images are numbered from `first_new`, which is KNOWN at the least.

    The share of `mixed` is kept at every moment, not only on average: two systems that answer differently many
    requests in the same time were asked the same mixture.
    """
    if first_new < KNOWN:
        raise ValueError(f"new images are numbered from {KNOWN}, not {first_new}: those below are known")
    rng = np.random.default_rng(seed)
    popularity = zipf(IMAGES, workload.zipf)
    new, owed, number = first_new, 0.0, 0
    while True:
        match workload.shape:
            case "follow_up":
                follow_up = True
            case "mixed":
                owed += workload.share
                follow_up = owed >= 1 - 1e-9
                owed -= follow_up
            case _:
                follow_up = False
        if workload.shape == "repeat":
            images = (first_new + int(rng.choice(IMAGES, p=popularity)),)
        elif workload.shape == "same":
            images = (first_new,)
        elif follow_up:
            images = (int(rng.integers(KNOWN)),)
        else:
            count = workload.images if workload.shape == "multi_image" else 1
            images = tuple(range(new, new + count))
            new += count
        cancelled = rng.random() < workload.cancels
        cancel_after_s = float(rng.uniform(0, workload.cancel_within_s)) if cancelled else None
        yield Ask(images, number, follow_up, cancel_after_s)
        number += 1


def zipf(images: int, exponent: float) -> np.ndarray:
    """[images], the chance of each rank: 1 / rank^exponent, normed."""
    weights = 1.0 / np.arange(1, images + 1) ** exponent
    return weights / weights.sum()


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Arrival times in seconds of a Poisson process of `rate` requests/s, without end."""
    rng = np.random.default_rng(seed)
    at_s = 0.0
    while True:
        at_s += float(rng.exponential(1 / rate))
        yield at_s


def bursts(size: int, every_s: float) -> Iterator[float]:
    """`size` requests at once, every `every_s` seconds, without end."""
    number = 0
    while True:
        yield from [number * every_s] * size
        number += 1
