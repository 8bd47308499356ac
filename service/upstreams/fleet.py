"""Run a gateway's variants: read them again when they change, begin new ones beside the old, and end those that are
gone when they have answered their last question.

Tritons that only GLIMPSE_VISION_URL and GLIMPSE_LLM_URL name are one variant without a name, which never changes.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import structlog

from service.core.card import Engines, ModelCard
from service.core.precision import NotOffered, Precision
from service.settings import Settings, SettingsError
from service.system.watch import Watch
from service.telemetry.metrics import Metrics
from service.text.prompt import PromptBuilder, token_bytes
from service.triton import TritonClient, read_engines
from service.upstreams.models import Model, Models
from service.upstreams.pool import Pool, Triton
from service.upstreams.readiness import GATEWAY
from service.upstreams.store import Store
from service.upstreams.variants import Variant, Variants, VariantsError

log = structlog.get_logger()

LOOK_INTERVAL_S = 0.5  # a changed weight is in use so much later at most, plus the time that reading takes
JOIN_S = 10.0  # that a new variant waits for its Tritons before it gets questions
RETRY_S = 5.0  # between two tries to use variants whose models cannot be read
SERIES_S = 300.0  # that a variant's counts stay in the metrics after its end: until they were read for the last time
STOPPING = "this server is stopping"


@dataclass(frozen=True, slots=True)
class Repository:
    """What a gateway reads of a variant's model repository."""

    card: ModelCard
    prompts: PromptBuilder
    engines: Engines
    spelled: list[bytes]  # each token's bytes; a large vocabulary takes a while, so no request waits for it


def read_repository(folder: Path, mend: str = "name") -> Repository:
    """Raises SettingsError."""
    try:
        card = ModelCard.from_json((folder / "card.json").read_text())
        prompts = PromptBuilder.load(card, folder)
        return Repository(card, prompts, read_engines(folder), token_bytes(prompts.tokenizer))
    except Exception as exc:  # tokenizers raises plain Exception
        raise SettingsError(
            f"{folder} is not a model repository that can be read ({exc}): {mend} a folder that `glimpse build` wrote"
        ) from exc


def computed_in(card: ModelCard, precision: Precision | None, setting: str) -> ModelCard:
    """Return the card of models that a Triton computes in this precision. Raises SettingsError.

    The precision is a part of the feature cache's keys, so gateway and Triton must agree. The gateway cannot know the
    Triton's CPU: None stands for what the models were built in.
    """
    if precision is None:
        return card
    try:
        return card.computed_in(precision)
    except NotOffered as exc:
        raise SettingsError(f"{setting} is {precision}: {exc}") from exc


@dataclass(slots=True, eq=False)
class Running:
    """One variant in use, or one that ends."""

    variant: Variant
    repository: Repository
    pool: Pool
    model: Model | None = None
    watching: asyncio.Task[None] | None = None
    began: float = 0.0  # to be watched; monotonic
    is_late: bool = False  # it did not answer in time, and the log says so

    @property
    def has_users(self) -> bool:
        """Whether a request uses it, or may still try it."""
        return self.model is not None and bool(self.model.users or self.model.in_flight)


