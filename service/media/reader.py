"""Decode and hash images and clips off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from service.core.viewport import Viewport
from service.core.vision import IMAGE_SIZE
from service.media.clip import DecodedClip, decode_clip
from service.media.decoder import Decoded, ImageLimits
from service.media.document import decode_page
from service.media.store import Image
from service.media.workers import CpuSpent, DecodingWorkers, uncounted

INLINE_HASH_BYTES = 1_000_000  # below this, hashing (about 0.25 ms a megabyte) is cheaper than a thread


class ImageReader:
    """Decode and hash in a few threads of its own. Pillow releases the GIL. Nothing stops a thread that decodes."""

    def __init__(self, limits: ImageLimits, threads: int) -> None:
        self.limits = limits
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def begin_decode(
        self, data: bytes, views: Sequence[int] = (IMAGE_SIZE,), viewport: Viewport | None = None, page: int = 1
    ) -> asyncio.Future[Decoded]:
        """Begin to decode in a thread -> that work, which may raise InvalidImage, TooLarge."""
        return asyncio.get_running_loop().run_in_executor(
            self._threads, decode_page, data, self.limits, views, viewport, page
        )

    async def decode_clip(self, data: bytes, most: int) -> DecodedClip:
        """Decode at most so many of a clip's frames in a thread. Raises InvalidImage, TooLarge."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, decode_clip, data, self.limits, most)

    async def identify(self, data: bytes) -> Image:
        """Hash the bytes. It does not check that they are an image."""
        if len(data) <= INLINE_HASH_BYTES:
            return Image.of(data)
        return await asyncio.get_running_loop().run_in_executor(self._threads, Image.of, data)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class WorkerReader(ImageReader):
    """Decode in processes, which are ended when a file costs too much or the service stops; hash in threads."""

    def __init__(self, limits: ImageLimits, workers: int, cpu_s: float, spent: CpuSpent = uncounted) -> None:
        super().__init__(limits, threads=1)
        self.workers = DecodingWorkers(limits, workers, cpu_s, spent=spent)

    def start(self) -> None:
        """Start the processes on the running event loop. The first image does so too."""
        self.workers.start()

    async def begin_decode(
        self, data: bytes, views: Sequence[int] = (IMAGE_SIZE,), viewport: Viewport | None = None, page: int = 1
    ) -> asyncio.Future[Decoded]:
        """Wait for a process, which then decodes -> that work, which goes on if its caller leaves.

        Both may raise InvalidImage, TooLarge, Unavailable.
        """
        return await self.workers.begin_decode(data, views, viewport, page)

    async def decode_clip(self, data: bytes, most: int) -> DecodedClip:
        """`most` is at most MAX_FRAMES. Raises InvalidImage, TooLarge, Unavailable."""
        return await self.workers.decode_clip(data, most)

    def close(self) -> None:
        super().close()
        self.workers.close()
