"""Parse numbers of a command line that must be above 0: `type=` of argparse."""

from __future__ import annotations

import argparse
import math


def count(said: str) -> int:
    """Parse a whole number of at least 1. Raises argparse.ArgumentTypeError."""
    try:
        number = int(said)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{said} is not a whole number of at least 1")
    return number


def above_zero(said: str) -> float:
    """Parse a finite number above 0. Raises argparse.ArgumentTypeError."""
    try:
        number = float(said)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{said} is not a number above 0")
    return number
