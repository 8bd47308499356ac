"""A process that decodes images and clips for the gateway, and that may be killed at any moment.

`python -m service.media.worker LIMITS`. The gateway's socket and the shared memory are file descriptors that LIMITS
names. A request is one packet of JSON on the socket, its file is in the memory; the pixels go back the same way.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from service.core.errors import GlimpseError
from service.core.frames import MAX_FRAMES
from service.core.viewport import Viewport
from service.core.vision import CLOSER_SIZE, IMAGE_SIZE, UInt8Array
from service.media.clip import decode_clip
from service.media.clip_header import HAS_PYAV
from service.media.decoder import ImageLimits
from service.media.document import decode_page
from service.system.heap import MIB, Heap, give_back

PR_SET_PDEATHSIG = 1
# Fresh pages cost about a tenth of a large image's time. So blocks come from the heap as far as glibc allows, and it
# keeps them until more than KEPT_BYTES are resident after an image.
HEAP = Heap(mapped_from_bytes=32 * MIB, kept_bytes=512 * MIB, arenas=2)
KEPT_BYTES = 192 * MIB
IDLE_S = 2.0  # then freed memory goes back to the system
PACKET_BYTES = 65_536
VIEWS = (IMAGE_SIZE, CLOSER_SIZE)
FRAME_BYTES = 3 * IMAGE_SIZE * IMAGE_SIZE  # of a clip
MOST_BYTES = max(sum(3 * size * size for size in VIEWS), MAX_FRAMES * FRAME_BYTES)
PIXEL_BYTES = -(-MOST_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE  # the file lies behind them
CLIP_COST = 4  # a clip may take so many times the CPU time of an image


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What one file may cost, and where the gateway is."""

    image: ImageLimits
    cpu_s: float  # of an image
    memory_bytes: int  # beyond what the idle process takes
    parent: int  # process id
    control: int  # file descriptor of the socket
    memory: int  # file descriptor of the shared memory

    @property
    def shared_bytes(self) -> int:
        return PIXEL_BYTES + self.image.max_bytes


def main(limits: WorkerLimits) -> None:
    """Answer requests until the gateway closes the socket."""
    if HAS_PYAV:
        import_module("service.media.film")  # loads FFmpeg, which the gateway does not, before the memory is limited
    end_with(limits.parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # they are meant for the gateway, which ends this process
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = address_space_bytes() + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    HEAP.take()
    gc.freeze()  # each film is followed by a garbage collection, which would look at all these modules
    control = socket.socket(fileno=limits.control)
    with control, mmap.mmap(limits.memory, limits.shared_bytes) as memory:
        control.send(b"ready")
        while packet := next_packet(control):
            begun_s = time.process_time()
            reply = answered(json.loads(packet), memory, limits)
            ended_s = time.process_time()
            control.send(json.dumps(reply | {"cpu_s": [ended_s - begun_s, ended_s]}).encode())
            if own_bytes() > KEPT_BYTES:
                give_back()


def next_packet(control: socket.socket) -> bytes:
    """Empty if the gateway has closed the socket."""
    control.settimeout(IDLE_S)
    try:
        return control.recv(PACKET_BYTES)
    except TimeoutError:
        give_back()
    control.settimeout(None)
    return control.recv(PACKET_BYTES)


def answered(request: Mapping[str, Any], memory: mmap.mmap, limits: WorkerLimits) -> dict[str, object]:
    """Decode the file in the memory, and leave its views or its frames there, one behind the other."""
    is_clip = "frames" in request
    data = memory[PIXEL_BYTES : PIXEL_BYTES + request["nbytes"]]
    try:
        # The default action of the timer's signal ends the process, whatever the decoder is doing.
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_s * (CLIP_COST if is_clip else 1))
        reply, pixels = (clip_frames if is_clip else image_views)(request, data, limits.image)
        signal.setitimer(signal.ITIMER_PROF, 0)
    except GlimpseError as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        return {
            "error": type(error).__name__,
            "message": error.message,
            "param": error.param if error.param == "page" else None,
            "code": error.code,
        }
    offset = 0
    for each in pixels:
        memory[offset : offset + each.nbytes] = each.tobytes()
        offset += each.nbytes
    return reply


Result = tuple[dict[str, object], list[UInt8Array]]  # what is told, and the pixels


def image_views(request: Mapping[str, Any], data: bytes, limits: ImageLimits) -> Result:
    views, told = request["views"], request["viewport"]
    viewport = None if told is None else Viewport(**told | {"colour": tuple(told["colour"])})
    decoded = decode_page(data, limits, views, viewport, request["page"])
    return {"size": [decoded.width, decoded.height], "pages": decoded.pages}, [decoded.views[size] for size in views]


def clip_frames(request: Mapping[str, Any], data: bytes, limits: ImageLimits) -> Result:
    clip = decode_clip(data, limits, request["frames"])
    told = {
        "size": [clip.width, clip.height],
        "duration_s": clip.duration_s,
        "frames": [[frame.index, frame.time_s] for frame in clip.frames],
        "count": clip.count,
        "times_s": clip.times_s,
    }
    return told, [frame.pixels for frame in clip.frames]


def end_with(parent: int) -> None:
    """The kernel ends this process when the gateway ends, however that happens."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        sys.exit(0)


def address_space_bytes() -> int:
    return pages()[0] * mmap.PAGESIZE


def own_bytes() -> int:
    """Resident bytes that no file backs."""
    _, resident, of_files = pages()[:3]
    return (resident - of_files) * mmap.PAGESIZE


def pages() -> list[int]:
    """As proc(5) says of /proc/PID/statm."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return [int(number) for number in file.read().split()]


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    main(WorkerLimits(ImageLimits(**told.pop("image")), **told))
