"""The path of one request: admit, load, see or attend, generate. It knows no transport and no Triton.

Every request ends in exactly one outcome, which is one metric and one log line, both written by `Pipeline.outcome`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import structlog

from service.admission import Admission, Place
from service.core import (
    IMAGE_SIZE,
    Budget,
    ModelCard,
    Prompt,
    Question,
    Relevance,
    Sampling,
    Seen,
    UInt8Array,
    VisionFeatures,
)
from service.errors import DeadlineExceeded, GlimpseError, InternalError, InvalidRequest, Unavailable
from service.feature_cache import FeatureCache, FeatureKey, Found, SharedTier
from service.images import Image, ImageReader, ImageStore, header_pixels
from service.ledger import Cost
from service.metrics import Metrics
from service.prompt import Detokeniser, PromptBuilder, token_bytes
from service.scheduler import Claim, Kind, Resource
from service.settings import Settings

log = structlog.get_logger()

# Outcomes of questions that ended before their tokens were generated, as nobody would have read them.
NOTHING_MORE_TO_DO = ("cancelled", "deadline", "deadline_exceeded")


class VisionModel(Protocol):
    """Image and question to visual tokens. Raises Unavailable, Overloaded, DeadlineExceeded, GlimpseError only."""

    async def see(self, image: UInt8Array, question: Question, budget: Budget, timeout_s: float) -> Seen:
        """`image` uint8 [3, 224, 224]."""
        ...

    async def attend(self, vision: VisionFeatures, question: Question, budget: Budget, timeout_s: float) -> Seen:
        """The same with what the encoder found before."""
        ...


class LanguageModel(Protocol):
    """Raises Unavailable, Overloaded, DeadlineExceeded, GlimpseError only."""

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
    ) -> AsyncGenerator[tuple[int, ...], None]:
        """Token ids as they come, `end_id` included where it was generated. Closing the generator cancels."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One question about one image, as any edge brings it."""

    id: str  # unique: Triton cancels by it
    image: bytes | str  # the file's bytes, or the id of an image that was sent before
    question: str
    budget: Budget
    sampling: Sampling
    timeout_s: float
    trace_id: str = ""  # the caller's own id of the request
    tenant: str = ""  # who shares the service fairly with others; empty is one of its own


@dataclass(frozen=True, slots=True)
class Delta:
    """Some more of the answer's text, never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """All that is known once the answer's text is complete."""

    finish_reason: Literal["stop", "length"]
    image_id: str
    cache: Literal["hit", "miss"]
    prompt_tokens: int
    completion_tokens: int
    visual_tokens: int
    relevance: Relevance
    timing_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class KeptImage:
    """An image that can be asked about by its id until `expires_at`, seconds since the epoch."""

    id: str
    nbytes: int
    width: int
    height: int
    expires_at: float


@dataclass(slots=True)
class Ticket:
    """What is known of one request on its way. Times are seconds of the monotonic clock."""

    request: Request
    arrived: float
    deadline: float
    outcome: str = "cancelled"  # until something else is known
    tokens: int = 0  # of the LLM, at the most; 0 until it is admitted
    kind: Kind | None = None  # once the image was looked up
    stages: dict[str, float] = field(default_factory=dict)
    cache: Literal["hit", "miss"] = "miss"
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0  # once there is a prompt
    completion_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "length"

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - begun

    @asynccontextmanager
    async def in_time(self) -> AsyncIterator[None]:
        """Raises DeadlineExceeded where the block outlives the request's deadline. No `yield` of events inside."""
        try:
            async with asyncio.timeout(self.left_s):
                yield
        except TimeoutError as exc:
            raise self.too_late() from exc

    def too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"no complete answer within timeout_s={self.request.timeout_s:g}: raise it, or ask again when the service "
            "is less busy",
            param="timeout_s",
        )

    def timing_ms(self) -> dict[str, float]:
        seconds = {name: self.stages.get(name, 0.0) for name in ("queue", "load", "vision")}
        seconds["first_token"] = (self.first_token or self.arrived) - self.arrived
        seconds["total"] = time.monotonic() - self.arrived
        return {name: round(value * 1e3, 2) for name, value in seconds.items()}


