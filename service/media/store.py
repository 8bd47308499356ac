"""Keep images as they were sent, so that later questions can name their ids."""

from __future__ import annotations

import heapq
import re
import secrets
from collections import OrderedDict
from collections.abc import Container
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from blake3 import blake3

from service.core.latest import Latest
from service.media.header import header_size, upright_size
from service.settings import IMAGE_ENTRY_BYTES

PAGE_MARK = ".p"  # in a digest, before the page's number
ID = re.compile(r"img_[0-9a-f]{32}")
MOST_DELETED = 20_000  # ids that are remembered as deleted; what is on its way here under one of them is not kept
MOST_NAMES = 100_000  # ids of contents that are remembered; beyond them, a content that is sent again has a new id


@dataclass(frozen=True)
class Image:
    """An image as it was sent, or one page of it."""

    data: bytes  # of all pages
    digest: str  # blake3 of `data`, 64 hexadecimal digits; mixed with the tenant if tenants share no features
    id: str = ""  # once it has one
    page: int = 1  # that is looked at

    @classmethod
    def of(cls, data: bytes) -> Self:
        return cls(data, blake3(data).hexdigest())

    def at(self, page: int) -> Self:
        """Return another page of a file that is at its first one. Its digest is its own: that of what is seen."""
        return self if page == 1 else replace(self, digest=f"{self.digest}{PAGE_MARK}{page}", page=page)

    @property
    def file(self) -> Self:
        """Return the image as it was sent."""
        return self if self.page == 1 else replace(self, digest=self.digest.partition(PAGE_MARK)[0], page=1)

    @cached_property
    def upright_size(self) -> tuple[int, int] | None:
        """Return its width and height: see `header.upright_size`. Every question about an image in memory asks."""
        return upright_size(self.data, self.page)

    def larger_than(self, size: int) -> bool:
        """Whether a side has more pixels; true if the header does not say."""
        told = header_size(self.data, self.page)
        return told is None or max(told) > size


@dataclass(frozen=True, slots=True)
class LoadedClip:
    """A clip as it was sent: its file, or its frames as images."""

    file: Image | None
    images: tuple[Image, ...] = ()  # in order; none if there is a file

    @property
    def sent(self) -> tuple[Image, ...]:
        """Return what was sent: one file or several."""
        return self.images if self.file is None else (self.file,)


def address_of(tenant: str, image_id: str) -> str:
    """Return where a tenant's image is kept, here and in Redis.

    Another tenant's id leads to a place where nothing is, as an unknown id does.
    """
    return blake3(f"{tenant}\0{image_id}".encode()).hexdigest()[:40]


def _content(tenant: str, digest: str) -> bytes:
    """Shorten a tenant and a digest to 16 bytes: there may be as many as MOST_NAMES."""
    return blake3(f"{tenant}\0{digest}".encode()).digest(16)


def _id(bits: bytes) -> str:
    return f"img_{bits.hex()}"


@dataclass(slots=True)
class Kept:
    """An image in the store, and how many requests look at it."""

    image: Image
    tenant: str
    expires_at: float
    users: int = 0
    dropped: bool = False  # its id leads nowhere any more, but its bytes count until the last user lets go

    @property
    def nbytes(self) -> int:
        return len(self.image.data) + IMAGE_ENTRY_BYTES


class _BytesByTenant:
    """Bytes by tenant. A change and a look at the tenant that holds the most take time for the tenants' logarithm.

    Of those that hold equally much, the one that began first counts. The heap keeps entries of earlier amounts too,
    at most as many as it has tenants and SPARE more.
    """

    SPARE = 64

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, int, str]] = {}  # minus bytes, when it began, tenant
        self._heap: list[tuple[int, int, str]] = []
        self._began = 0

    def add(self, tenant: str, nbytes: int) -> None:
        """Count so many bytes more, or fewer. A tenant without bytes is forgotten."""
        before, began, _ = self._held.get(tenant) or (0, self._began, tenant)
        if before - nbytes == 0:
            self._held.pop(tenant, None)
            return
        self._began += tenant not in self._held
        now = self._held[tenant] = (before - nbytes, began, tenant)
        heapq.heappush(self._heap, now)
        if len(self._heap) > 2 * len(self._held) + self.SPARE:
            self._heap = list(self._held.values())
            heapq.heapify(self._heap)

    def most(self, among: Container[str]) -> str:
        """Return the tenant among these that holds the most. One of them must hold bytes.

        It takes longer by each tenant that holds more and is not among them.
        """
        passed = []
        while (first := self._heap[0])[2] not in among or self._held.get(first[2]) != first:
            heapq.heappop(self._heap)
            if self._held.get(first[2]) == first:
                passed.append(first)
        for each in passed:
            heapq.heappush(self._heap, each)
        return first[2]


