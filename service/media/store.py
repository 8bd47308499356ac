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


@dataclass(slots=True)
class _Kept:
    image: Image
    expires_at: dict[str, float]  # by tenant

    @property
    def nbytes(self) -> int:
        return len(self.image.data) + IMAGE_ENTRY_BYTES


class ImageStore:
    """Images by id in memory, bounded in bytes. The tenant with the most bytes loses its least recently used image.

    So one tenant's images never push out those of a tenant that holds less. An image that several tenants sent counts
    for each of them, and stays while one of them keeps it. It expires for a tenant `ttl_s` after that tenant sent it.
    It counts IMAGE_ENTRY_BYTES more than its own bytes, so that the number of tiny images is bounded too. `now` is in
    seconds of the monotonic clock, which nobody sets.
    """

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.nbytes = 0
        self._kept: dict[str, _Kept] = {}
        self._used: dict[
            str, OrderedDict[str, None]
        ] = {}  # ids by tenant, the least recently used first; none is empty
        self._held: dict[str, int] = {}  # bytes by tenant
        self._sent: OrderedDict[tuple[str, str], float] = OrderedDict()  # when (tenant, id) expires, the first first

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, image: Image, now: float, tenant: str = "") -> None:
        """Keep the image. Sending it again starts its time anew."""
        self._drop(tenant, image.id)
        kept = self._kept.setdefault(image.id, _Kept(image, {}))
        kept.expires_at[tenant] = self._sent[tenant, image.id] = now + self.ttl_s
        self._used.setdefault(tenant, OrderedDict())[image.id] = None
        self._count(tenant, kept.nbytes)
        while (first := next(iter(self._sent))) and self._sent[first] <= now:
            self._drop(*first)
        while self.nbytes > self.max_bytes:
            most = max(self._held, key=self._held.__getitem__)
            self._drop(most, next(iter(self._used[most])))

    def get(self, image_id: str, now: float) -> Image:
        """Raises NotFound for an id that is unknown, expired or evicted."""
        kept = self._kept.get(image_id)
        if kept is not None:
            for tenant, expires_at in list(kept.expires_at.items()):
                if expires_at <= now:
                    self._drop(tenant, image_id)
                else:
                    self._used[tenant].move_to_end(image_id)
        if kept is None or not kept.expires_at:
            raise NotFound(
                f"image {image_id[:64]!r} is not in memory: it was not sent to this server, expired after "
                f"{self.ttl_s:.0f} s, or was evicted; send it again with POST /v1/images",
                param="image",
                code="image_not_found",
            )
        return kept.image

    def _drop(self, tenant: str, image_id: str) -> None:
        """The tenant keeps it no more."""
        if self._sent.pop((tenant, image_id), None) is None:
            return
        kept = self._kept[image_id]
        del kept.expires_at[tenant], self._used[tenant][image_id]
        self._count(tenant, -kept.nbytes)
        if not kept.expires_at:
            del self._kept[image_id]
        if not self._used[tenant]:
            del self._used[tenant], self._held[tenant]

    def _count(self, tenant: str, nbytes: int) -> None:
        self.nbytes += nbytes
        self._held[tenant] = self._held.get(tenant, 0) + nbytes
