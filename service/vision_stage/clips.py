"""Know the frames of clips: which ones a file has, and which of them show something new.

A clip that was decoded before is not decoded again to know which frames are looked at: with their features in the
cache, nothing of it is decoded.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from blake3 import blake3

from service.core.frames import MAX_FRAMES
from service.core.latest import Latest
from service.core.prompt import Question
from service.core.request import Request
from service.core.vision import Frame, SeenClip, VisionFeatures
from service.media.clip import DecodedClip, DecodedFrame, choosable, spaced
from service.media.store import Image, LoadedClip
from service.vision_stage.changes import Change
from service.vision_stage.plan import Film, Look

MOST_KNOWN = 4096  # files, or pages of documents, of which something is remembered
Decode = Callable[[], Awaitable[DecodedClip]]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Reel:
    """The decoded frames of one file, for all requests that need them at this moment. They are decoded once."""

    _decoding: asyncio.Task[DecodedClip] | None = None

    def decoding(self, decode: Decode) -> tuple[asyncio.Task[DecodedClip], bool]:
        """Return the decoding, and whether it begins now. One that failed begins again.

        Do not cancel it: other requests may wait for it.
        """
        known = self._decoding
        if known is not None and not (known.done() and (known.cancelled() or known.exception() is not None)):
            return known, False
        self._decoding = asyncio.create_task(self._run(decode))
        self._decoding.add_done_callback(self._ended)
        return self._decoding, True

    def _ended(self, decoding: asyncio.Task[DecodedClip]) -> None:
        """Drop one that failed: it holds its frames, which hold this reel and the file."""
        if self._decoding is decoding and (decoding.cancelled() or decoding.exception() is not None):
            self._decoding = None

    async def _run(self, decode: Decode) -> DecodedClip:
        """A method, so that the reel lasts until the decoding ends, even if no request waits for it."""
        return await decode()


@dataclass(frozen=True, slots=True)
class Timeline:
    """The pictures of a file that can be chosen, whatever number of frames is asked for."""

    count: int  # of all pictures
    times_s: array[float]  # of those that are `choosable`; about 4 kB

    def frames(self, digest: str, most: int) -> tuple[Frame, ...]:
        """Name at most so many frames."""
        times_s = dict(zip(choosable(self.count), self.times_s, strict=True))
        wanted = spaced(self.count, most)
        return _named(digest, [(index, times_s[index]) for index in wanted], wanted)


class ClipMemory:
    """Remember which frames clips have: 32 frames take about 5 kB. Made once by the pipeline, for all variants.

    Tenants share it, and no tenant has a part of its own. An entry costs the tenant that adds it a decode, in its turn.
    An entry that is evicted costs another tenant one decode; its features stay in the feature cache.
    """

    def __init__(self) -> None:
        self._frames: Latest[tuple[str, int], tuple[Frame, ...]] = Latest(MOST_KNOWN)  # by digest and most; decoded
        self._timelines: Latest[str, Timeline] = Latest(MOST_KNOWN)  # by digest
        self._changes: Latest[bytes, tuple[Change, ...]] = Latest(MOST_KNOWN)
        self._reels: WeakValueDictionary[tuple[str, int], Reel] = WeakValueDictionary()

    def reel(self, digest: str, most: int) -> Reel:
        """Return the reel of at most so many frames of a file. It lasts as long as a request holds it."""
        return self._reels.setdefault((digest, most), Reel())

    def frames(self, digest: str, most: int) -> tuple[Frame, ...] | None:
        """Return the frames of a file that was decoded before, at most so many; None for another file.

        If that many were not decoded, each frame has a name of its own, even if its pixels equal another's.
        """
        compared, timeline = self._frames.get((digest, most)), self._timelines.get(digest)
        if compared is not None or timeline is None:
            return compared
        return timeline.frames(digest, most)

    def has_compared(self, digest: str, most: int) -> bool:
        """Return whether exactly so many frames were decoded, so that those with equal pixels have one name."""
        return self._frames.get((digest, most)) is not None

    def keep(self, file: Image, most: int, decoded: DecodedClip) -> tuple[Frame, ...]:
        """Remember the frames of a decoded file -> the same frames."""
        frames = frames_of(file, decoded.frames)
        self._timelines.keep(file.digest, Timeline(decoded.count, array("d", decoded.times_s)))
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
    names = [first.setdefault(blake3(frame.pixels.data).digest(), frame.index) for frame in decoded]
    return _named(file.digest, [(frame.index, frame.time_s) for frame in decoded], names)


def _named(digest: str, pictures: Sequence[tuple[int, float]], names: Sequence[int]) -> tuple[Frame, ...]:
    """`pictures`: the index and the time of each. `names`: the index of the picture whose name it has."""
    last_s = pictures[-1][1]
    frames = []
    for place, ((index, time_s), name) in enumerate(zip(pictures, names, strict=True)):
        at = time_s / last_s if last_s > 0 else place / max(len(pictures) - 1, 1)
        frames.append(Frame(index, time_s, at, f"{digest}#{name}"))
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


def some_of(frames: Sequence[Frame], most: int) -> tuple[Frame, ...]:
    """Choose at most so many of these frames, evenly spaced."""
    return tuple(frames[place] for place in spaced(len(frames), most))


@dataclass(slots=True)
class Shown:
    """The clip of one request: the frames that are looked at, and the looks at them."""

    clip: LoadedClip
    most: int  # of its frames are found; then fewer may be chosen
    question: Question
    is_joined: bool  # the frames are attended to together
    frames: tuple[Frame, ...] = ()
    looks: dict[str, Look] = field(default_factory=dict)  # by digest: equal frames are looked at once
    encoded_before: int = 0  # frames, by looks that others have replaced
    is_reduced: bool = False  # fewer frames are looked at than the request allows, because of load
    seen: SeenClip | None = None
    reel: Reel | None = None  # held so that what was decoded lasts until all features are found
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
        """Return the features of each frame, once the looks have found all of them."""
        found = [self.looks[frame.digest].vision for frame in self.frames]
        known = [each for each in found if each is not None]
        assert len(known) == len(found)
        return known

    @property
    def encoded(self) -> int:
        """Count the frames that were encoded for this request."""
        return self.encoded_before + sum(look.encoded for look in self.looks.values())

    def look(self, *, is_read: bool) -> None:
        """Begin a look at each different frame. What earlier looks found of its features is kept."""
        self.encoded_before = self.encoded
        before, self.looks = self.looks, {}
        for frame in self.frames:
            if frame.digest in self.looks:
                continue
            image = self.clip.file or self.clip.images[frame.index]
            look = Look(frame.index, image, self.question, frame=frame, film=self.film, is_read=is_read)
            if frame.digest in before:
                look.vision = before[frame.digest].vision
            self.looks[frame.digest] = look
