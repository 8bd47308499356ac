"""Small real clips and documents, in the containers and codecs that the service takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from types import MappingProxyType

import av
import numpy as np
from PIL import Image

from benchmarks.fuzz.pictures import noise

WIDTH, HEIGHT, FRAMES = 64, 48, 8
# Each name begins with the format's.
CODECS = {  # name: codec, container, its options, the codec's options
    "MP4 H.264": ("libx264", "mp4", {}, {"g": "4"}),
    "MP4 fragmented": ("libx264", "mp4", {"movflags": "frag_keyframe+empty_moov"}, {"g": "4"}),
    "MP4 H.265": ("libx265", "mp4", {}, {"x265-params": "log-level=none"}),
    "MP4 MPEG-4": ("mpeg4", "mp4", {}, {"bf": "2"}),
    "MP4 AV1": ("libsvtav1", "mp4", {}, {"preset": "12"}),
    "MP4 as MOV": ("libx264", "mov", {}, {}),
    "EBML VP8": ("libvpx", "webm", {}, {}),
    "EBML VP9": ("libvpx-vp9", "webm", {}, {"cpu-used": "8"}),
    "EBML Matroska": ("libx264", "matroska", {}, {}),
}
ANIMATIONS = {"GIF moving": ("GIF", {"duration": 100}), "WEBP moving": ("WEBP", {"duration": 100})}
DOCUMENTS = {  # of so many pages as a clip has frames
    "PDF": ("PDF", {}),
    "other TIFF": ("TIFF", {}),
    "other TIFF deflated": ("TIFF", {"compression": "tiff_adobe_deflate"}),
    "other TIFF of LZW": ("TIFF", {"compression": "tiff_lzw"}),
}


def _frames() -> list[Image.Image]:
    """What moves is brightness, from frame to frame."""
    first = noise(WIDTH, HEIGHT)
    return [Image.fromarray((first * np.linspace(0.4, 1, FRAMES)[index]).astype(np.uint8)) for index in range(FRAMES)]


@contextmanager
def usual_scheduling() -> Iterator[None]:
    """Undo what an encoder does to the thread that calls it: for root, SVT-AV1 makes it a real-time one.

    Its children would be such too, and leave no other process a turn.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def _film(codec: str, container: str, of_container: dict[str, str], of_codec: dict[str, str]) -> bytes:
    file = BytesIO()
    with usual_scheduling(), av.open(file, "w", format=container, options=of_container) as out:
        stream = out.add_stream(codec, rate=10, options=of_codec)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index, picture in enumerate(_frames()):
            frame = av.VideoFrame.from_image(picture)
            frame.pts = index
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def _saved(kind: str, options: Mapping[str, object]) -> bytes:
    file = BytesIO()
    first, *others = _frames()
    first.save(file, kind, save_all=True, append_images=others, **options)
    return file.getvalue()


@cache
def clips() -> Mapping[str, bytes]:
    """Files by name."""
    films = {name: _film(*told) for name, told in CODECS.items()}
    return MappingProxyType(films | {name: _saved(*told) for name, told in ANIMATIONS.items()})


@cache
def documents() -> Mapping[str, bytes]:
    """Files by name."""
    return MappingProxyType({name: _saved(*told) for name, told in DOCUMENTS.items()})
