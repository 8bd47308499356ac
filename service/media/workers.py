"""Decode in worker processes. A decoder reads callers' bytes, so each file has limits of CPU time, memory and time.

A worker that passes a limit ends, and another takes its place. File and pixels go through shared memory that has no
name, so nothing is left of it when the gateway ends.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import structlog

from service.core.errors import GlimpseError, InvalidImage, TooLarge, Unavailable
from service.core.viewport import Viewport
from service.core.vision import IMAGE_SIZE, UInt8Array
from service.media.clip import DecodedClip, DecodedFrame
from service.media.decoder import Decoded, ImageLimits, Media, require_bytes
from service.media.worker import CLIP_COST, FRAME_BYTES, PACKET_BYTES, PIXEL_BYTES, WorkerLimits

log = structlog.get_logger()

START_S = 30.0  # for a process to start; it takes about 0.3
WALL_S = 20.0  # for one file; a worker that is stopped or starved passes it
MEMORY_BYTES = 256 * 1024 * 1024  # for one file, and PIXEL_MEMORY_BYTES more for each pixel that is allowed
PIXEL_MEMORY_BYTES = 32  # a WebP takes 20: two canvases of 4, and 4 each for its own, Pillow's and one to resize
CHUNK_BYTES = 1024 * 1024  # copied at once, so that the event loop is not held up
CpuSpent = Callable[[float, float], None]  # CPU seconds of a file, and others of its decoder since the last file
ATTEMPTS = 2  # a worker may be ended from outside; a file that ends two is at fault
ERRORS: dict[str, type[GlimpseError]] = {error.__name__: error for error in (InvalidImage, TooLarge)}
NO_START = "the image decoder does not start: try again in a few seconds"
LESS: dict[Media, str] = {  # what a sender can do
    "image": f"send it smaller, or save it anew (the model sees {IMAGE_SIZE}x{IMAGE_SIZE} pixels)",
    "video": "send it shorter or smaller",
}
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


def uncounted(cpu_s: float, other_cpu_s: float) -> None:
    """Take the CPU seconds where nobody counts them."""


class Task(Protocol[T_co]):
    """What is decoded of a file."""

    @property
    def what(self) -> Media: ...

    @property
    def cost(self) -> int:
        """How many times the CPU time of an image it may take."""

    def told(self) -> dict[str, object]:
        """Return what the worker is told."""

    def result(self, reply: dict[str, Any], memory: mmap.mmap) -> T_co:
        """Copy the result from the shared memory."""


@dataclass(frozen=True, slots=True)
class ImageTask:
    """An image's views."""

    views: Sequence[int]
    viewport: Viewport | None = None
    page: int = 1
    what: Media = "image"
    cost: int = 1

    def told(self) -> dict[str, object]:
        viewport = None if self.viewport is None else asdict(self.viewport)
        return {"views": list(self.views), "viewport": viewport, "page": self.page}

    def result(self, reply: dict[str, Any], memory: mmap.mmap) -> Decoded:
        width, height = reply["size"]
        found: dict[int, UInt8Array] = {}
        offset = 0
        for size in self.views:
            found[size] = _pixels(memory, size, offset)
            offset += found[size].nbytes
        return Decoded(found, width, height, reply["pages"])


@dataclass(frozen=True, slots=True)
class ClipTask:
    """At most so many of a clip's frames."""

    most: int
    what: Media = "video"
    cost: int = CLIP_COST

    def told(self) -> dict[str, object]:
        return {"frames": self.most}

    def result(self, reply: dict[str, Any], memory: mmap.mmap) -> DecodedClip:
        width, height = reply["size"]
        frames = tuple(
            DecodedFrame(index, time_s, _pixels(memory, IMAGE_SIZE, place * FRAME_BYTES))
            for place, (index, time_s) in enumerate(reply["frames"])
        )
        return DecodedClip(width, height, reply["duration_s"], frames, reply["count"], tuple(reply["times_s"]))


def _pixels(memory: mmap.mmap, size: int, offset: int) -> UInt8Array:
    """[3, size, size]"""
    return np.frombuffer(memory, np.uint8, 3 * size * size, offset).reshape(3, size, size).copy()


