"""Choose the frames of a clip that are looked at, and attend to them together if the models can."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from service.admission.admission import Admission, Reservation
from service.admission.scheduler import Kind, Resource
from service.cache.visual_tokens import VisualCache, clip_key
from service.core.card import ModelCard
from service.core.models import VisionModel
from service.core.request import Budget, Request
from service.core.vision import Frame, SeenClip, rounded_among
from service.media.store import LoadedClip
from service.record.ticket import Ticket
from service.text.prompt import PromptBuilder
from service.vision_stage.changes import Change, changes_of, largest
from service.vision_stage.clips import ClipMemory, Shown, changed_key, given_frames, most_found
from service.vision_stage.pixels import Pixels
from service.vision_stage.plan import Look
from service.vision_stage.turns import turn

FindFeatures = Callable[[Sequence[Look], Ticket, Reservation], Awaitable[None]]  # of all looks at the same time


class ClipStage:
    """Do what is done once for the clip of a request. Made once by the vision stage, which looks at the frames."""

    def __init__(
        self,
        *,
        vision: VisionModel,
        admission: Admission,
        card: ModelCard,
        prompts: PromptBuilder,
        pixels: Pixels,
        visual: VisualCache,
        clips: ClipMemory,
    ) -> None:
        self.vision = vision
        self.admission = admission
        self.card = card
        self.prompts = prompts
        self.pixels = pixels
        self.visual = visual
        self.clips = clips

    async def shown(self, clip: LoadedClip, find: FindFeatures, ticket: Ticket, reservation: Reservation) -> Shown:
        """Choose the frames that are looked at. Raises InvalidImage, TooLarge, Overloaded."""
        request, question = ticket.request, self.prompts.question(ticket.request.question)
        asked = self.prompts.frames(request)
        most = min(asked, self.admission.fidelity.frames)
        compares = request.clip is not None and request.clip.sampling == "change"
        shown = Shown(clip, most_found(request, most), question, self.card.clip is not None)
        if shown.film is not None:
            shown.reel = self.clips.reel(shown.film.file.digest, shown.film.most)
        shown.frames = await self._frames(shown, ticket, reservation)
        has_more = shown.frames[-1].index >= len(shown.frames)
        ticket.compared = len(shown.frames)
        if compares:
            changes = await self._changes(shown, find, ticket, reservation)
            has_more = len(changes) > most
            shown.frames = tuple(shown.frames[place] for place in largest(changes, most))
        ticket.frames = len(shown.frames)
        shown.is_reduced = most < asked and has_more
        if shown.is_joined:
            budgets = dict.fromkeys((self._asked(request), self._allowed(request)))
            keys = [clip_key(self.card, shown.frames, request.question, budget) for budget in budgets]
            shown.seen = self.visual.get_clip(*keys)
        if shown.seen is None:
            shown.look(is_read=not shown.is_joined)
        else:
            self.pixels.remember_clip(shown, request)
        return shown

    async def _frames(self, shown: Shown, ticket: Ticket, reservation: Reservation) -> tuple[Frame, ...]:
        """Name the clip's frames. A file is decoded if it is not known which frames it has."""
        film = shown.film
        if film is None:
            return given_frames(shown.clip, shown.most)
        known = self.clips.frames(film.file.digest, film.most)
        if known is not None:
            return known
        self.pixels.reserve_film(film, reservation)
        claim = await turn(Resource.VISION, 1, Kind.MULTI_IMAGE, ticket, reservation)
        known = self.clips.frames(film.file.digest, film.most)  # of another request that waited too
        if known is None:
            clip = await self.pixels.of_film(film, claim, ticket, reservation)
            known = self.clips.frames(film.file.digest, film.most) or self.clips.keep(film.file, film.most, clip)
        reservation.give_back(claim)
        return known

    async def _changes(
        self, shown: Shown, find: FindFeatures, ticket: Ticket, reservation: Reservation
    ) -> Sequence[Change]:
        """Find the frames that show something new, by the features of all."""
        key = changed_key(self.card.fingerprint, shown.frames)
        if (known := self.clips.changes(key)) is not None:
            return known
        ticket.frames = len(shown.frames)
        shown.look(is_read=False)
        await find(list(shown.looks.values()), ticket, reservation)
        with ticket.stage("vision"):
            changes = await asyncio.to_thread(changes_of, shown.vision)
        return self.clips.keep_changes(key, changes)

    async def attend(self, shown: Shown, ticket: Ticket) -> SeenClip:
        """Attend to all frames of the clip in one call. Keep what the request sees."""
        request = ticket.request
        vision, places = shown.vision, [frame.at for frame in shown.frames]
        with ticket.stage("vision"), ticket.stage("attend"):
            budget = self._allowed(request)
            seen = await self.vision.attend_clip(vision, places, shown.question, budget, ticket.left_s)
            ticket.tell(vision_tokens=seen.vision_tokens, visual_tokens=len(seen.visual_tokens))
        seen = replace(seen, rounded=rounded_among(vision))
        self.visual.keep(clip_key(self.card, shown.frames, request.question, seen.budget), seen)
        return seen

    def _asked(self, request: Request) -> Budget:
        """Return the budget of the whole clip, which the clip resampler can spend."""
        assert self.card.clip is not None
        return self.card.clip.budget(request.budget)

    def _allowed(self, request: Request) -> Budget:
        return self.admission.fidelity.cap(self._asked(request))

    def is_reduced(self, shown: Shown, request: Request) -> bool:
        if shown.seen is not None and shown.seen.budget != self._asked(request):
            return True
        return shown.is_reduced
