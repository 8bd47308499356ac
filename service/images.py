"""Know each tenant's images by their ids: in this process, and in Redis for every gateway.

An id is 128 random bits, and leads to an image only together with the tenant that sent it.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

from blake3 import blake3

from service.admission.quota import RETRY, TENANT_SHARE
from service.cache.redis_client import RedisFault
from service.cache.shared_images import SharedImages
from service.core.errors import GlimpseError, NotFound, Overloaded, TooLarge, Unavailable
from service.media.reader import ImageReader
from service.media.store import ID, Image, ImageStore, Kept, address_of
from service.telemetry.metrics import Metrics

READS = 8  # images that are read from Redis at once: their bytes are counted once they are here


class Images:
    """Join the memory of this process and Redis. Made once by the pipeline."""

    def __init__(
        self,
        store: ImageStore,
        reader: ImageReader,
        metrics: Metrics,
        shared: SharedImages | None = None,
        *,
        apart: bool = False,
    ) -> None:
        """`apart`: tenants share no features, so equal bytes of two tenants have different digests."""
        self.store = store
        self._reader = reader
        self._metrics = metrics
        self._shared = shared
        self._apart = apart
        self._reads = asyncio.Semaphore(READS)
        metrics.images_held_bytes.set_function(lambda: self.store.held_bytes)
        if shared is not None:
            shared.forget, shared.is_deleted = self._forget, self.store.is_deleted

    @property
    def are_shared(self) -> bool:
        """Whether every gateway knows an id, and not only the one that got the image."""
        return self._shared is not None and self._shared.in_use

    async def identify(self, data: bytes, tenant: str) -> Image:
        """Hash the bytes, and give them an id. It does not check that they are an image."""
        return self._named(await self._hashed(data, tenant), tenant)

    def keep(self, image: Image, tenant: str) -> None:
        """Keep an image that came with its question; in Redis a little later."""
        self.store.put(image, time.monotonic(), tenant)
        if self._shared is not None:
            self._shared.put_behind(address_of(tenant, image.id), image.data)

    def require_room(self, nbytes: int) -> None:
        """Raises Overloaded if an image of this size cannot be kept for later questions."""
        if not self.store.has_room(nbytes) and not self.are_shared:
            raise self.full()

    async def keep_for_all(self, image: Image, tenant: str) -> Image:
        """Keep an image, so that any gateway can be asked about it when this returns. Without Redis only this one.

        It has a new id if its own was deleted meanwhile. Raises Overloaded if neither has room for it.
        """
        kept, address = self.store.put(image, time.monotonic(), tenant), address_of(tenant, image.id)
        is_shared = self._shared is not None and await self._shared.put(address, image.data)
        if self.store.is_deleted(address):
            return await self.keep_for_all(self._named(image, tenant), tenant)
        if kept is None and not is_shared:
            raise self.full()
        return image

    async def find(self, image_id: str, tenant: str) -> Kept | None:
        """Return the tenant's image; None if it is in Redis, and there is no room for it here.

        Raises NotFound for an id that is unknown, expired or another tenant's. Neither the error nor the time that it
        takes tells which. Raises Unavailable if Redis may have the image, and does not answer.
        """
        kept = self.store.get(image_id, time.monotonic(), tenant)
        self._metrics.image_lookups.labels("memory", "miss" if kept is None else "hit").inc()
        if kept is not None:
            return kept
        if self._shared is None or not ID.fullmatch(image_id):
            raise self._unknown(image_id)
        async with self._reads:
            kept = self.store.get(image_id, time.monotonic(), tenant)  # another request may have read it meanwhile
            if kept is not None:
                return kept
            try:
                found = await self._shared.find(address_of(tenant, image_id))
            except RedisFault as exc:
                raise Unavailable(
                    f"image {image_id} is not in this gateway's memory, and the store that gateways share does not "
                    "answer: try again in a few seconds, or send the image again"
                ) from exc
            if found is None:
                raise self._unknown(image_id)
            data, left_s = found
            image = replace(await self._hashed(data, tenant), id=image_id)
            kept = self.store.put(image, time.monotonic(), tenant, min(left_s, self.store.ttl_s))
            if self.store.is_deleted(address_of(tenant, image_id)):
                raise self._unknown(image_id)
            return kept

    async def delete(self, image_id: str, tenant: str) -> None:
        """Delete the tenant's image, in every gateway within a second. Raises NotFound, Unavailable."""
        address = address_of(tenant, image_id)
        was_here = bool(ID.fullmatch(image_id)) and self.store.forget(address)
        if self._shared is not None and ID.fullmatch(image_id):
            was_there = await self._shared.delete(address)
            if was_there is None:
                raise Unavailable(
                    "the image is deleted in this gateway's memory, but the store that gateways share does not answer: "
                    "try again in a few seconds, or wait until it expires"
                )
            was_here = was_here or was_there
        if not was_here:
            raise self._unknown(image_id)

    def _forget(self, address: str) -> None:
        self.store.forget(address)

    async def _hashed(self, data: bytes, tenant: str) -> Image:
        image = await self._reader.identify(data)
        if not self._apart:
            return image
        return replace(image, digest=blake3(f"{tenant}\0{image.digest}".encode()).hexdigest())

    def _named(self, image: Image, tenant: str) -> Image:
        return replace(image, id=self.store.name(image.digest, tenant))

    def full(self) -> Overloaded:
        store = self.store
        return self.refused(
            "saturated",
            "the server is at its limit of images that requests look at "
            f"({store.held_bytes:,} of {store.max_bytes:,} bytes are in use)",
        )

    def refused(self, code: Literal["saturated", "tenant_share"], message: str) -> Overloaded:
        self._metrics.refusals.labels(code).inc()
        return Overloaded(f"{message}: {RETRY}", code=code)

    def _unknown(self, image_id: str) -> NotFound:
        here = "" if self.are_shared else " to this server"
        return NotFound(
            f"image {image_id[:64]!r} is not in memory: your tenant did not send it{here}, or it was deleted, expired "
            f"after {self.store.ttl_s:.0f} s or was evicted; send it again with POST /v1/images",
            param="image",
            code="image_not_found",
        )


