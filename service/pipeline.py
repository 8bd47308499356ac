"""Run one request: admit, load, look, generate. This module knows no transport and no Triton."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from service.admission.admission import Admission, Reservation, Size
from service.admission.patience import NO_PATIENCE, Patience
from service.admission.quota import Cost
from service.cache.features import FeatureCache, SharedTier
from service.cache.shared_images import SharedImages
from service.cache.visual_tokens import VisualCache, clip_embedding_key, embedding_key
from service.core.access import Accounts, NoQuotas, Use
from service.core.answer import Delta, Finished, FrameSeen, KeptImage, LogProb, TokenLogProb
from service.core.card import ModelCard
from service.core.confidence import Confidence, Signals
from service.core.errors import Unavailable
from service.core.estimate import Estimate
from service.core.models import Generation, LanguageModel, VisionModel
from service.core.prompt import Prompt
from service.core.request import Request
from service.core.variant import Route
from service.core.vision import Sight
from service.images import Images
from service.loading import Loader
from service.media.fetch import ImageFetcher
from service.media.reader import ImageReader
from service.media.store import Image, ImageStore, LoadedClip
from service.record.outcomes import Outcomes
from service.record.ticket import Ticket
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.text.guide_checks import GuideChecks
from service.text.prompt import Detokeniser, PromptBuilder
from service.uploads import Uploads
from service.upstreams.attempts import Attempts
from service.upstreams.models import Choice, Model, Models
from service.vision_stage import Pixels, VisionStage
from service.vision_stage.clip_stage import ClipStage
from service.vision_stage.clips import ClipMemory
from service.vision_stage.estimating import Estimator

if TYPE_CHECKING:
    from service.telemetry.spans import Traces

__all__ = ["Patience", "Pipeline", "Reservation", "Size"]  # the only names that a transport imports


class Pipeline:
    """Hold everything that is needed to answer. Made once by the composition root."""

    def __init__(
        self,
        *,
        admission: Admission,
        models: Models,
        reader: ImageReader,
        settings: Settings,
        metrics: Metrics,
        shared: SharedTier | None = None,
        accounts: Accounts | None = None,
        shared_images: SharedImages | None = None,
        fetcher: ImageFetcher | None = None,
        traces: Traces | None = None,
    ) -> None:
        """`models` may be empty until the service runs; `model` makes one. `fetcher`: None to refuse image URLs."""
        self.accounts = accounts or NoQuotas()
        self.admission = admission
        self.models = models
        self.reader = reader
        self.settings = settings
        self.metrics = metrics
        self.outcomes = Outcomes(metrics, traces, always_streams=settings.first_token_budget_s is not None)
        self.images = Images(
            ImageStore(settings.image_store_bytes, settings.image_ttl_s),
            reader,
            metrics,
            shared_images,
            apart=settings.keeps_tenants_apart,
        )
        self.features = FeatureCache(
            settings.feature_cache_bytes, metrics, shared, as_int8=settings.feature_cache_dtype == "int8"
        )
        self.visual = VisualCache(settings.visual_cache_bytes, metrics)
        self.clips = ClipMemory()
        self.pixels = Pixels(reader, self.images, self.clips)
        self.loader = Loader(self.images, fetcher)
        self.uploads = Uploads(self.images, self.pixels, models, settings, metrics)
        self.guides = GuideChecks()

    def model(
        self, vision: VisionModel, language: LanguageModel, card: ModelCard, prompts: PromptBuilder, **fields: Any
    ) -> Model:
        """Make what answers for one variant, with the parts that all variants share. `fields` are those of Model."""
        parts: dict[str, Any] = {
            "vision": vision,
            "admission": self.admission,
            "card": card,
            "prompts": prompts,
            "pixels": self.pixels,
            "features": self.features,
            "visual": self.visual,
        }
        stage = VisionStage(**parts, clip_stage=ClipStage(**parts, clips=self.clips))
        estimator = Estimator(
            card=card,
            prompts=prompts,
            admission=self.admission,
            features=self.features,
            clips=self.clips,
            limits=self.reader.limits,
            page_sizes=self.pixels.page_sizes,
        )
        return Model(card, prompts, stage, language, estimator, **fields)

    @property
    def card(self) -> ModelCard:
        """Return the card of the variant that gets most questions."""
        return self.models.primary.card

    @property
    def has_variants(self) -> bool:
        return self.models.named

    def card_for(self, route: Route) -> ModelCard:
        """Return the card whose defaults a caller gets. Raises InvalidRequest, NotFound for an unknown name."""
        return self.models.asked(route)[0].card

    def offers(self) -> Sequence[tuple[str, ModelCard]]:
        """Return the names that a request's `model` may have, each with a card."""
        return self.models.offers()

    async def answer(self, request: Request, reservation: Reservation) -> AsyncGenerator[Delta | Finished, None]:
        """Admit, load, look, generate -> pieces of text, then one Finished. Raises GlimpseError only."""
        with self.outcomes.of(request, reservation) as ticket:
            async with self.admit(ticket) as choices, self.charged(ticket, choices) as use:
                images, clip = await self.loader.load(ticket)
                for attempt in Attempts(self.models, choices, ticket, self.metrics):
                    with attempt:
                        model = attempt.model
                        seen = await self.look(model, images, clip, ticket, use)
                        prompt = self.compose(model, images, seen, ticket, use)
                        async with aclosing(self.generate(model, prompt, ticket)) as deltas:
                            async for delta in deltas:
                                attempt.sent = True
                                yield delta
                        yield self.finish(model, ticket, images, clip, seen)

    async def keep_image(self, data: bytes, reservation: Reservation) -> KeptImage:
        """As `Uploads.keep`."""
        return await self.uploads.keep(data, reservation)

    async def estimate(self, request: Request, reservation: Reservation) -> Estimate:
        """Say what the request would cost and whether it would be admitted now. It decodes and reserves nothing.

        Raises InvalidRequest, NotFound, InvalidImage, TooLarge; Overloaded if its images have no room in memory.
        """
        if request.sampling.guide is not None:
            await self.guides.require(request.sampling.guide)
        choice = self.models.choices(request)[0]
        images, clip = await self.loader.load_for_estimate(request, reservation)
        return choice.model.estimator.estimate(choice.request, images, clip, choice.tokens, reservation)

    def refuse_early(self, open_requests: int, lag_s: float, nbytes: int | None) -> None:
        """Raises Overloaded if the event loop, which is late by `lag_s`, cannot take one more request.

        `nbytes` are declared for its body; None if none are.
        """
        self.admission.refuse_early(open_requests, lag_s, Size.of(nbytes))

    @property
    def batch_turns(self) -> int:
        """Return how many questions of one tenant's batches may be in work at once."""
        return self.admission.batch_turns.most

    def batch_turn(self, tenant: str) -> AbstractAsyncContextManager[None]:
        """Hold one of the turns of the tenant's batches for the block."""
        return self.admission.batch_turns.turn(tenant)

    @contextmanager
    def reservation(
        self,
        tenant: str,
        key: str = "",
        *,
        row: bool = True,
        size: Size | None = None,
        within: Reservation | None = None,
        patience: Patience = NO_PATIENCE,
    ) -> Iterator[Reservation]:
        """Open the reservation of one request. It lasts from before the body is read until the response has ended.

        It has the account of the tenant, and of the key with this id.

        `answer` and `keep_image` add to it, and give back what they added when they end. Raises Overloaded if there is
        no room for one more request. Without a `row`, the request needs none of the LLM's. `size` is what the door knew
        of the request. `within` is the reservation of the message or the batch that the request is a part of.
        `patience`: how long a batch retries this question after refusals.
        """
        with self.admission.reservation(tenant, size, within) as reservation:
            reservation.patience = patience
            if row:
                reservation.require_room(Cost(tokens=self.admission.row_tokens))
            reservation.account = self.accounts.of(tenant, key)
            try:
                yield reservation
            finally:
                reservation.account.leave()

    @contextmanager
    def bytes_reserved(self, nbytes: int, within: Reservation) -> Iterator[Reservation]:
        """Reserve the bytes of a batch's message for the block, around the reservation of its question.

        `within` is that of the batch. Raises Overloaded.
        """
        with self.admission.reservation(within.tenant, within=within) as reservation:
            reservation.reserve_bytes(nbytes)
            yield reservation

    @asynccontextmanager
    async def admit(self, ticket: Ticket) -> AsyncIterator[Sequence[Choice]]:
        """Check the request before any work is done, and reserve its LLM tokens for the block.

        Gives the variants that can answer it.

        Raises InvalidRequest, Overloaded.
        """
        request, reservation = ticket.request, ticket.reservation
        if request.sampling.guide is not None:
            async with ticket.in_time():
                await self.guides.require(request.sampling.guide)
        with reservation.work():
            choices = self.models.choices(request)
            reservation.is_hurried = request.is_hurried
            tokens = max(self.admission.row_tokens, *(choice.tokens for choice in choices))
            reservation.reserve(Cost(tokens=tokens))
            ticket.tokens = tokens
            self.metrics.in_flight.inc()
            for choice in choices:
                choice.model.users += 1
            try:
                yield choices
            finally:
                for choice in choices:
                    choice.model.users -= 1
                self.metrics.in_flight.dec()

    @asynccontextmanager
    async def charged(self, ticket: Ticket, choices: Sequence[Choice]) -> AsyncIterator[Use]:
        """Charge what the request can use to its tenant's quota, and settle with what it used. Raises QuotaExceeded."""
        most = Use(
            max(choice.model.prompts.pictures(choice.request) for choice in choices),
            max(choice.model.prompts.visual_tokens(choice.request) for choice in choices),
            ticket.request.sampling.max_tokens,
        )
        async with ticket.reservation.account.charged(most) as use:
            try:
                yield use
            finally:
                use.generated_tokens = ticket.completion_tokens

    async def look(
        self, model: Model, images: Sequence[Image], clip: LoadedClip | None, ticket: Ticket, use: Use
    ) -> Sight:
        """Look at all that the request shows. If that fails, the frames that were encoded count as used.

        Raises InvalidImage, TooLarge, Overloaded, DeadlineExceeded, Unavailable.
        """
        try:
            async with ticket.in_time():
                seen = await model.vision_stage.look(images, clip, ticket)
        finally:
            use.images = len(images) + min(ticket.encoded_frames, ticket.compared)
        use.images = len(images) + ticket.compared
        return seen

    def compose(self, model: Model, images: Sequence[Image], seen: Sight, ticket: Ticket, use: Use) -> Prompt:
        """Make the prompt, and count its tokens."""
        card, question = model.card, ticket.request.question
        visual = [
            (each.visual_tokens, embedding_key(card, image.digest, question, each))
            for image, each in zip(images, seen.images, strict=True)
        ]
        if seen.clip is not None:
            of_clip = [(seen.clip.visual_tokens, clip_embedding_key(card, seen.frames, question, seen.clip))]
        else:
            of_clip = [
                (each.visual_tokens, embedding_key(card, frame.digest, question, each))
                for frame, each in zip(seen.frames, seen.of_frames, strict=True)
            ]
        prompt = model.prompts.compose_request(ticket.request, visual, of_clip)
        ticket.visual_tokens = use.visual_tokens = len(prompt.visual_tokens)
        ticket.prompt_tokens = len(prompt.input_ids) - len(prompt.visual_tokens)
        return prompt

    async def generate(self, model: Model, prompt: Prompt, ticket: Ticket) -> AsyncGenerator[Delta, None]:
        """Yield the answer's text as it becomes certain. Closing the generator early cancels the LLM's stream."""
        sampling = ticket.request.sampling
        card, detokeniser = model.card, Detokeniser(model.spelled, sampling.stop)
        tells = sampling.log_probs or card.tells_confidence(ticket.request)
        told: list[LogProb] | None = [] if tells else None
        untold: list[TokenLogProb] = []  # of tokens whose text is not certain yet
        generation = Generation(
            prompt,
            sampling if sampling.log_probs == tells else replace(sampling, log_probs=tells),
            end_id=card.end_id,
            pad_id=card.pad_id,
            request_id=f"{ticket.request.id}-{ticket.variant}" if ticket.fallback_from else ticket.request.id,
            stall_timeout_s=self.settings.stall_timeout_s,
            log_probs=told,
        )
        async with aclosing(model.language.generate(generation, ticket.left_s)) as tokens:
            while (ids := await self._next_tokens(tokens, card.end_id, ticket)) is not None:
                text, certain = "", list[TokenLogProb]()
                taken = 0
                for taken, token in enumerate(ids, 1):
                    if sampling.log_probs and told is not None:
                        untold.append(token_log_prob(model.spelled, token, *told[taken - 1]))
                    if more := detokeniser.push([token]):
                        text += more
                        certain += untold
                        untold.clear()
                    if detokeniser.stopped:
                        break
                ticket.completion_tokens += taken
                if told is not None:  # an end id, which `ids` leaves out, stands last
                    ticket.log_prob += sum(each.value for each in (told[:taken] if detokeniser.stopped else told))
                    told.clear()
                if text:
                    ticket.answer.append(text)
                    yield Delta(text, tuple(certain))
                if detokeniser.stopped:
                    guide, said = sampling.guide, "".join(ticket.answer)
                    # A constrained output that a stop string cut is as unfinished as one that max_tokens cut.
                    async with ticket.in_time():
                        is_whole = guide is None or await self.guides.is_complete(guide, said)
                    ticket.finish_reason = "stop" if is_whole else "length"
                    return
        if text := detokeniser.finish():
            ticket.answer.append(text)
            yield Delta(text, tuple(untold))

    async def _next_tokens(
        self, tokens: AsyncGenerator[tuple[int, ...], None], end_id: int, ticket: Ticket
    ) -> list[int] | None:
        """Return the next ids without the end id, or None at the end of the stream."""
        with ticket.stage(ticket.writing):
            async with ticket.in_time():
                ids = await anext(tokens, None)
        now = time.monotonic()
        if ids is None:
            if ticket.first_token is None:
                raise Unavailable("the language model ended without a token: try again")
            return None
        if ticket.last_token is None:
            ticket.first_token = now
        else:
            for _ in ids:  # a response has several if they came fast
                self.metrics.inter_token_latency.observe((now - ticket.last_token) / len(ids))
        ticket.last_token = now
        said = [i for i in ids if i != end_id]
        if len(said) < len(ids):
            ticket.finish_reason = "stop"
        return said

    def finish(
        self, model: Model, ticket: Ticket, images: Sequence[Image], clip: LoadedClip | None, seen: Sight
    ) -> Finished:
        self.outcomes.answered(ticket, seen)
        return Finished(
            finish_reason=ticket.finish_reason,
            image_ids=tuple(image.id for image in images),
            cache=ticket.cache,
            detail=ticket.detail,
            fit=ticket.fit,
            reduced=ticket.reduced,
            prompt_tokens=ticket.prompt_tokens,
            completion_tokens=ticket.completion_tokens,
            visual_tokens=ticket.visual_tokens,
            relevance=tuple(each.relevance for each in seen.images),
            timing_ms=ticket.timing_ms(),
            confidence=confidence(model, ticket, seen),
            min_confidence=ticket.request.min_confidence,
            served=ticket.reservation.served,
            frames=tuple(
                FrameSeen(frame.index, frame.time_s, relevance, frame.image_id)
                for frame, relevance in zip(seen.frames, seen.relevance, strict=True)
            ),
            clip_id="" if clip is None or clip.file is None else clip.file.id,
        )


def confidence(model: Model, ticket: Ticket, seen: Sight) -> Confidence | None:
    """Estimate how sure the complete answer is; None if the models are not calibrated for such questions."""
    card, request = model.card, ticket.request
    if card.confidence is None or not card.tells_confidence(request):
        return None
    if card.uses_clip_weights(request):
        strangeness = fmean(each.strangeness for each in seen.seen)
        return card.confidence.confidence_of_several(ticket.log_prob, strangeness, is_clip=request.clip is not None)
    question, answer = request.question, "".join(ticket.answer)
    return card.confidence.confidence(Signals.of(question, answer, ticket.log_prob, seen.images))


def token_log_prob(
    spelled: Sequence[bytes], token: int, value: float, top: tuple[tuple[int, float], ...] = ()
) -> TokenLogProb:
    others = tuple(token_log_prob(spelled, *each) for each in top)
    return TokenLogProb(spelled[token] if token < len(spelled) else b"", value, others)
