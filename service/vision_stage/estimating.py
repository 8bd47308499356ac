"""Say what a request would cost and whether it would be admitted now, from fields and headers: nothing is decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from service.admission.admission import Admission, Reservation
from service.admission.quota import Cost
from service.admission.scheduler import Claim, Kind, Resource
from service.cache.features import FeatureCache
from service.cache.keys import first_view
from service.core.card import ModelCard
from service.core.errors import InvalidImage, naming_frame, naming_image
from service.core.estimate import Amounts, Estimate, EstimatedClip, EstimatedImage, NotAdmitted
from service.core.latest import Latest
from service.core.request import Budget, Request
from service.core.viewport import fitting, viewed
from service.core.vision import Frame
from service.media.clip import require_told
from service.media.clip_header import clip_cost, require_clip, told_of
from service.media.decoder import ImageLimits, require_bytes, require_size
from service.media.foreign import found_in
from service.media.formats import SENT
from service.media.header import header_size, require_page
from service.media.store import Image, LoadedClip
from service.text.prompt import PromptBuilder
from service.vision_stage import decoding_cost
from service.vision_stage.clips import ClipMemory, given_frames, most_found


@dataclass(kw_only=True, eq=False)
class Estimator:
    """Read headers and ask admission, but reserve nothing."""

    card: ModelCard  # in the precision that the models compute in, as the vision stage has it
    prompts: PromptBuilder
    admission: Admission
    features: FeatureCache
    clips: ClipMemory
    limits: ImageLimits
    page_sizes: Latest[str, tuple[int, int]]

    def estimate(
        self,
        request: Request,
        images: Sequence[Image],
        clip: LoadedClip | None,
        tokens: int,
        reservation: Reservation,
    ) -> Estimate:
        """`tokens`: the most LLM tokens that the request can use. Its body's bytes are reserved already.

        Raises InvalidImage, TooLarge.
        """
        described = []
        for index, image in enumerate(images):
            with naming_image(index, len(images)):
                described.append(self._described(image, request))
        new = {image.id: image for image, each in zip(images, described, strict=True) if not each.known}
        pixels = sum(decoding_cost(image.data, self.limits.max_pixels, image.page).pixels for image in new.values())
        level = self.admission.level_now()
        asked, budget = self.prompts.frames(request), level.cap(request.budget)
        frames = min(asked, level.frames)
        shown = None if clip is None else self._described_clip(clip, request, frames)
        if clip is not None and shown is not None and not shown.known:
            pixels += self._clip_pixels(clip, request, frames)
            new |= {image.id: image for image in clip.sent}
        cost = Cost(0, pixels, max(tokens, self.admission.row_tokens))
        refusal = reservation.refusal_of(cost, self._claims(request, len(new), cost))
        budgets = self._budgets(budget, len(images), frames)
        return Estimate(
            prompt_tokens=tokens - self.prompts.visual_tokens(request) - request.sampling.max_tokens,
            max_tokens=request.sampling.max_tokens,
            vision_tokens=_total([each.vision_tokens for each in budgets]),
            visual_tokens=_total([each.visual_tokens for each in budgets]),
            reduced=budget != request.budget or frames < asked,
            images=tuple(described),
            clip=shown,
            cost=Amounts(reservation.nbytes, cost.pixels, cost.tokens),
            limits=Amounts(*self.admission.quota.limits),
            refusal=None if refusal is None else NotAdmitted(refusal.code, refusal.message, refusal.retry_after_s),
        )

    def _described(self, image: Image, request: Request) -> EstimatedImage:
        require_bytes(image.data, self.limits)
        require_page(image.data, image.page)
        size = header_size(image.data, image.page)
        if size == (0, 0):
            raise InvalidImage(f"{found_in(image.data)}; {SENT}", param="image")
        if size is not None:
            require_size(*size, self.limits)
        width, height = size or (None, None)
        upright = image.upright_size or self.page_sizes.get(image.digest)
        fit, colour = request.fit or self.card.fit, self.card.pad_colour
        viewport = None if upright is None else fitting(*upright, fit, colour).viewport
        known = self.features.holds(first_view(self.card.fingerprint, viewed(image.digest, viewport)))
        return EstimatedImage(image.id, len(image.data), width, height, known)

    def _described_clip(self, clip: LoadedClip, request: Request, frames: int) -> EstimatedClip:
        for place, image in enumerate(clip.images):
            with naming_frame(place, len(clip.images)):
                self._described(image, request)
        if clip.file is not None:
            require_bytes(clip.file.data, self.limits, "video")
            require_clip(clip.file.data)
            require_told(told_of(clip.file.data), self.limits)
        named = self._named(clip, request, frames)
        known = named is not None and all(
            self.features.holds(first_view(self.card.fingerprint, frame.digest)) for frame in named
        )
        nbytes = sum(len(image.data) for image in clip.sent)
        return EstimatedClip("" if clip.file is None else clip.file.id, nbytes, frames, known)

    def _named(self, clip: LoadedClip, request: Request, frames: int) -> Sequence[Frame] | None:
        """Return the frames whose features are needed; None for a file that was not decoded before."""
        most = most_found(request, frames)
        return given_frames(clip, most) if clip.file is None else self.clips.frames(clip.file.digest, most)

    def _clip_pixels(self, clip: LoadedClip, request: Request, frames: int) -> int:
        most = most_found(request, frames)
        if clip.file is not None:
            return clip_cost(clip.file.data, most, self.limits.max_pixels)
        return sum(
            decoding_cost(clip.images[frame.index].data, self.limits.max_pixels).pixels
            for frame in given_frames(clip, most)
        )

    def _budgets(self, budget: Budget, images: int, frames: int) -> list[Budget]:
        """Return the budget of each image, and of each frame or of the whole clip."""
        if self.card.clip is None or not frames:
            return [budget] * (images + frames)
        return [*[budget] * images, self.card.clip.budget(budget)]

    def _claims(self, request: Request, new: int, cost: Cost) -> list[Claim]:
        """Return the claims that the request would make, without making them."""
        now = time.monotonic()
        kind = Kind.of(self.prompts.pictures(request)) if new else Kind.FOLLOW_UP
        amounts = {Resource.LLM: cost.tokens} | ({Resource.VISION: 1} if new else {})
        return [
            Claim(resource, amount, kind, now, now + request.timeout_s, request.tenant, request.priority)
            for resource, amount in amounts.items()
        ]


def _total(ranges: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Add up the least and the most."""
    return sum(least for least, _ in ranges), sum(most for _, most in ranges)