class InUse:
    """The images in memory that one request looks at, until `held` is closed. They count in the store meanwhile."""

    def __init__(self, images: Images, tenant: str, held: ExitStack) -> None:
        self._images = images
        self._tenant = tenant
        self._held = held
        self._kept: dict[str, Kept] = {}  # by id

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept.values())

    async def find(self, image_id: str) -> Image:
        """Return the tenant's image, and hold it.

        Raises NotFound as `Images.find` does. Raises Overloaded if other requests, or the tenant's, hold too much for
        it; TooLarge if the request itself does.
        """
        kept = self._kept.get(image_id) or await self._images.find(image_id, self._tenant)
        if kept is None:
            raise self._no_room()
        if image_id not in self._kept:
            self._require_share(kept)
            self._images.store.hold(kept)
            self._held.callback(self._images.store.let_go, kept)
            self._kept[image_id] = kept
        return kept.image

    def _no_room(self) -> GlimpseError:
        store = self._images.store
        if store.held_bytes > self.nbytes:
            return self._images.full()
        return TooLarge(
            f"the images that this request names take more than the {store.max_bytes:,} bytes that the server has for "
            "images in memory: name fewer images or smaller ones",
            param="image",
        )

    def _require_share(self, kept: Kept) -> None:
        """Raises Overloaded if the tenant's requests would hold more than its share. One alone may hold any number."""
        store, own = self._images.store, self._images.store.held_by(self._tenant)
        if not self._tenant or kept.users or own == self.nbytes:
            return
        if own + kept.nbytes > TENANT_SHARE * (store.max_bytes - store.held_bytes):
            raise self._images.refused(
                "tenant_share",
                f"tenant {self._tenant} is at its share of images that requests look at "
                f"({own:,} of {store.max_bytes:,} bytes are in use)",
            )
