"""Get the pixels that a look needs: reserve their cost, decode them, and remember the file that had them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import copy

from service.admission.admission import Reservation
from service.admission.quota import Cost
from service.admission.scheduler import Claim
from service.core.errors import GlimpseError, naming_frame, naming_image
from service.core.latest import Latest
from service.core.request import ImageId, Request
from service.core.vision import CLOSER_SIZE, IMAGE_SIZE
from service.images import Images
from service.media.clip import DecodedClip
from service.media.clip_header import clip_cost
from service.media.decoder import Decoded
from service.media.header import header_size
from service.media.reader import ImageReader
from service.media.store import Image
from service.record.ticket import Ticket
from service.vision_stage.clips import MOST_KNOWN, ClipMemory, Shown
from service.vision_stage.plan import Film, Look
from service.vision_stage.turns import to_its_end

NARROW_PIXELS = 8  # Pillow's bicubic filter has 32 bytes of weights for each pixel of a side, 8 pixels' worth


class Pixels:
    """Decode the images and clips of all requests. Made once by the pipeline."""

    def __init__(self, reader: ImageReader, images: Images, clips: ClipMemory) -> None:
        self.reader = reader
        # Of PDFs, by digest: only their renderer knows, and a page that is cached is not rendered.
        self.page_sizes: Latest[str, tuple[int, int]] = Latest(MOST_KNOWN)
        self._images = images
        self._clips = clips

    def reserve(self, look: Look, reservation: Reservation) -> None:
        """Reserve the cost of decoding, once. Raises Overloaded."""
        if look.film is not None:
            self.reserve_film(look.film, reservation)
        elif not look.pixels:
            cost = decoding_cost(look.image.data, self.reader.limits.max_pixels, look.image.page)
            reservation.reserve(cost)
            look.pixels = cost.pixels

    def reserve_film(self, film: Film, reservation: Reservation) -> None:
        """The same for all frames of a file."""
        if not film.pixels:
            pixels = clip_cost(film.file.data, film.most, self.reader.limits.max_pixels)
            reservation.reserve(Cost(pixels=pixels))
            film.pixels = pixels

    async def decode_look(self, look: Look, view: int, claim: Claim, ticket: Ticket) -> Decoded:
        """Decode the image for this view. The claim is of vision slots. Raises InvalidImage, TooLarge, Unavailable."""
        if look.film is not None:
            clip = await self.decode_clip(look.film, claim, ticket)
            pixels = next(frame.pixels for frame in clip.frames if frame.index == look.number)
            return Decoded({IMAGE_SIZE: pixels}, clip.width, clip.height)
        if (decoded := look.decoded) is not None:
            return decoded
        both = view == IMAGE_SIZE and look.detail == "high"
        with ticket.stage("load"), ticket.stage("decode_image"), naming(look, ticket.request):
            views = (IMAGE_SIZE, CLOSER_SIZE) if both else (view,)
            decoded = await self._decode_page(look, views, claim, ticket)
        look.decoded = decoded if both else None
        return decoded

    async def measure(self, look: Look, claim: Claim, ticket: Ticket) -> tuple[int, int]:
        """Let the renderer read the size of a PDF's page. Remember it. Raises InvalidImage, TooLarge, Unavailable."""
        with ticket.stage("load"), ticket.stage("decode_image"), naming(look, ticket.request):
            page = await self._decode_page(look, (), claim, ticket)
        self.page_sizes.keep(look.image.digest, (page.width, page.height))
        return page.width, page.height

    async def _decode_page(self, look: Look, views: Sequence[int], claim: Claim, ticket: Ticket) -> Decoded:
        work = await self.reader.begin_decode(look.image.data, views, look.viewport, look.image.page)
        return await to_its_end(work, claim, ticket.reservation, Cost(pixels=look.pixels), finished=False)

    async def decode_upload(self, data: bytes, cost: Cost, claim: Claim, reservation: Reservation) -> Decoded:
        """Decode an image that is no look's. `cost` is reserved. Raises InvalidImage, TooLarge, Unavailable."""
        return await to_its_end(await self.reader.begin_decode(data), claim, reservation, cost, finished=False)

    async def decode_clip(self, film: Film, claim: Claim, ticket: Ticket) -> DecodedClip:
        """The same for a clip's file."""
        with ticket.stage("load"), ticket.stage("decode_clip"):
            return await self.decode_film(film, claim, ticket.reservation)

    async def decode_film(self, film: Film, claim: Claim, reservation: Reservation) -> DecodedClip:
        """Decode a clip's file, once for all requests that need it at this moment. Remember its frames.

        If the request that began it leaves, it goes on with that request's claim and pixels. Raises InvalidImage,
        TooLarge, Unavailable.
        """

        async def decode() -> DecodedClip:
            clip = await self.reader.decode_clip(film.file.data, film.most)
            self._clips.keep(film.file, film.most, clip)
            return clip

        decoding, is_new = self._clips.reel(film.file.digest, film.most).decoding(decode)
        try:
            if not is_new:
                return await asyncio.shield(decoding)
            return await to_its_end(decoding, claim, reservation, Cost(pixels=film.pixels))
        except GlimpseError as error:  # each request names its own field in it
            raise copy(error) from error.__cause__

    def remember(self, look: Look, request: Request) -> None:
        """Store the image once, so that later questions can name its id. For a frame, store its clip's file."""
        shown, image = (look, look.image) if look.film is None else (look.film, look.film.file)
        if not shown.is_remembered:
            shown.is_remembered = True
            self._remember(image, request)

    def remember_clip(self, shown: Shown, request: Request) -> None:
        """The same for a clip whose visual tokens are known."""
        for image in shown.sent:
            self._remember(image, request)

    def _remember(self, image: Image, request: Request) -> None:
        """A question by id does not extend the file's lifetime."""
        if ImageId(image.id) not in request.sources:
            self._images.keep(image.file, request.tenant)


def naming(look: Look, request: Request) -> AbstractContextManager[None]:
    """Say in an error which image, or which frame that came as an image, is at fault."""
    if look.is_frame:
        return naming_frame(look.number, len(request.sources) - len(request.images))
    return naming_image(look.number, len(request.images))


def decoding_cost(data: bytes, max_pixels: int, page: int = 1) -> Cost:
    """Read the cost of decoding from the image's header.

    A narrow image costs what its longer side takes to resize, as if it were NARROW_PIXELS wide. The decoder refuses an
    image of more than `max_pixels` before it spends anything. A header without a size costs `max_pixels`, as each page
    of a PDF does: it may hold images of any size.
    """
    size = header_size(data, page)
    if size is None:
        return Cost(pixels=max_pixels)
    shorter, longer = sorted(size)
    return Cost(pixels=min(longer * max(shorter, NARROW_PIXELS), max_pixels))
