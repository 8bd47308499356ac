"""From images and a question to what the LLM gets of them, on the shortest way there is.

    visual cache       what the image gave for this question before: nothing is left to do
    feature cache      what the encoder found in it: attend
    see                a new image: the encoder, and attend in the same call
    encode             its closer view, four crops in one batch, where the question asks for one: attend again

Every image is looked at by itself, several of one request at the same time: each has its own lookups, flights and
vision slots, so two requests for the same images in another order cannot lock. Each is a call of one row: on a CPU four
images in one batch cost the encoder what four calls do (13.9 against 13.2 ms an image with the reference model), and
calls overlap in the chain's stages; where a batch pays, Triton's dynamic batching makes one of the calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from service.admission.admission import Admission, Reservation
from service.admission.quota import Cost
from service.admission.scheduler import Claim, Kind, Resource
from service.cache.features import FeatureCache, FeatureKey, Features, Found, closer_view, first_view
from service.cache.visual_tokens import VisualCache, visual_key
from service.core.card import ModelCard
from service.core.errors import Overloaded, naming_image
from service.core.prompt import Question
from service.core.request import Budget, ImageId, Priority, Request
from service.core.vision import (
    CLOSER_SIZE,
    CROPS,
    IMAGE_SIZE,
    CloserFeatures,
    Int8Rows,
    Seen,
    UInt8Array,
    VisionFeatures,
)
from service.media.decoder import Decoded, Image, ImageReader, ImageStore, header_pixels
from service.prompt import PromptBuilder
from service.ticket import Ticket


class VisionModel(Protocol):
    """Image and question to visual tokens. Raises Unavailable, Overloaded, DeadlineExceeded, GlimpseError only."""

    async def see(
        self, image: UInt8Array, question: Question, budget: Budget, timeout_s: float
    ) -> tuple[VisionFeatures, Seen]:
        """`image` uint8 [3, 224, 224]."""
        ...

    async def encode(self, images: UInt8Array, timeout_s: float) -> list[VisionFeatures]:
        """`images` uint8 [N, 3, 224, 224], in one batch."""
        ...

    async def attend(
        self,
        vision: VisionFeatures,
        question: Question,
        budget: Budget,
        timeout_s: float,
        closer: CloserFeatures | None = None,
    ) -> Seen:
        """What `see` gives, from what the encoder found before, and in the closer view too where there is `closer`."""
        ...


@dataclass(slots=True)
class Look:
    """One image of a request, and what is known of it by now."""

    number: int  # of the images of its request
    image: Image
    question: Question
    detail: Literal["low", "high"] = "low"  # what it is to be looked at with
    is_reserved: bool = False  # the pixels
    decoded: Decoded | None = None
    vision: VisionFeatures | None = None
    closer: CloserFeatures | None = None
    seen: Seen | None = None  # at this detail, once it is known
    low: Seen | None = None  # what was seen before it was to be looked at with detail high
    is_reduced: bool = False  # whether that was less than the request allows
    is_denied: bool = False  # a closer view, as others wait


class VisionStage:
    """Made once by the pipeline."""

    def __init__(
        self,
        *,
        vision: VisionModel,
        admission: Admission,
        card: ModelCard,
        prompts: PromptBuilder,
        reader: ImageReader,
        images: ImageStore,
        features: FeatureCache,
        visual: VisualCache,
    ) -> None:
        self.vision = vision
        self.admission = admission
        self.card = card
        self.prompts = prompts
        self.reader = reader
        self.images = images
        self.features = features
        self.visual = visual

    async def look(self, images: Sequence[Image], ticket: Ticket, reservation: Reservation) -> list[Seen]:
        """What each image gives. The LLM has room when it returns.

        Who attends waits for the LLM first: that bounds how many attend at once, and a wait in vain costs nothing. Who
        then finds that it needs a closer view gives its room back and comes again.
        """
        question = self.prompts.question(ticket.request.question)
        of: dict[str, Look] = {}  # by digest: what comes twice is looked at once
        for number, image in enumerate(images):
            of.setdefault(image.digest, Look(number, image, question))
        looks = of.values()
        while True:
            unknown = [look for look in looks if look.seen is None and not self._recall(look, ticket)]
            await together(self._find, unknown, ticket, reservation)
            room = await self._turn(Resource.LLM, ticket.tokens, Kind.of(ticket.encoded), ticket, reservation)
            await together(self._attend, [look for look in unknown if look.seen is None], ticket, reservation)
            if not [look for look in unknown if self._looks_closer(look, ticket)]:
                break
            reservation.give_back(room, finished=False)
        ticket.cache = "miss" if ticket.encoded else "hit"
        ticket.detail = "high" if any(look.detail == "high" for look in looks) else "low"
        ticket.reduced = any(look.is_reduced or look.is_denied for look in looks)
        return [seen for image in images if (seen := of[image.digest].seen) is not None]

    def _looks_closer(self, look: Look, ticket: Ticket) -> bool:
        """Whether it becomes a closer look: one is wanted, and may be had. Then what was seen counts no more."""
        if look.detail == "high" or look.low is not None or not self._wants_closer(look, ticket.request):
            return False
        look.is_denied = not self._may_look_closer(look, ticket)
        if look.is_denied:
            return False
        look.detail, look.low, look.seen = "high", look.seen, None
        return True

    def _wants_closer(self, look: Look, request: Request) -> bool:
        """With "auto" nobody knows more before the image was seen, but of a least that one view cannot reach."""
        if request.detail == "high" or self._needs_closer(request):
            return True
        if request.detail == "low" or look.seen is None or not self.card.closer_view:
            return False
        return look.seen.relevance.particularize >= self.card.closer_view_at and look.image.larger_than(IMAGE_SIZE)

    def _may_look_closer(self, look: Look, ticket: Ticket) -> bool:
        """Unless others wait; what was seen closer before is free."""
        if self.admission.fidelity.closer_view or self._needs_closer(ticket.request):
            return True
        return self.visual.holds(*self._keys(look.image, "high", ticket.request))

    def _needs_closer(self, request: Request) -> bool:
        """Whether it wants more tokens at the least than one view has."""
        return request.budget.vision_tokens[0] > self.card.vision_tokens[1]

    def _recall(self, look: Look, ticket: Ticket) -> bool:
        """Whether it is known what the image gives for the question."""
        self._looks_closer(look, ticket)
        look.seen = self.visual.get(*self._keys(look.image, look.detail, ticket.request))
        look.is_reduced = look.seen is not None and look.seen.budget != self._asked(look.detail, ticket.request)
        if self._looks_closer(look, ticket):
            return self._recall(look, ticket)
        if look.seen is not None:
            self._remember(look.image, ticket.request)
        return look.seen is not None

    def _keys(self, image: Image, detail: Literal["low", "high"], request: Request) -> list[bytes]:
        """What may be taken from the visual cache. What was seen before as closely as is asked is free now, where it
        is no more for the LLM."""
        asked = self._asked(detail, request)
        allowed = self.admission.fidelity.cap(asked)
        budgets = (asked, allowed) if asked.visual_tokens == allowed.visual_tokens else (allowed,)
        return [
            visual_key(self.card, image.digest, request.question, budget, detail) for budget in dict.fromkeys(budgets)
        ]

    def _keep(self, look: Look, seen: Seen, ticket: Ticket) -> None:
        look.seen = seen
        key = visual_key(self.card, look.image.digest, ticket.request.question, seen.budget, seen.detail)
        self.visual.keep(key, seen)

    async def _find(self, look: Look, ticket: Ticket, reservation: Reservation) -> None:
        """The features that the look needs. A new image is seen as it is encoded, where that is all that is needed.

        Raises Overloaded where there is no room, but not for a closer view of what was seen already.
        """
        if look.vision is None:
            await self._find_whole(look, ticket, reservation)
            if self._looks_closer(look, ticket) and self._recall(look, ticket):
                return
        if look.detail == "low":
            return
        try:
            await self._find_closer(look, ticket, reservation)
        except Overloaded:
            if look.low is None:
                raise
            look.detail, look.seen, look.is_denied = "low", look.low, True

    async def _find_whole(self, look: Look, ticket: Ticket, reservation: Reservation) -> None:
        key = first_view(self.card.fingerprint, look.image.digest)
        async with AsyncExitStack() as flight:
            with ticket.stage("vision"), ticket.stage("lookup"):  # another's encode may have to be waited for
                found = await flight.enter_async_context(self._lookup(key, ticket, reservation))
            look.vision = found.features
            if look.vision is not None:
                self._remember(look.image, ticket.request)
                return
            async with self._encoding(look, IMAGE_SIZE, ticket, reservation) as decoded:
                if look.detail == "high":
                    (look.vision,) = await self.vision.encode(decoded.pixels[np.newaxis], ticket.left_s)
                else:
                    budget = self._budget(look, ticket)
                    look.vision, seen = await self.vision.see(decoded.pixels, look.question, budget, ticket.left_s)
                    self._keep(look, seen, ticket)
            found.keep(look.vision)

    async def _find_closer(self, look: Look, ticket: Ticket, reservation: Reservation) -> None:
        key = closer_view(self.card.fingerprint, look.image.digest)
        async with AsyncExitStack() as flight:
            with ticket.stage("vision"), ticket.stage("lookup"):
                found = await flight.enter_async_context(self._lookup(key, ticket, reservation))
            look.closer = found.features
            if look.closer is not None:
                return
            async with self._encoding(look, CLOSER_SIZE, ticket, reservation) as decoded:
                look.closer = CloserFeatures.joined(await self.vision.encode(decoded.crops, ticket.left_s))
            found.keep(look.closer)

    def _lookup(
        self, key: FeatureKey[Features], ticket: Ticket, reservation: Reservation
    ) -> AbstractAsyncContextManager[Found[Features]]:
        patient = ticket.request.priority is Priority.LOW
        return self.features.find(key, ticket.left_s, patient=patient, waiting=reservation.waiting_for_others)

    async def _attend(self, look: Look, ticket: Ticket, _: Reservation) -> None:
        assert look.vision is not None
        budget = self._budget(look, ticket)
        with ticket.stage("vision"), ticket.stage("attend"):
            seen = await self.vision.attend(look.vision, look.question, budget, ticket.left_s, look.closer)
        rounded = any(isinstance(view.features, Int8Rows) for view in (look.vision, look.closer) if view is not None)
        self._keep(look, replace(seen, is_rounded=rounded), ticket)

    def _asked(self, detail: Literal["low", "high"], request: Request) -> Budget:
        """What the request asks for, as far as its views have it."""
        return request.budget.within(self.card.vision_tokens[1]) if detail == "low" else request.budget

    def _budget(self, look: Look, ticket: Ticket) -> Budget:
        """What it gets, which the house says now."""
        asked = self._asked(look.detail, ticket.request)
        allowed = self.admission.fidelity.cap(asked)
        look.is_reduced = allowed != asked
        return allowed

    @asynccontextmanager
    async def _encoding(
        self, look: Look, view: int, ticket: Ticket, reservation: Reservation
    ) -> AsyncIterator[Decoded]:
        """The image decoded for this view, where there is room to encode it."""
        images = CROPS if view == CLOSER_SIZE else 1
        if not look.is_reserved:
            reservation.reserve(decoding_cost(look.image.data, self.reader.limits.max_pixels))
            look.is_reserved = True
        slots = min(images, self.admission.vision_slots)
        kind = Kind.of(max(images, len(ticket.request.images)))
        claim = await self._turn(Resource.VISION, slots, kind, ticket, reservation)
        ticket.encoded += images
        if (decoded := look.decoded) is None:
            both = view == IMAGE_SIZE and look.detail == "high"
            naming = naming_image(look.number, len(ticket.request.images))
            with ticket.stage("load"), ticket.stage("decode_image"), naming:
                decoded = await self.reader.decode(look.image.data, (IMAGE_SIZE, CLOSER_SIZE) if both else (view,))
            look.decoded = decoded if both else None
        self._remember(look.image, ticket.request)
        with ticket.stage("vision"), ticket.stage("see"):
            yield decoded
        reservation.give_back(claim)

    async def _turn(
        self, resource: Resource, amount: int, kind: Kind, ticket: Ticket, reservation: Reservation
    ) -> Claim:
        """What the reservation holds from now on. Raises Overloaded."""
        ticket.kind = kind
        request = ticket.request
        claim = Claim(resource, amount, kind, time.monotonic(), ticket.deadline, request.tenant, request.priority)
        with ticket.stage("queue"):
            await reservation.enter(claim)
        return claim

    def _remember(self, image: Image, request: Request) -> None:
        """An image that came with its question can be asked about by its id too; asking by id does not prolong it."""
        if ImageId(image.id) not in request.images:
            self.images.put(image, time.time())


def decoding_cost(data: bytes, max_pixels: int) -> Cost:
    """More pixels than are allowed are refused by the decoder, at no cost. Who does not tell its size pays for the
    largest."""
    told = header_pixels(data)
    return Cost(pixels=max_pixels if told is None else min(told, max_pixels))


async def together(
    step: Callable[[Look, Ticket, Reservation], Coroutine[Any, Any, None]],
    looks: Sequence[Look],
    ticket: Ticket,
    reservation: Reservation,
) -> None:
    """The step for every image at once. The first that fails ends the others, and is what is raised."""
    if len(looks) <= 1:  # no tasks: they cost 0.1 ms
        for look in looks:
            await step(look, ticket, reservation)
        return
    try:
        async with asyncio.TaskGroup() as tasks:
            for look in looks:
                tasks.create_task(step(look, ticket, reservation))
    except BaseExceptionGroup as group:
        first = group.exceptions[0]
        raise first from first.__cause__
