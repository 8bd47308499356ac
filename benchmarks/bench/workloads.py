"""Generate the benchmark's requests and arrival times.

The functions are pure: no clock, no I/O, and the same seed gives the same requests. An image is a number; equal numbers
are equal bytes. Images below KNOWN are asked about before the measurement begins.

    cold          every question has a new image
    follow_up     every question is about a known image, by its id if the system has ids
    mixed         a share of follow-ups, the rest cold
    multi_image   every question has several new images
    repeat        every question has its image's bytes, drawn from IMAGES by Zipf's law
    same          every question has the bytes of the same image, which is new at first
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

KNOWN = 16  # images that follow-ups are about
IMAGES = 200  # images in `repeat`
Shape = Literal["cold", "follow_up", "mixed", "multi_image", "repeat", "same"]


@dataclass(frozen=True, slots=True)
class Ask:
    """One question."""

    images: tuple[int, ...]
    question: int  # question number; the asker takes it modulo its number of questions
    follow_up: bool  # the image may be named by its id
    cancel_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """The kind of requests. Its name in reports is `label`."""

    SHAPES: ClassVar = get_args(Shape)

    shape: Shape
    share: float = 0.5  # share of follow-ups in `mixed`
    images: int = 4  # images per question in `multi_image`
    zipf: float = 1.1  # exponent of `repeat`
    cancels: float = 0.0  # share of requests whose client hangs up
    cancel_within_s: float = 1.0

    @property
    def label(self) -> str:
        follow_ups = round(100 * self.share)
        return f"mixed_{follow_ups}_{100 - follow_ups}" if self.shape == "mixed" else self.shape


def asks(workload: Workload, seed: int, first_new: int) -> Iterator[Ask]:
    """Generate requests without end. New images are numbered from `first_new`, at least KNOWN.

    `mixed` keeps its share at every moment, not only on average. Two systems that answer different numbers of requests
    in the same time therefore get the same mixture.
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
    """Return the probability of each rank [images]: 1 / rank^exponent, normalised."""
    weights = 1.0 / np.arange(1, images + 1) ** exponent
    return weights / weights.sum()


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Yield arrival times in seconds of a Poisson process of `rate` requests/s, without end."""
    rng = np.random.default_rng(seed)
    at_s = 0.0
    while True:
        at_s += float(rng.exponential(1 / rate))
        yield at_s


def bursts(size: int, every_s: float) -> Iterator[float]:
    """Yield arrival times of `size` requests at once, every `every_s` seconds, without end."""
    number = 0
    while True:
        yield from [number * every_s] * size
        number += 1