class ImageStore:
    """Images of each tenant in memory, bounded in bytes. The tenant with the most bytes loses its least recently used.

    An image expires `ttl_s` after it was sent. It counts IMAGE_ENTRY_BYTES more than its own bytes, so that the number
    of tiny images is bounded too. `now` is in seconds of the monotonic clock, which nobody sets.

    An image that a request looks at is `held`. It is not evicted, because its bytes stay in memory anyway. If it is
    deleted or expires meanwhile, its bytes count until the last request lets go.
    """

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.nbytes = 0
        self.held_bytes = 0
        self._kept: dict[str, Kept] = {}  # by address, as all that follows
        self._unused: dict[str, OrderedDict[str, None]] = {}  # by tenant, the least recently used first; none is empty
        self._bytes = _BytesByTenant()
        self._held: dict[str, int] = {}  # bytes by tenant; no zeros
        self._sent: OrderedDict[str, float] = OrderedDict()  # when it expires; the oldest put first
        self._deleted: Latest[str, None] = Latest(MOST_DELETED)
        self._names: Latest[bytes, bytes] = Latest(MOST_NAMES)  # ids' bits by `_content`, 16 bytes each

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, digest: str, tenant: str) -> str:
        """Return the id that the tenant's image has, or a new one of 128 random bits."""
        content = _content(tenant, digest)
        bits = self._names.get(content)
        if bits is None or self.is_deleted(address_of(tenant, _id(bits))):
            bits = secrets.token_bytes(16)
        self._names.keep(content, bits)
        return _id(bits)

    def has_room(self, nbytes: int) -> bool:
        """Whether an image of this size can be kept: those that requests look at make no room."""
        return nbytes + IMAGE_ENTRY_BYTES <= self.max_bytes - self.held_bytes

    def put(self, image: Image, now: float, tenant: str = "", ttl_s: float | None = None) -> Kept | None:
        """Keep an image that has an id. Sending it again starts its time anew, and the first bytes stay.

        Returns what is kept; None if its id was deleted, or if there is no room for it: then nothing else has to go.
        """
        address = address_of(tenant, image.id)
        if self.is_deleted(address):
            return None
        expires_at = now + (self.ttl_s if ttl_s is None else ttl_s)
        while self._sent and self._sent[first := next(iter(self._sent))] <= now and first != address:
            self._drop(first)
        if (kept := self._kept.get(address)) is not None:
            kept.expires_at = self._sent[address] = expires_at
            self._sent.move_to_end(address)
            self._touch(address, kept)
            return kept
        if not self.has_room(len(image.data)):
            return None
        kept = Kept(image, tenant, expires_at)
        self._count(tenant, kept.nbytes)
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._unused[self._bytes.most(self._unused)])))
        self._kept[address], self._sent[address] = kept, expires_at
        self._unused.setdefault(tenant, OrderedDict())[address] = None
        return kept

    def get(self, image_id: str, now: float, tenant: str = "") -> Kept | None:
        """Return the tenant's image; None if its id is unknown, expired or evicted."""
        address = address_of(tenant, image_id)
        kept = self._kept.get(address)
        if kept is None:
            return None
        if kept.expires_at <= now:
            self._drop(address)
            return None
        self._touch(address, kept)
        return kept

    def forget(self, address: str) -> bool:
        """Delete an image: its id leads nowhere from now on. Returns whether it was there."""
        self._deleted.keep(address, None)
        kept = self._kept.get(address)
        if kept is None:
            return False
        self._names.forget(_content(kept.tenant, kept.image.digest))
        self._drop(address)
        return True

    def is_deleted(self, address: str) -> bool:
        """Whether the image was deleted, as far as this process remembers."""
        return address in self._deleted

    def hold(self, kept: Kept) -> None:
        """Count one more request that looks at an image which is here, until `let_go`."""
        if not kept.users:
            self._no_longer_unused(address_of(kept.tenant, kept.image.id), kept)
            self._count_held(kept.tenant, kept.nbytes)
        kept.users += 1

    def let_go(self, kept: Kept) -> None:
        """End one `hold`."""
        kept.users -= 1
        if kept.users:
            return
        self._count_held(kept.tenant, -kept.nbytes)
        if kept.dropped:
            self._count(kept.tenant, -kept.nbytes)
        else:
            self._unused.setdefault(kept.tenant, OrderedDict())[address_of(kept.tenant, kept.image.id)] = None

    def held_by(self, tenant: str) -> int:
        """Return the bytes of the tenant's images that requests look at. Each image counts once."""
        return self._held.get(tenant, 0)

    def _touch(self, address: str, kept: Kept) -> None:
        if not kept.users:
            self._unused[kept.tenant].move_to_end(address)

    def _drop(self, address: str) -> None:
        kept = self._kept.pop(address, None)
        if kept is None:
            return
        kept.dropped = True
        del self._sent[address]
        if not kept.users:
            self._no_longer_unused(address, kept)
            self._count(kept.tenant, -kept.nbytes)

    def _no_longer_unused(self, address: str, kept: Kept) -> None:
        del self._unused[kept.tenant][address]
        if not self._unused[kept.tenant]:
            del self._unused[kept.tenant]

    def _count(self, tenant: str, nbytes: int) -> None:
        self.nbytes += nbytes
        self._bytes.add(tenant, nbytes)

    def _count_held(self, tenant: str, nbytes: int) -> None:
        self.held_bytes += nbytes
        held = self._held.get(tenant, 0) + nbytes
        if held:
            self._held[tenant] = held
        else:
            del self._held[tenant]
