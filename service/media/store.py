"""Keep images as they were sent, so that later questions can name their ids."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Self

from blake3 import blake3

from service.core.errors import NotFound
from service.media.header import header_size
from service.settings import IMAGE_ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Image:
    """An image as it was sent."""

    data: bytes
    digest: str  # blake3 of `data`, 64 hexadecimal digits

    @classmethod
    def of(cls, data: bytes) -> Self:
        return cls(data, blake3(data).hexdigest())

    @property
    def id(self) -> str:
        return f"img_{self.digest[:32]}"

    def larger_than(self, size: int) -> bool:
        """Whether a side has more pixels; true if the header does not say."""
        told = header_size(self.data)
        return told is None or max(told) > size


class ImageStore:
    """Keep images by id in memory, bounded in bytes. The least recently used image is evicted first.

    An image expires `ttl_s` after it was sent. It counts IMAGE_ENTRY_BYTES more than its own bytes, so that the number
    of tiny images is bounded too. `now` is in seconds since the epoch.
    """

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.nbytes = 0
        self._kept: OrderedDict[str, tuple[Image, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, image: Image, now: float) -> float:
        """Keep the image -> the time when it expires. Sending it again starts its time again."""
        self._drop(image.id)
        expires_at = now + self.ttl_s
        self._kept[image.id] = image, expires_at
        self.nbytes += len(image.data) + IMAGE_ENTRY_BYTES
        while self.nbytes > self.max_bytes or self._first_expires_at() <= now:
            self._drop(next(iter(self._kept)))
        return expires_at

    def get(self, image_id: str, now: float) -> Image:
        """Return an image. Raises NotFound for an id that is unknown, expired or evicted."""
        image, expires_at = self._kept.get(image_id, (None, 0.0))
        if image is None or expires_at <= now:
            self._drop(image_id)
            raise NotFound(
                f"image {image_id[:64]!r} is not in memory: it was not sent to this server, expired after "
                f"{self.ttl_s:.0f} s, or was evicted; send it again with POST /v1/images",
                param="image",
                code="image_not_found",
            )
        self._kept.move_to_end(image_id)
        return image

    def _first_expires_at(self) -> float:
        """Return when the least recently used image expires."""
        _, expires_at = next(iter(self._kept.values()))
        return expires_at

    def _drop(self, image_id: str) -> None:
        image, _ = self._kept.pop(image_id, (None, 0.0))
        if image is not None:
            self.nbytes -= len(image.data) + IMAGE_ENTRY_BYTES
