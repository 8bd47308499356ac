"""Run one request: admit, load, look, generate. This module knows no transport and no Triton."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from service.admission.admission import Admission, Reservation
from service.admission.quota import Cost
from service.admission.scheduler import Claim, Kind, Resource
from service.cache.features import FeatureCache, SharedTier
from service.cache.shared_images import SharedImages
from service.cache.visual_tokens import VisualCache, embedding_key
from service.core.access import Accounts, NoQuotas, Use
from service.core.answer import Delta, Finished, KeptImage, LogProb, TokenLogProb
from service.core.card import ModelCard
from service.core.confidence import Confidence, Signals
from service.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Unavailable,
    naming_image,
)
from service.core.estimate import Estimate
from service.core.prompt import Prompt
from service.core.request import ImageBytes, ImageId, ImageSource, ImageUrl, Request, Sampling
from service.core.vision import Seen
from service.estimating import Estimator
from service.guide_checks import GuideChecks
from service.images import Images
from service.media.fetch import ImageFetcher
from service.media.reader import ImageReader
from service.media.store import Image, ImageStore
from service.metrics import Metrics
from service.outcomes import Outcomes
from service.prompt import Detokeniser, PromptBuilder, token_bytes
from service.settings import Settings
from service.ticket import Ticket
from service.vision_stage import VisionModel, VisionStage, decoding_cost

if TYPE_CHECKING:
    from service.spans import Traces

__all__ = ["LanguageModel", "Pipeline", "Reservation"]  # the only names that a transport imports


class LanguageModel(Protocol):
    """Generate an answer's tokens. Raises Unavailable, Overloaded, DeadlineExceeded, GlimpseError only."""

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        end_id: int,
        pad_id: int,
        request_id: str,
        timeout_s: float,
        stall_timeout_s: float,
        log_probs: list[LogProb] | None = None,
    ) -> AsyncGenerator[tuple[int, ...], None]:
        """Yield token ids as they come, `end_id` included if it was generated. Closing the generator cancels.

        If `sampling` asks for log probabilities, each token's is appended to `log_probs` before the token is yielded.
        """
        ...


