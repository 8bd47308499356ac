"""What a video's headers say."""

from __future__ import annotations

from dataclasses import dataclass

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
