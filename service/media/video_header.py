"""What a video's headers say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
MAX_TRACKS = 32  # that are read; phones write up to seven


@dataclass(slots=True)
class VideoHeader:
    """Filled by a walk of the file's header."""

    width: int = 0  # of the largest picture, as stored; 0 if it does not say
    height: int = 0
    tracks: int = 0  # of pictures, sound and all else
    is_encrypted: bool = False
    is_short: bool = False  # it says that the file has more bytes than it has
    is_packed: bool = False  # its header is compressed


@dataclass(slots=True)
class Steps:
    """Bound the walk of one header: all its loops take from the same steps."""

    left: int
    is_spent: bool = False  # the walk wanted more

    def of(self, parts: Iterable[T]) -> Iterator[T]:
        """Yield the parts, one for each step, until no step is left."""
        for part in parts:
            if not self.left:
                self.is_spent = True
                return
            self.left -= 1
            yield part
