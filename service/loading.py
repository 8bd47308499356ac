"""Get the bytes of everything that a request shows: from the request itself, by ids, and from URLs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from service.admission.admission import Reservation
from service.core.errors import InvalidRequest, naming_frame, naming_image, naming_video
from service.core.request import ImageBytes, ImageId, ImageSource, ImageUrl, Request
from service.images import Images, InUse
from service.media.clip_header import require_clip
from service.media.fetch import ImageFetcher
from service.media.foreign import Wanted
from service.media.store import Image, LoadedClip
from service.record.ticket import Ticket
from service.system.tasks import first_failure

Naming = Callable[[], AbstractContextManager[None]]  # says in an error which of the request's sources is at fault
Place = tuple[ImageSource, Naming, Wanted]


@dataclass(frozen=True, slots=True)
class Loader:
    """Load what requests show. It decodes nothing, because a known image needs no pixels. Made once by the pipeline."""

    images: Images
    fetcher: ImageFetcher | None  # None: URLs are refused

    async def load(self, ticket: Ticket) -> tuple[list[Image], LoadedClip | None]:
        """Return the bytes and digests of the images and of the clip. The reservation holds those in memory."""
        places = places_of(ticket.request)
        async with ticket.in_time():
            with ticket.stage("load"):
                fetched = await self._fetch(places, ticket.reservation)
                loaded = await self._load_all(places, fetched, ticket.reservation)
        ticket.image_ids = tuple(image.id for image in loaded)
        images, clip = divided(ticket.request, loaded)
        if clip is not None and clip.file is not None:
            require_clip(clip.file.data)
        return images, clip

    async def load_for_estimate(
        self, request: Request, reservation: Reservation
    ) -> tuple[list[Image], LoadedClip | None]:
        """As `load`, but fetch nothing. Raises InvalidRequest for a URL."""
        return divided(request, await self._load_all(places_of(request), {}, reservation))

    async def _load_all(
        self, places: Sequence[Place], fetched: Mapping[ImageUrl, ImageBytes], reservation: Reservation
    ) -> list[Image]:
        in_use, loaded = InUse(self.images, reservation.tenant, reservation.held), []
        for source, naming, _ in places:
            with naming():
                known = fetched.get(source) if isinstance(source, ImageUrl) else source
                loaded.append(await self._load(known, reservation.tenant, in_use))
        return loaded

    async def _load(self, source: ImageBytes | ImageId | None, tenant: str, in_use: InUse) -> Image:
        """Return the bytes and digest of one image. Raises NotFound for an unknown id, and Overloaded, TooLarge."""
        match source:
            case ImageBytes(data):
                return await self.images.identify(data, tenant)
            case ImageId(image_id):
                return await in_use.find(image_id)
            case None:
                raise InvalidRequest(
                    "image is a URL, and an estimate fetches none: send the bytes, or an id",
                    param="image",
                    code="url_not_supported",
                )

    async def _fetch(self, places: Sequence[Place], reservation: Reservation) -> Mapping[ImageUrl, ImageBytes]:
        """Fetch the images that are URLs, each once and all at the same time. The bytes count as a body's do.

        Raises InvalidRequest, InvalidImage, TooLarge, Overloaded.
        """
        urls = {source: (naming, wanted) for source, naming, wanted in reversed(places) if isinstance(source, ImageUrl)}
        if not urls:
            return {}
        async with first_failure() as tasks:
            fetches = {
                url: tasks.create_task(self._fetch_one(url, naming, wanted, reservation))
                for url, (naming, wanted) in urls.items()
            }
        return {url: fetch.result() for url, fetch in fetches.items()}

    async def _fetch_one(
        self, source: ImageUrl, naming: Naming, wanted: Wanted, reservation: Reservation
    ) -> ImageBytes:
        """Fetch a file. Raises InvalidRequest, InvalidImage, TooLarge, Overloaded."""
        with naming():
            if self.fetcher is None:
                raise InvalidRequest(
                    "image is a URL, and URLs are not fetched: send the bytes as base64, as a data: URL or as a form "
                    "(curl -F image=@FILE), or send them once to POST /v1/images",
                    param="image",
                    code="url_not_supported",
                )
            return ImageBytes(
                await self.fetcher.fetch(source.url, reservation.tenant, reservation.reserve_bytes, wanted)
            )


def places_of(request: Request) -> list[Place]:
    """Return all that a request shows: its images, then its clip's file or frames."""
    of = len(request.images)
    places: list[Place] = [
        (source, partial(naming_image, index, of), "image") for index, source in enumerate(request.images)
    ]
    if request.clip is None:
        return places
    if not isinstance(request.clip.source, tuple):
        return [*places, (request.clip.source, naming_video, "video")]
    frames, of = request.clip.source, len(request.clip.source)
    return [*places, *((source, partial(naming_frame, index, of), "image") for index, source in enumerate(frames))]


def divided(request: Request, loaded: Sequence[Image]) -> tuple[list[Image], LoadedClip | None]:
    """Divide what was loaded from `places_of` into the images and the clip."""
    of = len(request.images)
    images, shown = [image.at(request.page) for image in loaded[:of]], tuple(loaded[of:])
    if request.clip is None:
        return images, None
    return images, LoadedClip(None, shown) if isinstance(request.clip.source, tuple) else LoadedClip(shown[0])
