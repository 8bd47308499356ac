"""Know each tenant's images by their ids: in this process, and in Redis for every gateway.

An id is 128 random bits, and leads to an image only together with the tenant that sent it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

from blake3 import blake3

from service.admission.quota import RETRY, TENANT_SHARE
from service.cache.shared_images import SharedImages
from service.core.errors import NotFound, Overloaded, Unavailable
from service.media.reader import ImageReader
from service.media.store import ID, Image, ImageStore, address_of
from service.telemetry.metrics import Metrics


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
        if shared is not None:
            shared.forget = self._forget

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

    async def keep_for_all(self, image: Image, tenant: str) -> None:
        """Keep an image, so that any gateway can be asked about it when this returns. Without Redis only this one.

        Raises Overloaded if there is no room, because requests look at what fills it.
        """
        if not self.store.put(image, time.monotonic(), tenant):
            raise self._full()
        if self._shared is not None:
            await self._shared.put(address_of(tenant, image.id), image.data)

    async def find(self, image_id: str, tenant: str) -> Image:
        """Return the tenant's image.

        Raises NotFound for an id that is unknown, expired or another tenant's. Neither the error nor the
        time that it takes tells which.
        """
        kept = self.store.get(image_id, time.monotonic(), tenant)
        self._metrics.image_lookups.labels("memory", "miss" if kept is None else "hit").inc()
        if kept is not None:
            return kept
        if self._shared is not None and ID.fullmatch(image_id):
            found = await self._shared.find(address_of(tenant, image_id))
            if found is not None:
                data, left_s = found
                image = replace(await self._hashed(data, tenant), id=image_id)
                self.store.put(image, time.monotonic(), tenant, min(left_s, self.store.ttl_s))
                return image
        raise self._unknown(image_id)

    @contextmanager
    def in_use(self, image: Image, tenant: str) -> Iterator[None]:
        """Hold an image that was found just now for the block, so that the store counts its bytes while it is used.

        Raises Overloaded if the store has no room for it, or the tenant would hold more than its share.
        """
        store, kept = self.store, self.store.hold(image.id, tenant)
        if kept is None:
            raise self._full()
        try:
            if tenant and kept.users == 1:
                self._require_share(tenant, kept.nbytes)
            yield
        finally:
            store.let_go(kept)

    async def delete(self, image_id: str, tenant: str) -> None:
        """Delete the tenant's image, in every gateway within a second. Raises NotFound, Unavailable."""
        address = address_of(tenant, image_id)
        was_here = self.store.forget(address)
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

    def _require_share(self, tenant: str, nbytes: int) -> None:
        """Raises Overloaded if the bytes that the tenant holds, the last `nbytes` among them, are over its share."""
        store, own = self.store, self.store.held_by(tenant)
        if own > TENANT_SHARE * (store.max_bytes - store.held_bytes + nbytes):
            raise self._refused(
                "tenant_share",
                f"tenant {tenant} is at its share of images that requests look at "
                f"({own - nbytes:,} of {store.max_bytes:,} bytes are in use)",
            )

    def _full(self) -> Overloaded:
        store = self.store
        return self._refused(
            "saturated",
            "the server is at its limit of images that requests look at "
            f"({store.held_bytes:,} of {store.max_bytes:,} bytes are in use)",
        )

    def _refused(self, code: Literal["saturated", "tenant_share"], message: str) -> Overloaded:
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