class Worker:
    """One process, its end of the socket and the shared memory. Made and used on the event loop's thread.

    The kernel ends the process with the thread that made it.
    """

    def __init__(
        self, limits: ImageLimits, cpu_s: float, memory_bytes: int, ended: Callable[[], None], spent: CpuSpent
    ) -> None:
        """`ended` is called when the process has ended by itself, `spent` with the CPU seconds of each image."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        memory = os.memfd_create("glimpse-decode", os.MFD_CLOEXEC)
        told = WorkerLimits(limits, cpu_s, memory_bytes, os.getpid(), theirs.fileno(), memory)
        try:
            os.ftruncate(memory, told.shared_bytes)
            self._memory = mmap.mmap(memory, told.shared_bytes)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "service.media.worker", json.dumps(asdict(told))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory),
                # One thread for NumPy's algebra, which nobody uses: each takes address space.
                # And none of the settings, which may hold the password of Redis.
                env={name: value for name, value in os.environ.items() if not name.upper().startswith("GLIMPSE_")}
                | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(memory)
        ours.setblocking(False)
        self._socket = ours
        self.is_started = False
        self.is_alive = True
        self.settled = asyncio.Event()  # it has started, or has ended before
        self._ended = ended
        self._spent = spent
        self._told_cpu_s = 0.0
        self._reply: asyncio.Future[bytes] | None = None
        asyncio.get_running_loop().add_reader(ours.fileno(), self._receive)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def run(self, data: bytes, task: Task[T]) -> T | None:
        """None if the process ended meanwhile. Raises InvalidImage, TooLarge."""
        view = memoryview(data)
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            self._memory[PIXEL_BYTES + start : PIXEL_BYTES + start + len(chunk)] = chunk
            if start + CHUNK_BYTES < len(data):
                await asyncio.sleep(0)
        if not self.is_alive:
            return None
        self._reply = asyncio.get_running_loop().create_future()
        try:
            self._socket.send(json.dumps({"nbytes": len(data)} | task.told()).encode())
            packet = await self._reply
        except OSError:
            return None
        finally:
            self._reply = None
        if not packet:
            return None
        reply = json.loads(packet)
        cpu_s, total_s = reply["cpu_s"]
        self._spent(cpu_s, total_s - cpu_s - self._told_cpu_s)
        self._told_cpu_s = total_s
        if "error" in reply:
            raise ERRORS[reply["error"]](reply["message"], param=reply["param"] or task.what, code=reply["code"])
        return task.result(reply, self._memory)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Release all it holds; returns the exit status, which is minus the signal that ended it."""
        if self.is_alive:
            self._hang_up()
        self._process.kill()
        status = self._process.wait()
        self._memory.close()
        return status

    def _hang_up(self) -> None:
        self.is_alive = False
        self.settled.set()
        asyncio.get_running_loop().remove_reader(self._socket.fileno())
        self._socket.close()

    def _receive(self) -> None:
        try:
            packet = self._socket.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet == b"ready":
            self.is_started = True
            self.settled.set()
            return
        if not packet:
            self._hang_up()
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(packet)
        if not packet:
            self._ended()