class Fleet:
    """Hold the variants in use. `models` is what the pipeline chooses from."""

    def __init__(
        self, store: Store, variants: Variants, settings: Settings, metrics: Metrics, *, named: bool = True
    ) -> None:
        """Read the models of all variants, and start nothing. Raises SettingsError.

        Not `named`: there is one variant, of which callers do not know.
        """
        self.models = Models([], named=named, sticky=variants.sticky)
        self.make: Callable[[Variant, Repository, Pool], Model] | None = None  # set once the pipeline is there
        self.store = store
        self._settings = settings
        self._metrics = metrics
        self._llm_tokens = math.inf if settings.llm_tokens is None else settings.llm_tokens
        self._stopping = False
        self._unused: Variants | None = None  # what was read and is not in use yet
        self._retry_at = 0.0  # by the monotonic clock
        self._trouble = ""  # as last logged
        if not any(not each.is_draining for each in variants.variants.values()):
            raise SettingsError("GLIMPSE_VARIANTS has no variant that may answer: add one with `glimpse variants add`")
        self._running = {name: self._read(variant) for name, variant in variants.variants.items()}
        self._joining: dict[str, Running] = {}  # new ones that do not answer questions yet
        self._wanted: Variants | None = None  # whose weights are not all in use yet
        self._waits = False  # with them, and the log says why
        self._answered_at = -math.inf  # by the monotonic clock, while something is wanted
        self._ending: list[Running] = []
        self._ended: dict[str, float] = {}  # when variants ended whose series are still there, by the monotonic clock
        self._called: set[str] = set()  # models that have a gauge
        self._served: set[tuple[str, str]] = set()  # models and precisions that have a gauge
        metrics.ready.set_function(lambda: self.ready)

    def _read(self, variant: Variant) -> Running:
        """Raises SettingsError."""
        named = self.models.named
        repository = read_repository(Path(variant.models), "name" if named else "set GLIMPSE_MODEL_REPOSITORY to")
        setting = f"the precision of the variant {variant.name}" if named else "GLIMPSE_PRECISION"
        card = computed_in(repository.card, variant.precision, setting)
        if card.max_positions > self._llm_tokens:
            raise SettingsError(
                f"this gateway has {self._llm_tokens:g} LLM tokens for all requests, and one request of {card.name} "
                f"can need {card.max_positions}: start it with GLIMPSE_LLM_TOKENS={card.max_positions} or more"
            )
        repository = replace(repository, card=card)
        pool = Pool(
            variant.name,
            card,
            variant.vision,
            variant.llm,
            client=partial(self.client, card),
            budget=self.models.retries,
            metrics=self._metrics,
            first_token_s=self._settings.first_token_budget_s,
        )
        return Running(variant, repository, pool)

    def client(self, card: ModelCard, address: str) -> Triton:
        """Make the client of one Triton."""
        return TritonClient(address, address, text_type=card.text_type)

    @property
    def primary(self) -> Running:
        """Return the variant that gets most questions."""
        return max(self._running.values(), key=lambda each: (not each.variant.is_draining, each.variant.weight))

    @property
    def running(self) -> Mapping[str, Running]:
        """Return the variants in use, by their names."""
        return self._running

    @property
    def cards(self) -> list[ModelCard]:
        return [each.repository.card for each in self._running.values()]

    def begin(self, make: Callable[[Variant, Repository, Pool], Model], llm_tokens: int) -> None:
        """Make the models of the first variants. `llm_tokens`: what all requests may reserve together."""
        self.make, self._llm_tokens = make, llm_tokens
        for each in self._running.values():
            self._begin(each)
        self._publish(self.models.sticky)

    def _begin(self, running: Running) -> None:
        assert self.make is not None
        running.model = model = self.make(running.variant, running.repository, running.pool)
        self._metrics.begin_variant(running.variant.name)
        gauge = self._metrics.variant_in_flight.labels(running.variant.name)
        gauge.set_function(lambda: model.in_flight)

    def _publish(self, sticky: str) -> None:
        """Let the pipeline choose from the variants as they are now."""
        self.models.sticky = "tenant" if sticky == "tenant" else "session"
        self.models.models = [each.model for each in self._running.values() if each.model is not None]
        for each in self._running.values():
            assert each.model is not None
            each.model.weight, each.model.is_draining = each.variant.weight, each.variant.is_draining
            self._metrics.variant_weight.labels(each.variant.name).set(
                0 if each.variant.is_draining else each.variant.weight
            )
        called = {name for card in self.cards for name in card.called}
        for name in called - self._called:
            self._metrics.model_ready.labels(name).set_function(partial(self._answers, name))
        for name in self._called - called:
            self._metrics.model_ready.remove(name)
        self._called = called
        served = {(card.name, card.precision) for card in self.cards}
        for model in served - self._served:
            self._metrics.model_info.labels(*model).set(1)
        for model in self._served - served:
            self._metrics.model_info.remove(*model)
        self._served = served

    def _answers(self, name: str) -> bool:
        """Whether a model answers in any variant."""
        return any(each.pool.answers_with(name) for each in self._running.values())

    @property
    def ready(self) -> bool:
        return not self.faults

    @property
    def faults(self) -> Mapping[str, str]:
        """Return why no variant can answer, by their Tritons; empty if one can."""
        if self._stopping:
            return {GATEWAY: STOPPING}
        if any(each.pool.answers for each in self._running.values() if not each.variant.is_draining):
            return {}
        return self.degraded or {GATEWAY: "no variant answers" if self.models.named else "no Triton was found yet"}

    @property
    def degraded(self) -> Mapping[str, str]:
        """Return which Tritons are out, as VARIANT/ADDRESS, and why. Without named variants, as ADDRESS."""
        return {
            f"{name}/{address}" if self.models.named else address: fault
            for name, each in self._running.items()
            for address, fault in each.pool.faults().items()
        }

    def stop(self) -> None:
        """Be not ready from now on."""
        self._stopping = True

    async def run(self) -> None:
        """Watch the Tritons, and follow changes of the variants, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.store.run())
            for each in self._running.values():
                self._watch(each, tasks)
            watch = Watch("variants")
            while True:
                with watch.surviving():
                    await self._look(tasks)
                    self._settle()
                    self._end_idle()
                await asyncio.sleep(LOOK_INTERVAL_S)

    def _watch(self, running: Running, tasks: asyncio.TaskGroup) -> None:
        settings = self._settings
        running.watching = tasks.create_task(running.pool.watch(settings.probe_interval_s, settings.probe_timeout_s))

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        """Use the variants if they changed. What cannot be read or used leaves the last ones in use."""
        try:
            if (variants := await self.store.changed()) is not None:
                self._unused, self._retry_at = variants, 0.0
            if self._unused is not None:
                if time.monotonic() < self._retry_at:
                    return
                self._retry_at = time.monotonic() + RETRY_S
                await self._use(self._unused, tasks)
                self._unused = None
        except (VariantsError, SettingsError) as error:
            self._metrics.variants_readable.set(0)
            if str(error) != self._trouble:
                self._trouble = str(error)
                log.warning("variants_not_read", reason=str(error), in_use=",".join(self._running))
            return
        self._metrics.variants_readable.set(1)
        self._trouble = ""

    async def _use(self, variants: Variants, tasks: asyncio.TaskGroup) -> None:
        """Keep what serves the same, let what is new join and what is gone end. Raises VariantsError, SettingsError."""
        if not any(not each.is_draining for each in variants.variants.values()):
            raise VariantsError("no variant may answer: add one with `glimpse variants add`")
        joining: dict[str, Running] = {}
        for name, variant in variants.variants.items():
            if (old := self._running.get(name)) is not None and old.variant.serves == variant.serves:
                continue
            known = self._joining.get(name)
            is_known = known is not None and known.variant.serves == variant.serves
            joining[name] = known if known is not None and is_known else await asyncio.to_thread(self._read, variant)
        for name, each in joining.items():
            each.variant = variants.variants[name]
            if each.watching is None:
                each.began = time.monotonic()
                self._watch(each, tasks)
        for name, each in self._joining.items():
            if joining.get(name) is not each:
                each.pool.leave()
        self._joining, self._wanted = joining, variants
        self._settle()

    def _settle(self) -> None:
        """Let new variants join, and then use the weights that are wanted, and let go of what is not.

        Nothing changes while variants answer, and none of those that are to get questions does. A Triton may fail for a
        moment, so this holds for JOIN_S after the last answer.
        """
        self._join()
        if (wanted := self._wanted) is None:
            return
        takers = wanted.weighing or {name for name, each in wanted.variants.items() if not each.is_draining}
        taken = any(each.pool.answers for name, each in self._running.items() if name in takers)
        if answers := self._is_answered():
            self._answered_at = time.monotonic()
        if not taken and (self._joining or time.monotonic() - self._answered_at < JOIN_S):
            if answers and not self._waits:
                log.warning(
                    "variants_wait", reason="none that is to get questions answers", in_use=",".join(self._running)
                )
            self._waits = answers
            return
        self._waits = False
        if not self._joining:
            self._wanted = None
        for name, running in list(self._running.items()):
            if (told := wanted.variants.get(name)) is None:
                self._ending.append(self._running.pop(name))
            else:  # an older one of this name stays until the new one joins
                running.variant = replace(running.variant, weight=told.weight, is_draining=told.is_draining)
        before = {model.variant: (model.weight, model.is_draining) for model in self.models.models}
        self._publish(wanted.sticky)
        if before != {model.variant: (model.weight, model.is_draining) for model in self.models.models}:
            weights = " ".join(f"{name}={each.variant.weight:g}" for name, each in self._running.items())
            log.info("variants_in_use", weights=weights)

    def _is_answered(self) -> bool:
        """Whether questions without a variant's name are answered, as the weights are now."""
        getting = [each for each in self._running.values() if not each.variant.is_draining]
        getting = [each for each in getting if each.variant.weight > 0] or getting
        return any(each.pool.answers for each in getting)

    def _join(self) -> None:
        """Let new variants answer whose Tritons do. One without any joins after JOIN_S nevertheless: it tells why.

        One that takes the place of an older one joins when it answers. It has the other's weight until `_settle`.
        """
        now = time.monotonic()
        for name, each in list(self._joining.items()):
            old, is_late = self._running.get(name), now - each.began >= JOIN_S
            if not each.pool.answers:
                if is_late and not each.is_late:
                    each.is_late = True
                    faults = ", ".join(f"{address}: {fault}" for address, fault in each.pool.faults().items())
                    log.warning("variant_does_not_answer", variant=name, seconds=JOIN_S, faults=faults)
                if not is_late or old is not None:
                    continue
            del self._joining[name]
            weight, is_draining = (0.0, False) if old is None else (old.variant.weight, old.variant.is_draining)
            each.variant = replace(each.variant, weight=weight, is_draining=is_draining)
            self._begin(each)
            if old is not None:
                self._ending.append(old)
            self._running[name] = each
            self._publish(self.models.sticky)
            log.info("variant_joined", variant=name)

    def _end_idle(self) -> None:
        """Let go of variants that are gone, once no request uses them."""
        for each in [each for each in self._ending if not each.has_users]:
            self._ending.remove(each)
            each.pool.leave()
            name = each.variant.name
            if name not in self._running:
                self._metrics.variant_in_flight.remove(name)
                self._metrics.variant_weight.remove(name)
                self._ended[name] = time.monotonic()
            log.info("variant_ended", variant=name)
        for name, ended_at in list(self._ended.items()):
            if name in self._running:  # it is back
                del self._ended[name]
            elif time.monotonic() - ended_at >= SERIES_S:
                del self._ended[name]
                self._metrics.end_variant(name)