class Pipeline:
    """Hold everything that is needed to answer. Made once by the composition root."""

    def __init__(
        self,
        *,
        vision: VisionModel,
        language: LanguageModel,
        admission: Admission,
        card: ModelCard,
        prompts: PromptBuilder,
        reader: ImageReader,
        settings: Settings,
        metrics: Metrics,
        shared: SharedTier | None = None,
        accounts: Accounts | None = None,
        shared_images: SharedImages | None = None,
        fetcher: ImageFetcher | None = None,
        traces: Traces | None = None,
    ) -> None:
        """`fetcher`: None if image URLs are refused."""
        self.fetcher = fetcher
        self.language = language
        self.accounts = accounts or NoQuotas()
        self.admission = admission
        self.card = card
        self.reader = reader
        self.settings = settings
        self.metrics = metrics
        self.outcomes = Outcomes(metrics, traces)
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
        self.vision_stage = VisionStage(
            vision=vision,
            admission=admission,
            card=card,
            prompts=prompts,
            reader=reader,
            images=self.images,
            features=self.features,
            visual=self.visual,
        )
        self.estimator = Estimator(card, admission, self.features, reader.limits)
        self.prompts = prompts
        self.guides = GuideChecks()
        self._spelled = token_bytes(prompts.tokenizer)

    async def answer(self, request: Request, reservation: Reservation) -> AsyncGenerator[Delta | Finished, None]:
        """Admit, load, look, generate -> pieces of text, then one Finished. Raises GlimpseError only."""
        with self.outcomes.of(request) as ticket, ExitStack() as admitted:
            if request.sampling.guide is not None:
                async with ticket.in_time(reservation):
                    await self.guides.require(request.sampling.guide)
            admitted.enter_context(self.admit(ticket, reservation))
            async with self.charged(ticket, reservation) as use:
                async with ticket.in_time(reservation):
                    images = await self.load(ticket, reservation)
                    seen = await self.vision_stage.look(images, ticket, reservation)
                prompt = self.compose(request, images, seen)
                use.images, use.visual_tokens = len(images), len(prompt.visual_tokens)
                ticket.prompt_tokens = len(prompt.input_ids) - len(prompt.visual_tokens)
                async with aclosing(self.generate(prompt, ticket, reservation)) as deltas:
                    async for delta in deltas:
                        ticket.answer.append(delta.text)
                        yield delta
                yield self.finish(ticket, images, seen)

    async def keep_image(self, data: bytes, reservation: Reservation) -> KeptImage:
        """Check and keep an image, so that questions can name it by its id. It waits for a vision slot, as a question's
        image does.

        Raises InvalidImage, TooLarge, QuotaExceeded, Overloaded, DeadlineExceeded.
        """
        timeout_s, now = self.settings.default_timeout_s, time.monotonic()
        claim = Claim(Resource.VISION, 1, Kind.SINGLE_IMAGE, now, now + timeout_s, reservation.tenant)
        try:
            async with reservation.account.charged(Use(images=1)) as use:
                with reservation.work():
                    reservation.reserve(decoding_cost(data, self.settings.max_image_pixels))
                    async with asyncio.timeout(timeout_s):
                        await reservation.enter(claim)
                        decoded = await self.reader.decode(data)
                        image = await self.images.identify(data, reservation.tenant)
                use.images = 1
        except TimeoutError as exc:
            raise DeadlineExceeded(f"the image was not decoded within {timeout_s:g} s: send it again later") from exc
        await self.images.keep_for_all(image, reservation.tenant)
        expires_at = time.time() + self.settings.image_ttl_s
        return KeptImage(image.id, len(data), decoded.width, decoded.height, expires_at)

    async def estimate(self, request: Request, reservation: Reservation) -> Estimate:
        """Say what the request would cost and whether it would be admitted now. It decodes and reserves nothing.

        Raises InvalidRequest, NotFound, InvalidImage, TooLarge.
        """
        if request.sampling.guide is not None:
            await self.guides.require(request.sampling.guide)
        tokens, images = self.check(request), []
        for index, source in enumerate(request.images):
            with naming_image(index, len(request.images)):
                if isinstance(source, ImageUrl):
                    raise InvalidRequest(
                        "image is a URL, and an estimate fetches none: send the image's bytes, or its id",
                        param="image",
                        code="url_not_supported",
                    )
                images.append(await self.load_one(source, request.tenant))
        return self.estimator.estimate(request, images, tokens, reservation)

    def require_turns(self, open_requests: int, lag_s: float) -> None:
        """Raises Overloaded if the event loop, which is late by `lag_s`, cannot take one more request."""
        self.admission.require_turns(open_requests, lag_s)

    @property
    def batch_turns(self) -> int:
        """Return how many questions of one tenant's batches may be in work at once."""
        return self.admission.batch_turns.most

    def batch_turn(self, tenant: str) -> AbstractAsyncContextManager[None]:
        """Hold one of the turns of the tenant's batches for the block."""
        return self.admission.batch_turns.turn(tenant)

    @contextmanager
    def reservation(self, tenant: str, key: str = "", *, row: bool = True) -> Iterator[Reservation]:
        """Open the reservation of one request. It lasts from before the body is read until the response has ended.

        It has the account of the tenant, and of the key with this id.

        `answer` and `keep_image` add to it, and give back what they added when they end. Raises Overloaded if there is
        no room for one more request. Without a `row`, the request needs none of the LLM's.
        """
        with self.admission.reservation(tenant) as reservation:
            if row:
                reservation.require_room(Cost(tokens=self.admission.row_tokens))
            reservation.account = self.accounts.of(tenant, key)
            try:
                yield reservation
            finally:
                reservation.account.leave()

    @contextmanager
    def bytes_reserved(self, nbytes: int, tenant: str) -> Iterator[None]:
        """Reserve a message's bytes for the block, beside the reservation of its question. Raises Overloaded."""
        with self.admission.reservation(tenant) as reservation:
            reservation.reserve_bytes(nbytes)
            yield

    @contextmanager
    def admit(self, ticket: Ticket, reservation: Reservation) -> Iterator[None]:
        """Check the request before any work is done, and reserve its LLM tokens for the block.

        Raises InvalidRequest, Overloaded.
        """
        with reservation.work():
            tokens = max(self.check(ticket.request), self.admission.row_tokens)
            reservation.reserve(Cost(tokens=tokens))
            ticket.tokens = tokens
            self.metrics.in_flight.inc()
            try:
                yield
            finally:
                self.metrics.in_flight.dec()

    @asynccontextmanager
    async def charged(self, ticket: Ticket, reservation: Reservation) -> AsyncIterator[Use]:
        """Charge what the request can use to its tenant's quota, and settle with what it used. Raises QuotaExceeded."""
        request = ticket.request
        images = len(request.images)
        most = Use(images, images * request.budget.visual_tokens[1], request.sampling.max_tokens)
        async with reservation.account.charged(most) as use:
            try:
                yield use
            finally:
                use.generated_tokens = ticket.completion_tokens

    def check(self, request: Request) -> int:
        """Return the most LLM tokens that the request can use. Raises InvalidRequest if the model cannot answer it."""
        budget, card = request.budget, self.card
        if request.detail == "high" and not card.closer_view:
            raise InvalidRequest(
                f'{card.name} has no closer view: leave detail out, or ask for "low" or "auto"',
                param="detail",
                code="detail_not_supported",
            )
        offered = card.vision_tokens_for(request.detail)
        model = f"{card.name} with detail {request.detail}" if card.closer_view else card.name
        require_range("budget.vision_tokens", budget.vision_tokens, offered, model)
        require_range("budget.visual_tokens", budget.visual_tokens, card.visual_tokens, card.name, multiple_of=32)
        return self.prompts.require_room(request)

    async def load(self, ticket: Ticket, reservation: Reservation) -> list[Image]:
        """Return the images' bytes and digests. It decodes nothing, because a known image needs no pixels."""
        images, sources = [], ticket.request.images
        with ticket.stage("load"):
            fetched = await self.fetch(sources, reservation)
            for index, source in enumerate(sources):
                with naming_image(index, len(sources)):
                    known = fetched[source] if isinstance(source, ImageUrl) else source
                    images.append(await self.load_one(known, ticket.request.tenant))
        ticket.image_ids = tuple(image.id for image in images)
        return images

    async def fetch(self, sources: Sequence[ImageSource], reservation: Reservation) -> Mapping[ImageUrl, ImageBytes]:
        """Fetch the images that are URLs, each once and all at the same time. The bytes count as a body's do.

        Raises InvalidRequest, InvalidImage, TooLarge, Overloaded.
        """
        urls = dict.fromkeys(source for source in sources if isinstance(source, ImageUrl))
        if not urls:
            return {}
        try:
            async with asyncio.TaskGroup() as tasks:
                fetches = {
                    url: tasks.create_task(self.fetch_one(url, sources.index(url), len(sources), reservation))
                    for url in urls
                }
        except BaseExceptionGroup as group:
            first = group.exceptions[0]
            raise first from first.__cause__
        return {url: fetch.result() for url, fetch in fetches.items()}

    async def fetch_one(self, source: ImageUrl, index: int, of: int, reservation: Reservation) -> ImageBytes:
        """Fetch an image, the one at `index` of `of`. Raises InvalidRequest, InvalidImage, TooLarge, Overloaded."""
        with naming_image(index, of):
            if self.fetcher is None:
                raise InvalidRequest(
                    "image is a URL, and URLs are not fetched: send the bytes as base64, as a data: URL or as a form "
                    "(curl -F image=@FILE), or send them once to POST /v1/images",
                    param="image",
                    code="url_not_supported",
                )
            return ImageBytes(await self.fetcher.fetch(source.url, reservation.tenant, reservation.reserve_bytes))

    async def load_one(self, source: ImageBytes | ImageId, tenant: str) -> Image:
        """Return the bytes and digest of one image. Raises NotFound for an unknown id."""
        match source:
            case ImageBytes(data):
                return await self.images.identify(data, tenant)
            case ImageId(image_id):
                return await self.images.find(image_id, tenant)

    def compose(self, request: Request, images: Sequence[Image], seen: Sequence[Seen]) -> Prompt:
        visual = [
            (each.visual_tokens, embedding_key(self.card, image.digest, request.question, each))
            for image, each in zip(images, seen, strict=True)
        ]
        return self.prompts.compose_request(request, visual)

    async def generate(self, prompt: Prompt, ticket: Ticket, reservation: Reservation) -> AsyncGenerator[Delta, None]:
        """Yield the answer's text as it becomes certain. Closing the generator early cancels the LLM's stream."""
        sampling = ticket.request.sampling
        detokeniser = Detokeniser(self._spelled, sampling.stop)
        told: list[LogProb] | None = [] if sampling.log_probs or self.card.confidence is not None else None
        untold: list[TokenLogProb] = []  # of tokens whose text is not certain yet
        tokens = self.language.generate(
            prompt,
            replace(sampling, log_probs=told is not None),
            end_id=self.card.end_id,
            pad_id=self.card.pad_id,
            request_id=ticket.request.id,
            timeout_s=ticket.left_s,
            stall_timeout_s=self.settings.stall_timeout_s,
            log_probs=told,
        )
        async with aclosing(tokens):
            while (ids := await self._next_tokens(tokens, ticket, reservation)) is not None:
                if told is not None:
                    ticket.log_prob += sum(each.value for each in told)
                    if sampling.log_probs:
                        untold += self._token_log_probs(ids, told)
                    told.clear()
                if text := detokeniser.push(ids):
                    yield Delta(text, tuple(untold))
                    untold.clear()
                if detokeniser.stopped:
                    guide, said = sampling.guide, "".join(ticket.answer)
                    # A form that a stop string cut is as unfinished as one that max_tokens cut.
                    is_whole = guide is None or await self.guides.is_complete(guide, said)
                    ticket.finish_reason = "stop" if is_whole else "length"
                    return
        if text := detokeniser.finish():
            yield Delta(text, tuple(untold))

    def _token_log_probs(self, ids: Sequence[int], told: list[LogProb]) -> list[TokenLogProb]:
        """Join tokens and their log probabilities. An end id, which `ids` leaves out, stands last in `told`."""
        return [self._token_log_prob(token, *log_prob) for token, log_prob in zip(ids, told, strict=False)]

    def _token_log_prob(self, token: int, value: float, top: tuple[tuple[int, float], ...] = ()) -> TokenLogProb:
        spelled = self._spelled[token] if token < len(self._spelled) else b""
        return TokenLogProb(spelled, value, tuple(self._token_log_prob(*each) for each in top))

    async def _next_tokens(
        self, tokens: AsyncGenerator[tuple[int, ...], None], ticket: Ticket, reservation: Reservation
    ) -> list[int] | None:
        """Return the next ids without the end id, or None at the end of the stream."""
        with ticket.stage(ticket.writing):
            async with ticket.in_time(reservation):
                ids = await anext(tokens, None)
        now = time.monotonic()
        if ids is None:
            if ticket.first_token is None:
                raise Unavailable("the language model ended without a token: ask again")
            return None
        if ticket.last_token is None:
            ticket.first_token = now
        else:
            self.metrics.inter_token_latency.observe(now - ticket.last_token)
        ticket.last_token = now
        said = [i for i in ids if i != self.card.end_id]
        if len(said) < len(ids):
            ticket.finish_reason = "stop"
        ticket.completion_tokens += len(said)
        return said

    def finish(self, ticket: Ticket, images: Sequence[Image], seen: Sequence[Seen]) -> Finished:
        self.outcomes.answered(ticket, seen)
        return Finished(
            finish_reason=ticket.finish_reason,
            image_ids=tuple(image.id for image in images),
            cache=ticket.cache,
            detail=ticket.detail,
            reduced=ticket.reduced,
            prompt_tokens=ticket.prompt_tokens,
            completion_tokens=ticket.completion_tokens,
            visual_tokens=sum(len(each.visual_tokens) for each in seen),
            relevance=tuple(each.relevance for each in seen),
            timing_ms=ticket.timing_ms(),
            confidence=self.confidence(ticket, seen),
            min_confidence=ticket.request.min_confidence,
        )

    def confidence(self, ticket: Ticket, seen: Sequence[Seen]) -> Confidence | None:
        """Estimate how sure the complete answer is; None if the models are not calibrated."""
        if self.card.confidence is None:
            return None
        question, answer = ticket.request.question, "".join(ticket.answer)
        return self.card.confidence.confidence(Signals.of(question, answer, ticket.log_prob, seen))


def require_range(
    name: str, asked: tuple[int, int], offered: tuple[int, int], model: str, multiple_of: int = 1
) -> None:
    """Raise InvalidRequest unless least <= most and both are in the offered range."""
    least, most = asked
    if least > most:
        raise InvalidRequest(f"{name} is [least, most], and {least} is more than {most}: swap them", param=name)
    if least < offered[0] or most > offered[1]:
        raise InvalidRequest(
            f"{name} [{least}, {most}] is outside [{offered[0]}, {offered[1]}], which is what {model} offers",
            param=name,
        )
    if least % multiple_of or most % multiple_of:
        raise InvalidRequest(f"{name} [{least}, {most}] must be multiples of {multiple_of}", param=name)
