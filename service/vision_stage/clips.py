"""Know the frames of clips: which ones a file has, and which of them show something new.

A clip that was decoded before is not decoded again to know which frames are looked at: with their features in the
cache, nothing of it is decoded.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

from blake3 import blake3

from service.core.frames import MAX_FRAMES
from service.core.prompt import Question
from service.core.request import Request
from service.core.vision import Frame, SeenClip, VisionFeatures
from service.media.clip import DecodedClip, DecodedFrame, spaced
from service.media.store import Image, LoadedClip
from service.vision_stage.changes import Change
from service.vision_stage.plan import Film, Look

K = TypeVar("K")
V = TypeVar("V")
MOST_KNOWN = 4096  # clips whose frames are remembered; 32 frames take about 5 kB


@dataclass(slots=True, eq=False, weakref_slot=True)
class Reel:
    """The decoded frames of one file, for all requests that need them at this moment. They are decoded once."""

    decoded: DecodedClip | None = None
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def load(self, decode: Callable[[], Awaitable[DecodedClip]]) -> DecodedClip:
        async with self._lock:
            if self.decoded is None:
                self.decoded = await decode()
        return self.decoded


class Latest(Generic[K, V]):
    """The MOST_KNOWN values that were used last."""

    def __init__(self) -> None:
        self._kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def keep(self, key: K, value: V) -> None:
        self._kept[key] = value
        self._kept.move_to_end(key)
        if len(self._kept) > MOST_KNOWN:
            self._kept.popitem(last=False)


class ClipMemory:
    """Remember which frames clips have. Made once by the pipeline, for all variants.

    Tenants share it without shares of their own. Each of a tenant's entries costs a decode in its turn, and an entry
    that it pushes out costs another tenant one decode: what features are known stays in the feature cache.
    """

    def __init__(self) -> None:
        self._frames: Latest[tuple[str, int], tuple[Frame, ...]] = Latest()  # by digest and most
        self._changes: Latest[bytes, tuple[Change, ...]] = Latest()
        self._reels: WeakValueDictionary[tuple[str, int], Reel] = WeakValueDictionary()

    def reel(self, digest: str, most: int) -> Reel:
        """Return the reel of at most so many frames of a file. It lasts as long as a request holds it."""
        return self._reels.setdefault((digest, most), Reel())

    def frames(self, digest: str, most: int) -> tuple[Frame, ...] | None:
        """Return the frames of a file that was decoded before, at most so many; None for another file."""
        return self._frames.get((digest, most))

    def keep(self, file: Image, most: int, decoded: DecodedClip) -> tuple[Frame, ...]:
        """Remember the frames of a decoded file -> the same frames."""
        frames = frames_of(file, decoded.frames)
        self._frames.keep((file.digest, most), frames)
        return frames

    def changes(self, key: bytes) -> tuple[Change, ...] | None:
        """Return which of some frames show something new, if they were compared before."""
        return self._changes.get(key)

    def keep_changes(self, key: bytes, changes: Sequence[Change]) -> tuple[Change, ...]:
        """Remember which of some frames show something new -> the same."""
        kept = tuple(changes)
        self._changes.keep(key, kept)
        return kept


def changed_key(fingerprint: str, frames: Sequence[Frame]) -> bytes:
    """Make a key of everything that decides which frames show something new."""
    return blake3("\0".join([fingerprint, *(frame.digest for frame in frames)]).encode()).digest()


def frames_of(file: Image, decoded: Sequence[DecodedFrame]) -> tuple[Frame, ...]:
    """Name the frames of a file for the caches. Frames with equal pixels have the name of the first one of them."""
    first: dict[bytes, int] = {}
    last_s = decoded[-1].time_s
    frames = []
    for place, frame in enumerate(decoded):
        index = first.setdefault(blake3(frame.pixels.data).digest(), frame.index)
        at = frame.time_s / last_s if last_s > 0 else place / max(len(decoded) - 1, 1)
        frames.append(Frame(frame.index, frame.time_s, at, f"{file.digest}#{index}"))
    return tuple(frames)


def most_found(request: Request, most: int) -> int:
    """Return among how many frames, at most, `most` are chosen."""
    return MAX_FRAMES if request.clip is not None and request.clip.sampling == "change" else most


def given_frames(clip: LoadedClip, most: int) -> tuple[Frame, ...]:
    """Choose at most so many frames of a clip that came as images, evenly spaced."""
    count = len(clip.images)
    return tuple(
        Frame(index, None, index / max(count - 1, 1), clip.images[index].digest, clip.images[index].id)
        for index in spaced(count, most)
    )


@dataclass(slots=True)
class Shown:
    """The clip of one request: the frames that are looked at, and the looks at them."""

    clip: LoadedClip
    most: int  # of its frames are found; then fewer may be chosen
    question: Question
    is_joined: bool  # the frames are attended to together
    frames: tuple[Frame, ...] = ()
    looks: dict[str, Look] = field(default_factory=dict)  # by digest: equal frames are looked at once
    is_reduced: bool = False  # fewer frames are looked at than the request allows, because of load
    seen: SeenClip | None = None
    reel: Reel | None = None  # held so that what was decoded lasts as long as the request looks
    film: Film | None = field(init=False)

    def __post_init__(self) -> None:
        self.film = None if self.clip.file is None else Film(self.clip.file, self.most)

    @property
    def sent(self) -> list[Image]:
        """Return the clip's file, or the images of the frames that are looked at."""
        if self.clip.file is not None:
            return [self.clip.file]
        return [self.clip.images[frame.index] for frame in self.frames]

    @property
    def vision(self) -> list[VisionFeatures]:
        """Return the features of each frame, once the looks have found them."""
        found = (self.looks[frame.digest].vision for frame in self.frames)
        return [each for each in found if each is not None]

    def look(self, *, is_read: bool) -> None:
        """Begin a look at each different frame. What earlier looks found of its features is kept."""
        before, self.looks = self.looks, {}
        for frame in self.frames:
            if frame.digest in self.looks:
                continue
            file = self.clip.file
            image = self.clip.images[frame.index] if file is None else replace(file, digest=frame.digest)
            look = Look(frame.index, image, self.question, is_frame=True, film=self.film, is_read=is_read)
            if frame.digest in before:
                look.vision = before[frame.digest].vision
            self.looks[frame.digest] = look
