"""Do the plan's steps for every image of a request, and for every frame of its clip.

Each image goes through the steps independently, several images of one request at the same time. Each has its own
lookups, flights and vision slots, so two requests for the same images in another order cannot deadlock.

Each model call is about one image. With the reference model on a CPU, the encoder took 13.9 ms an image for a batch of
four, and 13.2 ms for four calls. Calls for several images also overlap in the chain's stages. If a batch is faster,
Triton's dynamic batching joins the calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from service.admission.scheduler import Claim, Kind, Resource
from service.cache.features import Found
from service.cache.keys import FeatureKey, Features, closer_view, first_view
from service.cache.visual_tokens import embedding_key, visual_key
from service.core.errors import Overloaded, TooLarge
from service.core.request import Budget, Priority, Request
from service.core.viewport import fitting
from service.core.vision import (
    CLOSER_SIZE,
    CROPS,
    CloserFeatures,
    Seen,
    SeenClip,
    Sight,
    VisionFeatures,
    rounded_among,
)
from service.media.decoder import Decoded
from service.media.formats import reads_as_pdf
from service.media.header import require_page
from service.media.store import Image, LoadedClip
from service.record.ticket import Ticket
from service.vision_stage.clip_stage import ClipStage, Stage
from service.vision_stage.clips import Shown
from service.vision_stage.plan import (
    OF_FRAME,
    Attend,
    ChooseTile,
    Done,
    Encode,
    EncodeCloser,
    Look,
    Recall,
    See,
    Situation,
    next_step,
    next_step_to_features,
    tile_of,
)
from service.vision_stage.turns import to_its_end, together, turn

Work = Callable[[Decoded, float], Coroutine[Any, Any, Features]]  # encodes one view within so many seconds

# An encode that was sent may take this long, even if its caller has less time left: Triton does the work anyway, and
# the next question about the image needs it.
ENCODE_TIMEOUT_S = 10.0


@dataclass(kw_only=True, eq=False)
class VisionStage(Stage):
    """Look at the images of all requests. Made once by the pipeline."""

    clip_stage: ClipStage

    async def look(self, images: Sequence[Image], clip: LoadedClip | None, ticket: Ticket) -> Sight:
        """Return the visual tokens of each image, and of the clip. The request then holds its LLM tokens.

        LLM tokens are claimed before attending. This bounds how many requests attend at once, and a refused request
        has not attended in vain. If a closer view turns out to be needed, the tokens are given back while that view is
        encoded. Raises InvalidImage, TooLarge, Overloaded.
        """
        looks = await self._looks(images, ticket)
        shown = None if clip is None else await self.clip_stage.shown(clip, self._find_all, ticket)
        every = [*looks.values(), *([] if shown is None else shown.looks.values())]
        for look in every:
            self._decide(look, ticket)
        pending = every
        while True:
            for look in pending:
                self._recall(look, ticket)
            pending = [look for look in pending if not look.is_done]
            await together(self._find, pending, ticket)
            if shown is not None:
                shown.reel = None  # its pixels are needed no more, however long the LLM's queue is
            encoded = sum(look.encoded for look in looks.values()) + (0 if shown is None else shown.encoded)
            kind = Kind.of(encoded)
            room = await turn(Resource.LLM, ticket.tokens, kind, ticket)
            if due := [look for look in pending if look.step == Attend()]:
                await self._attend_all(due, room, ticket)
            if shown is not None and shown.is_joined and shown.seen is None:
                shown.seen = await self._attend_clip(shown, room, ticket)
            for look in pending:  # also those that are done: a closer view may be allowed now
                self._decide(look, ticket)
            pending = [look for look in pending if not look.is_done]
            if not pending:
                break
            ticket.reservation.give_back(room, finished=False)
        ticket.cache = "miss" if ticket.encoded else "hit"
        ticket.detail = "high" if any(look.detail == "high" for look in looks.values()) else "low"
        ticket.fit = next((look.viewport.fit for look in looks.values() if look.viewport is not None), "squash")
        ticket.reduced = any(self._is_reduced(look, ticket.request) for look in every if look.is_read)
        if shown is not None and self.clip_stage.is_reduced(shown, ticket.request):
            ticket.reduced = True
        return self._sight(images, looks, shown, ticket.request.question)

    def _sight(self, images: Sequence[Image], looks: Mapping[str, Look], shown: Shown | None, question: str) -> Sight:
        """Put the results in the order of the prompt.

        A picture that is both an image and a frame has two looks, and a GPU's results for them can differ in their last
        bits. Their embedding key is the same, so the frame gets the image's visual tokens.
        """
        first: dict[bytes, Seen] = {}

        def result(digest: str, look: Look) -> Seen:
            seen = result_of(look)
            return first.setdefault(embedding_key(self.card, digest, question, seen), seen)

        seen = tuple(result(image.digest, looks[image.digest]) for image in images)
        if shown is None:
            return Sight(seen)
        if shown.is_joined:
            return Sight(seen, shown.frames, clip=shown.seen)
        of_frames = tuple(result(frame.digest, shown.looks[frame.digest]) for frame in shown.frames)
        return Sight(seen, shown.frames, of_frames)

    async def _looks(self, images: Sequence[Image], ticket: Ticket) -> dict[str, Look]:
        """Make one look for each different image, by digest: an image that is given twice is looked at once.

        Raises InvalidImage, TooLarge, Overloaded.
        """
        question = self.prompts.question(ticket.request.question)
        looks: dict[str, Look] = {}
        for number, image in enumerate(images):
            if image.digest not in looks:
                require_page(image.data, image.page)
                looks[image.digest] = look = Look(number, image, question)
                await self._fit(look, ticket)
        return looks

    async def _fit(self, look: Look, ticket: Ticket) -> None:
        """Find what to see of the image. If its header has no size, the decoder refuses the image.

        Raises InvalidImage, TooLarge, Overloaded.
        """
        fit, image = ticket.request.fit or self.card.fit, look.image
        if fit == "squash":
            return
        if reads_as_pdf(image.data):
            known = self.pixels.page_sizes.get(image.digest)
            size = known or await self._measure(look, ticket)
        else:
            size = image.upright_size
        if size is not None:
            look.viewport, look.tiles = fitting(*size, fit, self.card.pad_colour)

    async def _measure(self, look: Look, ticket: Ticket) -> tuple[int, int] | None:
        """Open a PDF for the size of its page. Raises InvalidImage, TooLarge, Overloaded."""
        self.pixels.reserve(look, ticket.reservation)
        kind = Kind.of(len(ticket.request.images))
        claim = await turn(Resource.VISION, 1, kind, ticket)
        size = await self.pixels.measure(look, claim, ticket)
        ticket.reservation.give_back(claim)
        return size

    def _decide(self, look: Look, ticket: Ticket) -> None:
        if not look.is_read:
            look.step = next_step_to_features(look)
            return
        look.step = next_step(look, self._situation(look, ticket.request))
        if look.step == ChooseTile():
            self._choose_tile(look, ticket.request)
            look.step = next_step(look, self._situation(look, ticket.request))

    def _choose_tile(self, look: Look, request: Request) -> None:
        """Under strain, a tile is looked at only if the visual cache has it, as a closer view is."""
        closer_view_at = self.card.closer_view_at if self.card.closer_view else None
        tile = tile_of(result_of(look).relevance, look.tiles, closer_view_at)
        possible = tile is not None and (
            self.admission.level_now().closer_view
            or self.visual.holds(*self._keys(replace(look, viewport=tile), "low", request))
        )
        look.choose(tile, possible)

    def _situation(self, look: Look, request: Request) -> Situation:
        if look.is_frame:
            return OF_FRAME
        needs_closer = request.budget.vision_tokens[0] > self.card.vision_tokens[1]
        # Otherwise skip both lookups: no closer view can follow.
        may_want_closer = needs_closer or request.detail != "low"
        allows_closer = may_want_closer and self.admission.level_now().closer_view
        return Situation(
            asks=request.detail,
            needs_closer=needs_closer,
            offers_closer=self.card.closer_view,
            closer_view_at=self.card.closer_view_at,
            allows_closer=allows_closer,
            holds_closer=may_want_closer
            and not allows_closer
            and self.visual.holds(*self._keys(look, "high", request)),
        )

    def _is_reduced(self, look: Look, request: Request) -> bool:
        """Return whether the request got less for this image than it allows."""
        is_denied = look.is_tile_denied or look.step == Done(is_denied=True)
        return is_denied or result_of(look).budget != self._asked(look.detail, request)

    def _recall(self, look: Look, ticket: Ticket) -> None:
        """Ask the visual cache for as long as the next step is Recall."""
        while isinstance(step := look.step, Recall):
            look.recall(step.detail, self.visual.get(*self._keys(look, step.detail, ticket.request)))
            self._decide(look, ticket)
        if look.is_done:
            self.pixels.remember(look, ticket.request)

    def _keys(self, look: Look, detail: Literal["low", "high"], request: Request) -> list[bytes]:
        """Return the visual cache's keys that can answer the request, best first.

        A hit with the request's own budget costs no vision work, so it is used at any fidelity level. The exception is
        a budget with more visual tokens for the LLM than the level allows.
        """
        asked = self._asked(detail, request)
        allowed = self.admission.level_now().cap(asked)
        budgets = (asked, allowed) if asked.visual_tokens == allowed.visual_tokens else (allowed,)
        return [
            visual_key(self.card, look.digest, request.question, budget, detail) for budget in dict.fromkeys(budgets)
        ]

    def _keep(self, look: Look, seen: Seen, request: Request) -> None:
        if self.card.confidence is not None and look.vision is not None:
            seen = replace(seen, strangeness=self.card.confidence.strangeness(look.vision))
        if look.viewport is not None:
            seen = replace(seen, viewport=look.viewport, relevance=replace(seen.relevance, area=look.viewport.area))
        look.seen = seen
        key = visual_key(self.card, look.digest, request.question, seen.budget, seen.detail)
        self.visual.keep(key, seen)

    async def _find_all(self, looks: Sequence[Look], ticket: Ticket) -> None:
        for look in looks:
            self._decide(look, ticket)
        await together(self._find, looks, ticket)

    async def _find(self, look: Look, ticket: Ticket) -> None:
        """Do all steps up to Attend or Done. Raises Overloaded."""
        while not isinstance(look.step, Attend | Done):
            match look.step:
                case Recall():
                    self._recall(look, ticket)
                    continue
                case See() | Encode() | EncodeCloser() as step:
                    find = self._find_closer if isinstance(step, EncodeCloser) else self._find_first
                    is_optional = look.overview is not None or (not isinstance(step, See) and step.is_optional)
                    try:
                        await find(look, ticket)
                    except (Overloaded, TooLarge):  # a tile, or a closer view, can take longer to draw than the whole
                        if not is_optional:
                            raise
                        look.fall_back()
            self._decide(look, ticket)

    async def _find_first(self, look: Look, ticket: Ticket) -> None:
        """Find or encode the features of the first view. If the step is See, a new image is attended to as well."""
        key = first_view(self.card.fingerprint, look.digest)
        work: Work[VisionFeatures] = partial(self._see, look, ticket.request) if look.step == See() else self._encode
        look.vision = await self._find_view(look, key, work, ticket)

    async def _find_closer(self, look: Look, ticket: Ticket) -> None:
        key = closer_view(self.card.fingerprint, look.digest)
        look.closer = await self._find_view(look, key, self._encode_closer, ticket)

    async def _find_view(self, look: Look, key: FeatureKey[Features], work: Work[Features], ticket: Ticket) -> Features:
        """Find the features of one view, or encode it. If the caller leaves, the encode goes on.

        It then holds its vision slots, and its features are kept.
        """
        async with AsyncExitStack() as flight:
            with ticket.stage("vision"), ticket.stage("lookup"):  # may wait for another request's encode
                found = await flight.enter_async_context(self._lookup(key, ticket))
                ticket.tell(hit=found.features is not None, view=key.view)
            if found.features is not None:
                self.pixels.remember(look, ticket.request)
                return found.features
            async with self._encoding(look, key.view, ticket) as (decoded, claim):
                encode = asyncio.create_task(work(decoded, max(ticket.left_s, ENCODE_TIMEOUT_S)))
                found.expect(encode)
                features = await to_its_end(encode, claim, ticket.reservation)
                if look.seen is not None:
                    relevance, visual_tokens = look.seen.relevance, look.seen.visual_tokens
                    ticket.tell(vision_tokens=relevance.vision_tokens, visual_tokens=len(visual_tokens))
            return features

    async def _see(self, look: Look, request: Request, decoded: Decoded, timeout_s: float) -> VisionFeatures:
        """Encode and attend in one call. Keep what the request sees."""
        vision, seen = await self.vision.see(decoded.pixels, look.question, self._allowed(look, request), timeout_s)
        look.vision = vision
        self._keep(look, seen, request)
        return vision

    async def _encode(self, decoded: Decoded, timeout_s: float) -> VisionFeatures:
        (vision,) = await self.vision.encode(decoded.pixels[np.newaxis], timeout_s)
        return vision

    async def _encode_closer(self, decoded: Decoded, timeout_s: float) -> CloserFeatures:
        return CloserFeatures.joined(await self.vision.encode(decoded.crops, timeout_s))

    def _lookup(self, key: FeatureKey[Features], ticket: Ticket) -> AbstractAsyncContextManager[Found[Features]]:
        patient = ticket.request.priority is Priority.LOW
        return self.features.find(key, ticket.left_s, patient=patient, waiting=ticket.reservation.waiting_for_others)

    async def _attend_all(self, looks: Sequence[Look], room: Claim, ticket: Ticket) -> None:
        """Attend to all that is encoded.

        If the caller leaves, the calls go on and hold the request's tokens: Triton has them.
        """
        work = asyncio.create_task(together(self._attend, looks, ticket))
        with ticket.stage("vision"), ticket.stage("attend"):
            await to_its_end(work, room, ticket.reservation, finished=False)
            seen = [result_of(look) for look in looks]
            ticket.tell(
                vision_tokens=sum(each.relevance.vision_tokens for each in seen),
                visual_tokens=sum(len(each.visual_tokens) for each in seen),
            )

    async def _attend_clip(self, shown: Shown, room: Claim, ticket: Ticket) -> SeenClip:
        """As `_attend_all`."""
        work = asyncio.create_task(self.clip_stage.attend(shown, ticket))
        with ticket.stage("vision"), ticket.stage("attend"):
            seen = await to_its_end(work, room, ticket.reservation, finished=False)
            ticket.tell(vision_tokens=seen.vision_tokens, visual_tokens=len(seen.visual_tokens))
        return seen

    async def _attend(self, look: Look, ticket: Ticket) -> None:
        """Attend to one look. Raises Overloaded if it has no earlier result."""
        assert look.vision is not None
        budget = self._allowed(look, ticket.request)
        try:
            seen = await self.vision.attend(look.vision, look.question, budget, ticket.left_s, look.closer)
        except Overloaded:
            if look.low is None and look.overview is None:
                raise
            look.fall_back()
            return
        views = [view for view in (look.vision, look.closer) if view is not None]
        self._keep(look, replace(seen, rounded=rounded_among(views)), ticket.request)

    def _asked(self, detail: Literal["low", "high"], request: Request) -> Budget:
        """Return the request's budget, limited to the tokens that the views of this detail have."""
        return request.budget.within(self.card.vision_tokens[1]) if detail == "low" else request.budget

    def _allowed(self, look: Look, request: Request) -> Budget:
        """Give the budget at the fidelity level now."""
        return self.admission.level_now().cap(self._asked(look.detail, request))

    @asynccontextmanager
    async def _encoding(self, look: Look, view: int, ticket: Ticket) -> AsyncIterator[tuple[Decoded, Claim]]:
        """Wait for vision slots, then decode the image for this view. Hold the slots, a claim, for the block.

        Raises Overloaded.
        """
        images = CROPS if view == CLOSER_SIZE else 1
        self.pixels.reserve(look, ticket.reservation)
        slots = min(images, self.admission.vision_slots)
        kind = Kind.of(max(images, len(ticket.request.images) + ticket.frames))
        claim = await turn(Resource.VISION, slots, kind, ticket)
        ticket.encoded += images
        ticket.encoded_frames += look.is_frame
        look.encoded = max(look.encoded, images)  # a page and its tile are one image
        try:
            decoded = await self.pixels.decode_look(look, view, claim, ticket)
            self.pixels.remember(look, ticket.request)
            with ticket.stage("vision"), ticket.stage("see"):
                ticket.tell(images=images)
                yield decoded, claim
        except (Overloaded, TooLarge):  # the look may fall back and go on without the slots
            ticket.reservation.give_back(claim, finished=False)
            raise
        ticket.reservation.give_back(claim)


def result_of(look: Look) -> Seen:
    """Return the result of a look that is done."""
    assert look.seen is not None
    return look.seen
