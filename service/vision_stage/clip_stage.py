"""Choose the frames of a clip that are looked at, and attend to them together if the models can."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from service.admission.admission import Admission
from service.admission.scheduler import Kind, Resource
from service.cache.features import FeatureCache
from service.cache.keys import first_view
from service.cache.visual_tokens import VisualCache, clip_key
from service.core.card import ModelCard
from service.core.models import VisionModel
from service.core.request import Budget, Request
from service.core.vision import Frame, SeenClip, VisionFeatures, rounded_among
from service.media.store import LoadedClip
from service.record.ticket import Ticket
from service.text.prompt import PromptBuilder
from service.vision_stage.changes import Change, changes_of, largest
from service.vision_stage.clips import ClipMemory, Shown, changed_key, given_frames, most_found, some_of
from service.vision_stage.pixels import Pixels
from service.vision_stage.plan import Look
from service.vision_stage.turns import turn

FindFeatures = Callable[[Sequence[Look], Ticket], Awaitable[None]]  # of all looks at the same time


@dataclass(kw_only=True, eq=False)
class Stage:
    """Hold what looking at images and at clips needs."""

    vision: VisionModel
    admission: Admission
    card: ModelCard
    prompts: PromptBuilder
    pixels: Pixels
    features: FeatureCache
    visual: VisualCache


@dataclass(kw_only=True, eq=False)
class ClipStage(Stage):
    """Do what is done once for a request's clip; the vision stage looks at its frames. Made once by the pipeline."""

    clips: ClipMemory

    async def shown(self, clip: LoadedClip, find: FindFeatures, ticket: Ticket) -> Shown:
        """Choose the frames that are looked at. Raises InvalidImage, TooLarge, Overloaded."""
        request, question = ticket.request, self.prompts.question(ticket.request.question)
        asked = self.prompts.frames(request)
        most = min(asked, self.admission.level_now().frames)
        shown = Shown(clip, self._most_found(clip, asked, most, request), question, self.card.clip is not None)
        if shown.film is not None:
            shown.reel = self.clips.reel(shown.film.file.digest, shown.film.most)
        compares = request.clip is not None and request.clip.sampling == "change"
        needed = shown.most if compares else most
        shown.frames = found = await self._frames(shown, needed, ticket)
        ticket.compared = len(found)
        if compares:
            changes = await self._changes(shown, find, ticket)
            shown.frames = tuple(found[place] for place in largest(changes, asked))
            fewer = tuple(found[place] for place in largest(changes, most))
        else:
            fewer = some_of(found, most)
            shown.is_reduced = shown.most < asked and found[-1].index >= len(found)
        if len(fewer) < len(shown.frames) and not self._costs_little(shown.frames, request):
            shown.frames, shown.is_reduced = fewer, True
        ticket.frames = len(shown.frames)
        if not compares:
            ticket.compared = len(shown.frames)
        if shown.is_joined:
            shown.seen = self.visual.get_clip(*self._keys(shown.frames, request))
        if shown.seen is None:
            shown.look(is_read=not shown.is_joined)
        else:
            self.pixels.remember_clip(shown, request)
        return shown

    def _most_found(self, clip: LoadedClip, asked: int, most: int, request: Request) -> int:
        """Return among how many frames those that are looked at are chosen.

        Under load, choose from the frames of an unloaded request, because their features may be cached. If they would
        first have to be decoded, decode only the frames needed.
        """
        wide = most_found(request, asked)
        if clip.file is None or most == asked or self.clips.has_compared(clip.file.digest, wide):
            return wide
        named = self.clips.frames(clip.file.digest, wide)
        is_held = named is not None and self._holds(some_of(named, most))
        return wide if is_held else most_found(request, most)

    def _costs_little(self, frames: Sequence[Frame], request: Request) -> bool:
        """Return whether strain is no reason for fewer frames.

        That is so if they need no encode and, with a clip resampler, no more visual tokens.
        """
        is_joined = self.card.clip is not None
        return is_joined and (self.visual.holds(*self._keys(frames, request)) or self._holds(frames))

    def _holds(self, frames: Sequence[Frame]) -> bool:
        """Return whether this process has the features of all frames."""
        return all(self.features.holds(first_view(self.card.fingerprint, frame.digest)) for frame in frames)

    def _keys(self, frames: Sequence[Frame], request: Request) -> list[bytes]:
        """Return the visual cache's keys that can answer the request, best first."""
        budgets = dict.fromkeys((self._asked(request), self._allowed(request)))
        return [clip_key(self.card, frames, request.question, budget) for budget in budgets]

    async def _frames(self, shown: Shown, needed: int, ticket: Ticket) -> tuple[Frame, ...]:
        """Name the clip's frames, of which so many are needed.

        A file is decoded if it is not known which frames it has. It is also decoded if it is not known which of them
        have equal pixels, and features are missing: so each scene is encoded once.
        """
        film = shown.film
        if film is None:
            return given_frames(shown.clip, shown.most)
        digest = film.file.digest
        known = self.clips.frames(digest, film.most)
        if known is not None and (self.clips.has_compared(digest, film.most) or self._holds(some_of(known, needed))):
            return known
        self.pixels.reserve_film(film, ticket.reservation)
        claim = await turn(Resource.VISION, 1, Kind.MULTI_IMAGE, ticket)
        known = self.clips.frames(digest, film.most)
        if known is None or not self.clips.has_compared(digest, film.most):  # by another request that waited too
            clip = await self.pixels.decode_clip(film, claim, ticket)
            known = self.clips.frames(digest, film.most) or self.clips.keep(film.file, film.most, clip)
        ticket.reservation.give_back(claim)
        return known

    async def _changes(self, shown: Shown, find: FindFeatures, ticket: Ticket) -> Sequence[Change]:
        """Find the frames that show something new, by the features of all."""
        key = changed_key(self.card.fingerprint, shown.frames)
        if (known := self.clips.changes(key)) is not None:
            return known
        ticket.frames = len(shown.frames)
        shown.look(is_read=False)
        await find(list(shown.looks.values()), ticket)
        with ticket.stage("vision"):
            changes = await asyncio.to_thread(changes_of, shown.vision)
        return self.clips.keep_changes(key, changes)

    async def attend(self, shown: Shown, ticket: Ticket) -> SeenClip:
        """Attend to all frames of the clip in one call. Keep what the request sees."""
        request = ticket.request
        vision, places = shown.vision, [frame.at for frame in shown.frames]
        budget = self._allowed(request)
        seen = await self.vision.attend_clip(vision, places, shown.question, budget, ticket.left_s)
        strangeness = await asyncio.to_thread(self._strangeness, vision)
        seen = replace(seen, rounded=rounded_among(vision), strangeness=strangeness)
        self.visual.keep(clip_key(self.card, shown.frames, request.question, seen.budget), seen)
        return seen

    def _strangeness(self, vision: Sequence[VisionFeatures]) -> float:
        calibration = self.card.confidence
        return 0.0 if calibration is None else fmean(map(calibration.strangeness, vision))

    def _asked(self, request: Request) -> Budget:
        """Return the budget of the whole clip, which the clip resampler can spend."""
        assert self.card.clip is not None
        return self.card.clip.budget(request.budget)

    def _allowed(self, request: Request) -> Budget:
        return self.admission.level_now().cap(self._asked(request))

    def is_reduced(self, shown: Shown, request: Request) -> bool:
        if shown.seen is not None and shown.seen.budget != self._asked(request):
            return True
        return shown.is_reduced