class DecodingWorkers:
    """A few workers, each of which decodes one file at a time. Used from one event loop."""

    def __init__(
        self,
        limits: ImageLimits,
        count: int,
        cpu_s: float,
        wall_s: float = WALL_S,
        memory_bytes: int | None = None,
        spent: CpuSpent = uncounted,
    ) -> None:
        """`cpu_s` is for an image, the next two are for a file. `memory_bytes` is beyond what an idle worker takes."""
        self.limits = limits
        self.count = count
        self.cpu_s = cpu_s
        self.wall_s = wall_s
        self.memory_bytes = (
            MEMORY_BYTES + PIXEL_MEMORY_BYTES * limits.max_pixels if memory_bytes is None else memory_bytes
        )
        self._spent = spent
        self._workers: list[Worker] = []
        self._free: asyncio.Queue[int] = asyncio.Queue()  # places in `_workers`
        self._clip_turns = self._turns()
        self._busy: set[int] = set()
        self._jobs: set[asyncio.Task[Any]] = set()

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def start(self) -> None:
        while len(self._workers) < self.count:
            place = len(self._workers)
            self._workers.append(self._worker(place))
            self._free.put_nowait(place)

    async def decode(
        self, data: bytes, views: Sequence[int], viewport: Viewport | None = None, page: int = 1
    ) -> Decoded:
        """Raises InvalidImage, TooLarge, Unavailable."""
        return await (await self.begin_decode(data, views, viewport, page))

    async def begin_decode(
        self, data: bytes, views: Sequence[int], viewport: Viewport | None = None, page: int = 1
    ) -> asyncio.Future[Decoded]:
        """As `begin`."""
        return await self.begin(data, ImageTask(sorted(views), viewport, page))

    async def decode_clip(self, data: bytes, most: int) -> DecodedClip:
        """`most` is at most MAX_FRAMES. Raises InvalidImage, TooLarge, Unavailable."""
        return await (await self.begin(data, ClipTask(most)))

    async def begin(self, data: bytes, task: Task[T]) -> asyncio.Future[T]:
        """Wait for a worker and give it the file -> its work, which nothing stops: a caller that leaves lets it finish.

        Both may raise InvalidImage, TooLarge, Unavailable.
        """
        require_bytes(data, self.limits, task.what)
        self.start()
        async with AsyncExitStack() as turn:
            if task.what == "video":
                await turn.enter_async_context(self._clip_turns)
            place = await self._free.get()
            job = asyncio.create_task(self._run(place, data, task, turn.pop_all()))
        self._jobs.add(job)
        job.add_done_callback(self._forget)
        return asyncio.shield(job)

    def close(self) -> None:
        """End all workers at once, whatever they are doing."""
        workers, self._workers = self._workers, []
        for job in self._jobs:
            job.cancel()
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.end()
        self._free, self._clip_turns = asyncio.Queue(), self._turns()

    def _turns(self) -> asyncio.Semaphore:
        """Make the turns of clips, which may take seconds. With two workers or more, images always have one."""
        return asyncio.Semaphore(max(self.count - 1, 1))

    async def _run(self, place: int, data: bytes, task: Task[T], turn: AsyncExitStack) -> T:
        """Hold the turn until the worker is free again."""
        async with turn:
            return await self._decode(place, data, task)

    async def _decode(self, place: int, data: bytes, task: Task[T]) -> T:
        self._busy.add(place)
        try:
            for _ in range(ATTEMPTS):
                if not self._workers[place].is_alive:
                    self._replace(place)
                if (result := await self._attempt(self._workers[place], data, task)) is not None:
                    return result
            raise InvalidImage(f"the {task.what} ends its decoder: save it anew with an editor", param=task.what)
        finally:
            self._busy.discard(place)
            if self._workers:  # not closed meanwhile
                if not self._workers[place].is_alive:
                    self._replace(place)
                self._free.put_nowait(place)

    async def _attempt(self, worker: Worker, data: bytes, task: Task[T]) -> T | None:
        """None if the worker was ended and not by the file's own fault. Raises InvalidImage, TooLarge, Unavailable."""
        try:
            async with asyncio.timeout(START_S):
                await worker.settled.wait()
        except TimeoutError as exc:
            worker.end()
            raise Unavailable(NO_START) from exc
        try:
            async with asyncio.timeout(self.wall_s):
                result = await worker.run(data, task)
        except TimeoutError as exc:
            log.warning("decoder_ended", reason="time", pid=worker.pid, status=worker.end())
            raise TooLarge(f"decoding takes more than {self.wall_s:g} s: {LESS[task.what]}", param=task.what) from exc
        if result is not None:
            return result
        status = worker.end()
        log.warning("decoder_ended", reason="signal" if status < 0 else "exit", pid=worker.pid, status=status)
        if status == -signal.SIGPROF:
            cpu_s = self.cpu_s * task.cost
            self._spent(cpu_s, 0.0)
            raise TooLarge(f"decoding takes more than {cpu_s:g} s of CPU time: {LESS[task.what]}", param=task.what)
        if not worker.is_started:
            raise Unavailable(NO_START)
        return None

    def _worker(self, place: int) -> Worker:
        return Worker(self.limits, self.cpu_s, self.memory_bytes, lambda: self._revive(place), self._spent)

    def _replace(self, place: int) -> None:
        self._workers[place].end()
        self._workers[place] = self._worker(place)

    def _revive(self, place: int) -> None:
        """An idle worker was ended from outside; one that never started would end again."""
        if self._workers and place not in self._busy and self._workers[place].is_started:
            self._replace(place)

    def _forget(self, job: asyncio.Task[Any]) -> None:
        self._jobs.discard(job)
        if not job.cancelled():
            job.exception()  # the caller has it, unless it left
