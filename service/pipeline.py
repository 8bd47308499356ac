"""The path of one request: admit, load, look, generate. It knows no transport and no Triton.

Every request ends in exactly one outcome, which is one metric and one log line, both written by `Pipeline.outcome`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import structlog

from service.admission import Admission, Place
from service.core import (
    CLOSER_SIZE,
    CROPS,
    IMAGE_SIZE,
    TENSIONS,
    Budget,
    CloserFeatures,
    Detail,
    ModelCard,
    Prompt,
    Question,
    Relevance,
    Sampling,
    Seen,
    Turn,
    UInt8Array,
    VisionFeatures,
)
from service.errors import (
    DeadlineExceeded,
    GlimpseError,
    InternalError,
    InvalidRequest,
    Unavailable,
    naming_image,
)
from service.feature_cache import FeatureCache, SharedTier, closer_view, first_view
from service.images import Decoded, Image, ImageReader, ImageStore, header_pixels
from service.ledger import Cost
from service.metrics import Metrics
from service.prompt import Detokeniser, PromptBuilder, token_bytes
from service.scheduler import Claim, Kind, Priority, Resource
from service.settings import Settings

log = structlog.get_logger()

# Outcomes of questions that ended before their tokens were generated, as nobody would have read them.
NOTHING_MORE_TO_DO = ("cancelled", "deadline", "deadline_exceeded")


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
    """One question about one image or several, as any edge brings it."""

    id: str  # unique: Triton cancels by it
    images: tuple[bytes | str, ...]  # of each the file's bytes, or the id of one that was sent before
    question: str
    budget: Budget  # of each image
    sampling: Sampling
    timeout_s: float
    detail: Detail = "low"
    turns: tuple[Turn, ...] = ()  # what was asked and answered before, oldest first
    trace_id: str = ""  # the caller's own id of the request
    tenant: str = ""  # who shares the service fairly with others; empty is one of its own
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class Delta:
    """Some more of the answer's text, never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """All that is known once the answer's text is complete."""

    finish_reason: Literal["stop", "length"]
    image_ids: tuple[str, ...]
    cache: Literal["hit", "miss"]  # a miss where anything had to be encoded
    detail: Literal["low", "high"]  # high where a closer view was looked at
    reduced: bool  # looked less closely than the request allows, as others waited
    prompt_tokens: int
    completion_tokens: int
    visual_tokens: int
    relevance: tuple[Relevance, ...]  # of each image
    timing_ms: dict[str, float]

    @property
    def vision_tokens(self) -> int:
        return sum(relevance.vision_tokens for relevance in self.relevance)


@dataclass(frozen=True, slots=True)
class KeptImage:
    """An image that can be asked about by its id until `expires_at`, seconds since the epoch."""

    id: str
    nbytes: int
    width: int
    height: int
    expires_at: float


@dataclass(slots=True)
class Look:
    """One image of a request, and what is known of it by now."""

    number: int  # of the images of its request
    image: Image
    question: Question
    is_reserved: bool = False  # the pixels
    decoded: Decoded | None = None
    vision: VisionFeatures | None = None
    closer: CloserFeatures | None = None
    seen: Seen | None = None  # what these features give for the question, once it is known
    reduced: bool = False  # whether that was less than the request allows


@dataclass(slots=True)
class Stage:
    """How long a request was in one stage: once where several of its images are in it together."""

    seconds: float = 0.0
    inside: int = 0
    begun: float = 0.0

    def __enter__(self) -> None:
        if not self.inside:
            self.begun = time.monotonic()
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1
        if not self.inside:
            self.seconds += time.monotonic() - self.begun


@dataclass(slots=True)
class Ticket:
    """What is known of one request on its way. Times are seconds of the monotonic clock."""

    request: Request
    arrived: float
    deadline: float
    outcome: str = "cancelled"  # until something else is known
    tokens: int = 0  # of the LLM, at the most; 0 until it is admitted
    kind: Kind | None = None  # once an image was looked up
    encoded: int = 0  # images, a closer view counted as its crops
    cache: Literal["hit", "miss"] = "miss"  # until every image was looked up
    detail: Literal["low", "high"] = "low"  # high once a closer view was looked at
    closer_view: bool = True  # whether it may have one, where it wants one
    reduced: bool = False  # once it got less than it could have used
    stages: defaultdict[str, Stage] = field(default_factory=lambda: defaultdict(Stage))
    first_token: float | None = None
    last_token: float | None = None
    prompt_tokens: int = 0  # once there is a prompt
    completion_tokens: int = 0
    finish_reason: Literal["stop", "length"] = "length"

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def stage(self, name: str) -> Stage:
        return self.stages[name]

    @property
    def writing(self) -> str:
        """The stage of the LLM's work; of an answer that comes whole nobody knows when it began to write."""
        if not self.request.sampling.streaming:
            return "generate"
        return "prefill" if self.first_token is None else "decode"

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
        seconds = {name: self.stages[name].seconds for name in ("queue", "load", "vision")}
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
        self.features = FeatureCache(
            settings.feature_cache_bytes, metrics, shared, as_int8=settings.feature_cache_dtype == "int8"
        )
        self.prompts = prompts
        self._spelled = token_bytes(prompts.tokenizer)

    async def answer(self, request: Request) -> AsyncGenerator[Delta | Finished, None]:
        """Admit, load, look, generate. Raises GlimpseError only."""
        with self.outcome(request) as ticket, self.admit(ticket) as place:
            async with ticket.in_time():
                images = await self.load(ticket)
                seen = await self.look(images, ticket, place)
            prompt = self.compose(request, images, seen)
            ticket.prompt_tokens = len(prompt.input_ids) - len(prompt.visual_tokens)
            async with aclosing(self.generate(prompt, ticket)) as texts:
                async for text in texts:
                    yield Delta(text)
            yield self.finish(ticket, images, seen)

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
        if request.detail == "high" and not card.closer_view:
            raise InvalidRequest(
                f'{card.name} has no closer view: leave detail out, or ask for "low" or "auto"',
                param="detail",
                code="detail_not_supported",
            )
        offered = card.vision_tokens_for(request.detail)
        require_range("budget.vision_tokens", budget.vision_tokens, offered, card.name)
        require_range("budget.visual_tokens", budget.visual_tokens, card.visual_tokens, card.name, multiple_of=32)
        visual_tokens = [budget.visual_tokens[1]] * len(request.images)
        return self.prompts.require_room(request.question, visual_tokens, request.sampling.max_tokens, request.turns)

    def cost_of(self, data: bytes) -> Cost:
        """Of decoding; more pixels than are allowed are refused by the decoder, at no cost. Who does not tell its size
        pays for the largest."""
        most, told = self.settings.max_image_pixels, header_pixels(data)
        return Cost(pixels=most if told is None else min(told, most))

    async def load(self, ticket: Ticket) -> list[Image]:
        """The images' bytes and digests; they are not decoded here, as a known image needs no pixels."""
        images, given = [], ticket.request.images
        with ticket.stage("load"):
            for place, image in enumerate(given):
                with naming_image(place, len(given)):
                    images.append(
                        self.images.get(image, time.time())
                        if isinstance(image, str)
                        else await self.reader.identify(image)
                    )
        return images

    async def look(self, images: Sequence[Image], ticket: Ticket, place: Place) -> list[Seen]:
        """Attends to features that are known, else sees the image and keeps them; looks closer where that is asked for
        or needed. The LLM has room when it returns.

        Who attends waits for the LLM first: that bounds how many attend at once, and a wait in vain costs nothing. Who
        then finds that it needs a closer view gives its room back and comes again.
        """
        question = self.prompts.question(ticket.request.question)
        ticket.closer_view = self._may_look_closer(ticket.request)
        looks = [Look(number, image, question) for number, image in enumerate(images)]
        await together(self._find, looks, ticket, place)
        while True:
            await together(self._find_closer, self._to_look_closer(looks, ticket), ticket, place)
            room = await self._turn(Resource.LLM, ticket.tokens, Kind.of(ticket.encoded), ticket, place)
            await together(self._attend, [look for look in looks if look.seen is None], ticket, place)
            if not self._to_look_closer(looks, ticket):
                ticket.cache = "miss" if ticket.encoded else "hit"
                ticket.detail = "high" if any(look.closer for look in looks) else "low"
                ticket.reduced |= any(look.reduced for look in looks)
                return [look.seen for look in looks if look.seen is not None]
            place.give_back(room, finished=False)

    def _to_look_closer(self, looks: Sequence[Look], ticket: Ticket) -> list[Look]:
        """Those whose closer view is wanted and not there yet."""
        if not self.card.closer_view:
            return []
        detail = ticket.request.detail
        wanted = [look for look in looks if look.closer is None and self._wants_closer_view(look, detail)]
        if wanted and not ticket.closer_view:
            ticket.reduced = True
            return []
        return wanted

    def _may_look_closer(self, request: Request) -> bool:
        """Unless others wait; but who wants more tokens at the least than one view has gets the other."""
        return self.admission.fidelity.closer_view or request.budget.vision_tokens[0] > self.card.vision_tokens[1]

    def _wants_closer_view(self, look: Look, detail: Detail) -> bool:
        """With "auto" nobody knows before the image was seen."""
        if detail != "auto" or look.seen is None:
            return detail == "high"
        needs_it = look.seen.relevance.particularize >= self.card.closer_view_at
        return needs_it and look.image.larger_than(IMAGE_SIZE)

    async def _find(self, look: Look, ticket: Ticket, place: Place) -> None:
        """The features of the whole image, known or encoded; without a closer view to come, encoding it sees it too."""
        key = first_view(self.card.fingerprint, look.image.digest)
        async with AsyncExitStack() as flight:
            with ticket.stage("vision"), ticket.stage("lookup"):  # another's encode may have to be waited for
                found = await flight.enter_async_context(self.features.find(key, ticket.left_s))
            look.vision = found.features
            if look.vision is None:
                async with self._encoding(look, IMAGE_SIZE, ticket, place) as decoded:
                    if ticket.request.detail == "high":
                        (look.vision,) = await self.vision.encode(decoded.pixels[np.newaxis], ticket.left_s)
                    else:
                        budget = self._budget(look, ticket)
                        look.vision, look.seen = await self.vision.see(
                            decoded.pixels, look.question, budget, ticket.left_s
                        )
                found.keep(look.vision)
            else:
                self._remember(look.image, ticket.request)

    async def _find_closer(self, look: Look, ticket: Ticket, place: Place) -> None:
        """The features of the closer view, known or encoded. What was seen without them counts no more."""
        key = closer_view(self.card.fingerprint, look.image.digest)
        async with AsyncExitStack() as flight:
            with ticket.stage("vision"), ticket.stage("lookup"):
                found = await flight.enter_async_context(self.features.find(key, ticket.left_s))
            look.closer = found.features
            if look.closer is None:
                async with self._encoding(look, CLOSER_SIZE, ticket, place) as decoded:
                    look.closer = CloserFeatures.joined(await self.vision.encode(decoded.crops, ticket.left_s))
                found.keep(look.closer)
        look.seen = None

    async def _attend(self, look: Look, ticket: Ticket, _: Place) -> None:
        assert look.vision is not None
        budget = self._budget(look, ticket)
        with ticket.stage("vision"), ticket.stage("attend"):
            look.seen = await self.vision.attend(look.vision, look.question, budget, ticket.left_s, look.closer)

    def _budget(self, look: Look, ticket: Ticket) -> Budget:
        """What the request asks for, as far as its views have it and the house allows it now."""
        budget = ticket.request.budget if look.closer else ticket.request.budget.within(self.card.vision_tokens[1])
        allowed = self.admission.fidelity.cap(budget)
        look.reduced = allowed != budget
        return allowed

    @asynccontextmanager
    async def _encoding(self, look: Look, view: int, ticket: Ticket, place: Place) -> AsyncIterator[Decoded]:
        """The image decoded for this view, where there is room to encode it."""
        images = CROPS if view == CLOSER_SIZE else 1
        if not look.is_reserved:
            place.reserve(self.cost_of(look.image.data))
            look.is_reserved = True
        slots = min(images, self.admission.vision_slots)
        kind = Kind.of(max(images, len(ticket.request.images)))
        claim = await self._turn(Resource.VISION, slots, kind, ticket, place)
        ticket.encoded += images
        if (decoded := look.decoded) is None:
            both = view == IMAGE_SIZE and ticket.request.detail == "high"
            naming = naming_image(look.number, len(ticket.request.images))
            with ticket.stage("load"), ticket.stage("decode_image"), naming:
                decoded = await self.reader.decode(look.image.data, (IMAGE_SIZE, CLOSER_SIZE) if both else (view,))
            look.decoded = decoded if both else None
        self._remember(look.image, ticket.request)
        with ticket.stage("vision"), ticket.stage("see"):
            yield decoded
        place.give_back(claim)

    async def _turn(self, resource: Resource, amount: int, kind: Kind, ticket: Ticket, place: Place) -> Claim:
        """What the place holds from now on. Raises Overloaded."""
        ticket.kind = kind
        request = ticket.request
        claim = Claim(resource, amount, kind, time.monotonic(), ticket.deadline, request.tenant, request.priority)
        with ticket.stage("queue"):
            await place.enter(claim)
        return claim

    def _remember(self, image: Image, request: Request) -> None:
        """An image that came with its question can be asked about by its id too; asking by id does not prolong it."""
        if image.id not in request.images:
            self.images.put(image, time.time())

    def compose(self, request: Request, images: Sequence[Image], seen: Sequence[Seen]) -> Prompt:
        visual = [
            (each.visual_tokens, visual_key(request.question, image, each, self.card))
            for image, each in zip(images, seen, strict=True)
        ]
        return self.prompts.compose(request.question, visual, request.turns)

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
        with ticket.stage(ticket.writing):
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

    def finish(self, ticket: Ticket, images: Sequence[Image], seen: Sequence[Seen]) -> Finished:
        ticket.outcome = "ok"
        for each in seen:
            self.metrics.vision_tokens.observe(each.relevance.vision_tokens)
            self.metrics.visual_tokens.observe(len(each.visual_tokens))
            self.metrics.images_seen.labels(each.detail).inc()
            self.metrics.relevance_evenness.observe(each.relevance.evenness)
            for name, tension in zip(TENSIONS, each.relevance.tensions, strict=True):
                self.metrics.tension.labels(name).observe(tension)
        if ticket.reduced:
            self.metrics.reduced_answers.inc()
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
            for name, stage in ticket.stages.items():
                self.metrics.stage.labels(name).observe(stage.seconds)
        elif ticket.tokens and ticket.outcome in NOTHING_MORE_TO_DO:
            saved = ticket.request.sampling.max_tokens - ticket.completion_tokens
            self.metrics.tokens_saved.labels(ticket.outcome).inc(saved)
        (log.error if fault else log.info)(
            "answered" if ticket.outcome == "ok" else "not_answered",
            outcome=ticket.outcome,
            request_id=ticket.request.trace_id,
            id=ticket.request.id,
            cache=ticket.cache,
            detail=ticket.detail,
            reduced=ticket.reduced,
            completion_tokens=ticket.completion_tokens,
            **{f"{name}_ms": value for name, value in timing_ms.items()},
            **({"exc_info": fault} if fault else {}),
        )


def internal_error(request_id: str) -> InternalError:
    return InternalError(f"a fault of ours; the log tells of it under request id {request_id}")


def new_seed() -> int:
    """For a request that names none: sampled answers then differ from one to the next."""
    return secrets.randbits(63)


def visual_key(question: str, image: Image, seen: Seen, card: ModelCard) -> bytes:
    """Names what the visual tokens are made from; the question comes last, as it may hold any character."""
    budget = map(str, (*seen.budget.vision_tokens, *seen.budget.visual_tokens))
    return "\0".join([card.visual_fingerprint, image.digest, seen.detail, *budget, question]).encode()


async def together(
    step: Callable[[Look, Ticket, Place], Coroutine[Any, Any, None]],
    looks: Sequence[Look],
    ticket: Ticket,
    place: Place,
) -> None:
    """The step for every image at once. The first that fails ends the others, and is what is raised."""
    if len(looks) <= 1:  # no tasks: they cost 0.1 ms
        for look in looks:
            await step(look, ticket, place)
        return
    try:
        async with asyncio.TaskGroup() as tasks:
            for look in looks:
                tasks.create_task(step(look, ticket, place))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


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
