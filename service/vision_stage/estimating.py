"""Say what a request would cost and whether it would be admitted now, from fields and headers: nothing is decoded."""

from __future__ import annotations

import time
from collections.abc import Sequence

from service.admission.admission import Admission, Reservation
from service.admission.quota import Cost
from service.admission.scheduler import Claim, Kind, Resource
from service.cache.features import FeatureCache
from service.cache.keys import first_view
from service.core.card import ModelCard
from service.core.errors import InvalidImage, naming_image
from service.core.estimate import Amounts, Estimate, EstimatedImage, NotAdmitted
from service.core.request import Request
from service.core.viewport import fitting, viewed
from service.media.decoder import ImageLimits, require_bytes, require_size
from service.media.foreign import found_in
from service.media.formats import SENT
from service.media.header import header_size, require_page, upright_size
from service.media.store import Image
from service.vision_stage import decoding_cost
from service.vision_stage.page_sizes import PageSizes


class Estimator:
    """Read headers and ask admission, but reserve nothing."""

    def __init__(
        self,
        card: ModelCard,
        admission: Admission,
        features: FeatureCache,
        limits: ImageLimits,
        page_sizes: PageSizes,
    ) -> None:
        self.card = card
        self.admission = admission
        self.features = features
        self.limits = limits
        self.page_sizes = page_sizes

    def estimate(self, request: Request, images: Sequence[Image], tokens: int, reservation: Reservation) -> Estimate:
        """`tokens`: the most LLM tokens that the request can use. Its body's bytes are reserved already.

        Raises InvalidImage, TooLarge.
        """
        described = []
        for index, image in enumerate(images):
            with naming_image(index, len(images)):
                described.append(self._described(image, request))
        new = {image.id: image for image, each in zip(images, described, strict=True) if not each.known}
        pixels = sum(decoding_cost(image.data, self.limits.max_pixels, image.page).pixels for image in new.values())
        cost = Cost(0, pixels, max(tokens, self.admission.row_tokens))
        refusal = reservation.refusal_of(cost, self._claims(request, len(new), cost))
        budget, count = self.admission.fidelity.cap(request.budget), len(images)
        return Estimate(
            prompt_tokens=tokens - count * request.budget.visual_tokens[1] - request.sampling.max_tokens,
            max_tokens=request.sampling.max_tokens,
            vision_tokens=(count * budget.vision_tokens[0], count * budget.vision_tokens[1]),
            visual_tokens=(count * budget.visual_tokens[0], count * budget.visual_tokens[1]),
            reduced=budget != request.budget,
            images=tuple(described),
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
        upright = upright_size(image.data, image.page) or self.page_sizes.get(image.digest)
        fit, colour = request.fit or self.card.fit, self.card.pad_colour
        viewport = None if upright is None else fitting(*upright, fit, colour).viewport
        known = self.features.holds(first_view(self.card.fingerprint, viewed(image.digest, viewport)))
        return EstimatedImage(image.id, len(image.data), width, height, known)

    def _claims(self, request: Request, new: int, cost: Cost) -> list[Claim]:
        """Return the claims that the request would make, without making them."""
        now = time.monotonic()
        kind = Kind.of(len(request.images)) if new else Kind.FOLLOW_UP
        amounts = {Resource.LLM: cost.tokens} | ({Resource.VISION: 1} if new else {})
        return [
            Claim(resource, amount, kind, now, now + request.timeout_s, request.tenant, request.priority)
            for resource, amount in amounts.items()
        ]
