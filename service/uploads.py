"""Check and keep images and videos that are sent before any question about them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from service.admission.admission import Reservation
from service.admission.scheduler import Claim, Kind, Resource
from service.core.access import Use
from service.core.answer import KeptImage
from service.core.errors import DeadlineExceeded
from service.images import Images
from service.media.clip import DecodedClip
from service.media.clip_header import FILMS, clip_format
from service.media.decoder import Decoded
from service.media.store import Image
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.upstreams.models import Models
from service.vision_stage import Pixels, decoding_cost
from service.vision_stage.plan import Film


@dataclass(frozen=True, slots=True)
class Uploads:
    """Keep what callers upload. Made once by the pipeline."""

    images: Images
    pixels: Pixels
    models: Models
    settings: Settings
    metrics: Metrics

    async def keep(self, data: bytes, reservation: Reservation) -> KeptImage:
        """Check and keep an image or a video, so that questions can name it by its id.

        It waits for a vision slot, as a question's image does. It decodes as many frames of a video as a question looks
        at by default. The frames' number and times are remembered, their pixels are not.

        Raises InvalidImage, TooLarge, QuotaExceeded, Overloaded, DeadlineExceeded.
        """
        self.metrics.costs.payer(reservation.tenant)
        self.images.require_room(len(data))
        timeout_s, now = self.settings.default_timeout_s, time.monotonic()
        claim = Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + timeout_s, reservation.tenant)
        is_film = clip_format(data) in FILMS
        try:
            async with reservation.account.charged(Use(images=1)) as use:
                with reservation.work():
                    async with asyncio.timeout(timeout_s):
                        check = self._check_film if is_film else self._check_image
                        image, decoded = await check(data, claim, reservation, use)
        except TimeoutError as exc:
            raise DeadlineExceeded(
                f"the {'video' if is_film else 'image'} was not decoded within {timeout_s:g} s: try again in a few "
                "seconds"
            ) from exc
        image = await self.images.keep_for_all(image, reservation.tenant)
        expires_at = time.time() + self.settings.image_ttl_s
        pages = decoded.pages if isinstance(decoded, Decoded) else 1
        return KeptImage(image.id, len(data), decoded.width, decoded.height, expires_at, pages)

    async def _check_image(
        self, data: bytes, claim: Claim, reservation: Reservation, use: Use
    ) -> tuple[Image, Decoded]:
        cost = decoding_cost(data, self.settings.max_image_pixels)
        reservation.reserve(cost)
        await reservation.enter(claim)
        use.images = 1  # it is decoded now, which costs as much if it fails
        decoded = await self.pixels.decode_upload(data, cost, claim, reservation)
        return await self.images.identify(data, reservation.tenant), decoded

    async def _check_film(
        self, data: bytes, claim: Claim, reservation: Reservation, use: Use
    ) -> tuple[Image, DecodedClip]:
        image, card = await self.images.identify(data, reservation.tenant), self.models.primary.card
        film = Film(image, min(card.frames, card.most_frames))
        self.pixels.reserve_film(film, reservation)
        await reservation.enter(claim)
        use.images = 1
        return image, await self.pixels.decode_film(film, claim, reservation)