class Pipeline:
    """Everything that is needed to answer; made once by the composition root."""

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
    ) -> None:
        self.vision = vision
        self.language = language
        self.admission = admission
        self.card = card
        self.reader = reader
        self.settings = settings
        self.metrics = metrics
        self.images = ImageStore(settings.image_store_bytes, settings.image_ttl_s)
        self.features = FeatureCache(settings.feature_cache_bytes, metrics, shared)
        self.prompts = prompts
        self._spelled = token_bytes(prompts.tokenizer)

    async def answer(self, request: Request) -> AsyncGenerator[Delta | Finished, None]:
        """Admit, load, see or attend, generate. Raises GlimpseError only."""
        with self.outcome(request) as ticket, self.admit(ticket) as place:
            async with ticket.in_time():
                image = await self.load(ticket)
                seen = await self.look(image, ticket, place)
            prompt = self.prompts.compose(request.question, seen.visual_tokens, visual_key(request, image, self.card))
            ticket.prompt_tokens = len(prompt.input_ids) - len(seen.visual_tokens)
            async with aclosing(self.generate(prompt, ticket)) as texts:
                async for text in texts:
                    yield Delta(text)
            yield self.finish(ticket, image, seen)

    async def keep_image(self, data: bytes, tenant: str = "") -> KeptImage:
        """Takes an image that questions can name by its id.

        Raises InvalidImage, TooLarge, Overloaded, DeadlineExceeded.
        """
        timeout_s = self.settings.default_timeout_s
        try:
            with self.admission.place(tenant) as place:
                place.reserve(self.cost_of(data))
                async with asyncio.timeout(timeout_s):
                    decoded = await self.reader.decode(data)
                    image = await self.reader.identify(data)
        except TimeoutError as exc:
            raise DeadlineExceeded(f"the image was not decoded within {timeout_s:g} s: send it again later") from exc
        expires_at = self.images.put(image, time.time())
        return KeptImage(image.id, len(data), decoded.width, decoded.height, expires_at)

    @contextmanager
    def outcome(self, request: Request) -> Iterator[Ticket]:
        """Names how the request ended, counts it and logs it, once. Unknown errors become InternalError."""
        now = time.monotonic()
        ticket = Ticket(request, arrived=now, deadline=now + request.timeout_s)
        fault: BaseException | None = None
        try:
            yield ticket
        except GlimpseError as error:
            ticket.outcome = error.code
            raise
        except Exception as error:
            ticket.outcome, fault = InternalError.code, error
            raise internal_error(request.trace_id or request.id) from error
        finally:
            self._record(ticket, fault)

    @contextmanager
    def admit(self, ticket: Ticket) -> Iterator[Place]:
        """Refuses what cannot be answered before any work is done, and reserves what it will cost; all that the
        request holds is given back at its end. Raises InvalidRequest, Overloaded."""
        tokens = max(self.check(ticket.request), self.admission.row_tokens)
        with self.admission.place(ticket.request.tenant) as place:
            place.reserve(Cost(tokens=tokens))
            ticket.tokens = tokens
            self.metrics.in_flight.inc()
            try:
                yield place
            finally:
                self.metrics.in_flight.dec()

    def check(self, request: Request) -> int:
        """The request's tokens in the LLM, at the most. Raises InvalidRequest where the model cannot do it."""
        budget, card = request.budget, self.card
        require_range("budget.vision_tokens", budget.vision_tokens, card.vision_tokens, card.name)
        require_range("budget.visual_tokens", budget.visual_tokens, card.visual_tokens, card.name, multiple_of=32)
        return self.prompts.require_room(request.question, budget.visual_tokens[1], request.sampling.max_tokens)

    def cost_of(self, data: bytes) -> Cost:
        """Of decoding; more pixels than are allowed are refused by the decoder, at no cost. Who does not tell its size
        pays for the largest."""
        most, told = self.settings.max_image_pixels, header_pixels(data)
        return Cost(pixels=most if told is None else min(told, most))

    async def load(self, ticket: Ticket) -> Image:
        """The image's bytes and digest; they are not decoded here, as a known image needs no pixels."""
        with ticket.stage("load"):
            if isinstance(ticket.request.image, str):
                return self.images.get(ticket.request.image, time.time())
            return await self.reader.identify(ticket.request.image)

    async def look(self, image: Image, ticket: Ticket, place: Place) -> Seen:
        """Attends to features that are known, else sees the image and keeps them. The LLM has room when it returns.

        Who attends waits for the LLM first: that bounds how many attend at once, and a wait in vain costs nothing.
        """
        request, question = ticket.request, self.prompts.question(ticket.request.question)
        key = FeatureKey(self.card.fingerprint, IMAGE_SIZE, image.digest)
        async with AsyncExitStack() as flight:
            with ticket.stage("vision"):  # another's encode may have to be waited for
                found = await flight.enter_async_context(self.features.find(key, ticket.left_s))
            if found.features is None:
                seen = await self._see(image, question, found, ticket, place)
        if found.features is None:
            await self._turn(ticket, place, Resource.LLM, new_images=1)
            return seen
        self._remember(image, request)
        ticket.cache = "hit"
        await self._turn(ticket, place, Resource.LLM, new_images=0)
        with ticket.stage("vision"):
            return await self.vision.attend(found.features, question, request.budget, ticket.left_s)

    async def _see(self, image: Image, question: Question, found: Found, ticket: Ticket, place: Place) -> Seen:
        place.reserve(self.cost_of(image.data))
        slot = await self._turn(ticket, place, Resource.VISION, new_images=1)
        with ticket.stage("load"):
            decoded = await self.reader.decode(image.data)
        self._remember(image, ticket.request)
        with ticket.stage("vision"):
            seen = await self.vision.see(decoded.pixels, question, ticket.request.budget, ticket.left_s)
        found.keep(seen.vision)
        place.give_back(slot)
        return seen

    async def _turn(self, ticket: Ticket, place: Place, resource: Resource, new_images: int) -> Claim:
        """What the place holds from now on. Raises Overloaded."""
        ticket.kind = Kind.of(new_images)
        amount = ticket.tokens if resource is Resource.LLM else new_images
        claim = Claim(resource, amount, ticket.kind, time.monotonic(), ticket.deadline, ticket.request.tenant)
        with ticket.stage("queue"):
            await place.enter(claim)
        return claim

    def _remember(self, image: Image, request: Request) -> None:
        """An image that came with its question can be asked about by its id too; asking by id does not prolong it."""
        if isinstance(request.image, bytes):
            self.images.put(image, time.time())

    async def generate(self, prompt: Prompt, ticket: Ticket) -> AsyncGenerator[str, None]:
        """The answer's text as it becomes certain. Leaving early cancels the LLM's stream."""
        sampling = ticket.request.sampling
        detokeniser = Detokeniser(self._spelled, sampling.stop)
        tokens = self.language.generate(
            prompt,
            sampling,
            end_id=self.card.end_id,
            pad_id=self.card.pad_id,
            request_id=ticket.request.id,
            timeout_s=ticket.left_s,
            stall_timeout_s=self.settings.stall_timeout_s,
        )
        async with aclosing(tokens):
            while (ids := await self._next_tokens(tokens, ticket)) is not None:
                if text := detokeniser.push(ids):
                    yield text
                if detokeniser.stopped:
                    ticket.finish_reason = "stop"
                    return
        if text := detokeniser.finish():
            yield text

    async def _next_tokens(self, tokens: AsyncGenerator[tuple[int, ...], None], ticket: Ticket) -> list[int] | None:
        """The next ids without the end's, or None at the end of the stream."""
        async with ticket.in_time():
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

    def finish(self, ticket: Ticket, image: Image, seen: Seen) -> Finished:
        ticket.outcome = "ok"
        visual_tokens = len(seen.visual_tokens)
        self.metrics.vision_tokens.observe(seen.relevance.vision_tokens)
        self.metrics.visual_tokens.observe(visual_tokens)
        return Finished(
            finish_reason=ticket.finish_reason,
            image_id=image.id,
            cache=ticket.cache,
            prompt_tokens=ticket.prompt_tokens,
            completion_tokens=ticket.completion_tokens,
            visual_tokens=visual_tokens,
            relevance=seen.relevance,
            timing_ms=ticket.timing_ms(),
        )

    def _record(self, ticket: Ticket, fault: BaseException | None) -> None:
        timing_ms = ticket.timing_ms()
        self.metrics.requests.labels(ticket.outcome).inc()
        self.metrics.prompt_tokens.inc(ticket.prompt_tokens)
        self.metrics.generated_tokens.inc(ticket.completion_tokens)
        if ticket.outcome == "ok":
            self.metrics.e2e_request_latency.observe(timing_ms["total"] / 1e3)
            self.metrics.time_to_first_token.observe(timing_ms["first_token"] / 1e3)
            if ticket.kind is not None:
                self.metrics.request_queue_time.labels(ticket.kind).observe(timing_ms["queue"] / 1e3)
            for stage, seconds in ticket.stages.items():
                self.metrics.stage.labels(stage).observe(seconds)
        elif ticket.tokens and ticket.outcome in NOTHING_MORE_TO_DO:
            saved = ticket.request.sampling.max_tokens - ticket.completion_tokens
            self.metrics.tokens_saved.labels(ticket.outcome).inc(saved)
        (log.error if fault else log.info)(
            "answered" if ticket.outcome == "ok" else "not_answered",
            outcome=ticket.outcome,
            request_id=ticket.request.trace_id,
            id=ticket.request.id,
            cache=ticket.cache,
            completion_tokens=ticket.completion_tokens,
            **{f"{name}_ms": value for name, value in timing_ms.items()},
            **({"exc_info": fault} if fault else {}),
        )


def internal_error(request_id: str) -> InternalError:
    return InternalError(f"a fault of ours; the log tells of it under request id {request_id}")


def new_seed() -> int:
    """For a request that names none: sampled answers then differ from one to the next."""
    return secrets.randbits(63)


def visual_key(request: Request, image: Image, card: ModelCard) -> bytes:
    """Names what the visual tokens are made from; the question comes last, as it may hold any character."""
    budget = (*request.budget.vision_tokens, *request.budget.visual_tokens)
    return "\0".join([card.visual_fingerprint, image.digest, *map(str, budget), request.question]).encode()


def require_range(
    name: str, asked: tuple[int, int], offered: tuple[int, int], model: str, multiple_of: int = 1
) -> None:
    """Raises InvalidRequest unless least <= most, both inside what is offered."""
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
