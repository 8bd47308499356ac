"""Make every part from Settings once (the composition root), and own the tasks that live as long as the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from fastapi import FastAPI

from service.access.gate import IN_REDIS, Gate, NoGate
from service.access.key_file import KeyFile
from service.access.key_redis import KeysInRedis
from service.access.keys import Keyring, KeysError, Limits
from service.access.quotas import Quotas
from service.access.windows import SharedWindows, Windows
from service.admission.admission import Admission
from service.admission.scheduler import Scheduler
from service.cache.redis_client import RedisFault, connect
from service.cache.redis_tier import RedisLimits, RedisTier
from service.cache.shared_images import SharedImages
from service.core.access import Authenticator
from service.core.card import ModelCard
from service.core.precision import Choice
from service.core.variant import DEFAULT
from service.edges.asking import QuestionLimits
from service.edges.batching import BatchLimits
from service.edges.grpc.edge import GrpcEdge
from service.edges.http.application import http_api
from service.edges.http.body import BodyLimits
from service.edges.http.edge import ConnectionLimits, Edge
from service.edges.http.hosts import allowed_hosts
from service.edges.loop_lag import LoopLag
from service.edges.loop_turns import LoopTurns
from service.edges.proxies import Proxies
from service.edges.vertex.predict import HEALTH, PREDICT
from service.media.decoder import ImageLimits
from service.media.fetch import FetchRules, ImageFetcher
from service.media.reader import WorkerReader
from service.pipeline import Pipeline
from service.settings import Settings, SettingsError
from service.telemetry.exposition import Exposition
from service.telemetry.metrics import Metrics
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.engine_choice import choice
from service.triton_server.supervision import EmbeddedTriton
from service.upstreams.control import Control
from service.upstreams.fleet import Fleet, Repository, read_repository
from service.upstreams.models import Model, Models
from service.upstreams.pool import Pool
from service.upstreams.readiness import Readiness
from service.upstreams.store import IN_REDIS as VARIANTS_IN_REDIS
from service.upstreams.store import FixedVariants, Store, VariantsFile, VariantsInRedis
from service.upstreams.variants import Variant, Variants, VariantsError

NO_KEYS = Keyring()

if TYPE_CHECKING:
    from service.telemetry.spans import Traces

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class App:
    """Everything that makes up one running service."""

    settings: Settings
    card: ModelCard
    precision: Choice | None  # that the embedded Triton's models compute in
    access: Access  # of the embedded Triton
    client: TritonClient  # of the embedded Triton
    fleet: Fleet | None  # the Tritons that run elsewhere; None if the gateway starts its own
    admission: Admission
    reader: WorkerReader
    fetcher: ImageFetcher | None
    shared: RedisTier | None
    shared_images: SharedImages | None
    readiness: Readiness | Fleet
    metrics: Metrics
    lag: LoopLag
    gate: Gate | NoGate
    quotas: Quotas
    traces: Traces | None
    api: FastAPI
    rpc: GrpcEdge


def build(settings: Settings, scheduling: type[Scheduler] = Scheduler) -> App:
    """Read the model repository's card and tokenizers and make all parts; start nothing. Raises SettingsError."""
    require_keys(settings)
    require_redis_address(settings)
    metrics = Metrics(settings.tenant_labels)
    fleet = fleet_of(settings, metrics)
    if fleet is None:
        repository = read_repository(settings.model_repository, "set GLIMPSE_MODEL_REPOSITORY to")
    else:
        repository = fleet.primary.repository
    card, engines = repository.card, repository.engines
    chosen = None
    if fleet is None:
        chosen = choice(settings, card)
        card = card.computed_in(chosen.precision)
    if settings.llm_tokens is not None and settings.llm_tokens < card.max_positions:
        raise SettingsError(
            f"GLIMPSE_LLM_TOKENS is {settings.llm_tokens}, one request of {card.name} can need {card.max_positions}: "
            f"raise it to at least {card.max_positions}"
        )
    access = Access.choose(Ports(settings.triton_grpc_port, settings.triton_metrics_port))
    client = TritonClient(access.url, access.url, access.metadata, card.text_type)
    image_limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels)
    reader = WorkerReader(image_limits, settings.decode_workers, settings.decode_cpu_s, metrics.costs.decoded)
    readiness = Readiness(card.called, metrics, client.failing) if fleet is None else fleet
    max_positions = card.max_positions if fleet is None else max(each.max_positions for each in fleet.cards)
    admission = Admission(settings, engines, max_positions, metrics, scheduling)
    shared = redis_tier(settings, card, metrics)
    gate = gate_of(settings, metrics)
    quotas = quotas_of(settings, gate, shared, metrics)
    shared_images = shared_images_of(settings, shared, metrics)
    fetcher = image_fetcher(settings, metrics)
    traces = traces_of(settings, card)
    models = Models([]) if fleet is None else fleet.models
    pipeline = Pipeline(
        admission=admission,
        models=models,
        reader=reader,
        settings=settings,
        metrics=metrics,
        shared=shared,
        accounts=quotas,
        shared_images=shared_images,
        fetcher=fetcher,
        traces=traces,
    )
    if fleet is None:
        metrics.model_info.labels(card.name, card.precision).set(1)
        models.models = [pipeline.model(client, client, card, repository.prompts, spelled=repository.spelled)]
    else:
        fleet.begin(partial(model_of, pipeline, shared), admission.llm_tokens)
    lag, turns = LoopLag(metrics.event_loop_lag.observe, lambda: pipeline.admission.is_busy), LoopTurns()
    api = http_api(http_edge(pipeline, readiness, settings, metrics, lag, gate, turns))
    rpc = grpc_edge(pipeline, readiness, settings, metrics, lag, gate, turns)
    return App(
        settings=settings,
        card=card,
        precision=chosen,
        access=access,
        client=client,
        fleet=fleet,
        admission=admission,
        reader=reader,
        fetcher=fetcher,
        shared=shared,
        shared_images=shared_images,
        readiness=readiness,
        metrics=metrics,
        lag=lag,
        traces=traces,
        gate=gate,
        quotas=quotas,
        api=api,
        rpc=rpc,
    )


def fleet_of(settings: Settings, metrics: Metrics) -> Fleet | None:
    """Read what the Tritons elsewhere serve; None if the gateway starts its own. Raises SettingsError."""
    if settings.vision_url and settings.llm_url:
        precision = None if settings.precision == "auto" else settings.precision
        models, vision, llm = str(settings.model_repository), (settings.vision_url,), (settings.llm_url,)
        alone = Variants({DEFAULT: Variant(DEFAULT, models, vision, llm, 1.0, precision=precision)})
        return Fleet(FixedVariants(alone), alone, settings, metrics, named=False)
    if not settings.variants:
        return None
    if settings.precision != "auto":
        raise SettingsError(
            f"GLIMPSE_PRECISION is {settings.precision}, but each variant has its own: unset it, and give the variant "
            "a precision with `glimpse variants add --precision`"
        )
    try:
        if settings.variants == VARIANTS_IN_REDIS:
            assert settings.redis_url is not None
            store: Store = VariantsInRedis(settings.redis_url.get_secret_value())
        else:
            store = VariantsFile(Path(settings.variants))
        return Fleet(store, asyncio.run(store.loaded()), settings, metrics)
    except VariantsError as exc:
        raise SettingsError(f"GLIMPSE_VARIANTS: {exc}") from exc
    except RedisFault as exc:
        raise SettingsError(f"GLIMPSE_VARIANTS: Redis does not answer ({exc.message})") from exc


def model_of(
    pipeline: Pipeline, shared: RedisTier | None, variant: Variant, repository: Repository, pool: Pool
) -> Model:
    """Make what answers for one variant."""
    if shared is not None:
        shared.know(repository.card)
    return pipeline.model(
        pool,
        pool,
        repository.card,
        repository.prompts,
        spelled=repository.spelled,
        variant=variant.name,
        weight=variant.weight,
        health=pool,
    )


def require_keys(settings: Settings) -> None:
    """Raise SettingsError if others than this machine could ask without a key, and nobody said that they may."""
    if settings.keys or settings.without_keys or not settings.listens_to_others:
        return
    raise SettingsError(
        f"GLIMPSE_HTTP_HOST is {settings.http_host}, so other machines could ask without a key: make keys with "
        "`glimpse keys create` and name their file in GLIMPSE_KEYS, or let everyone ask with "
        "GLIMPSE_WITHOUT_KEYS=anyone-may-ask"
    )


def require_redis_address(settings: Settings) -> None:
    """Raise SettingsError for a URL that no part can use."""
    if settings.redis_url is None:
        return
    try:
        connect(settings.redis_url.get_secret_value())
    except ValueError as exc:
        raise SettingsError(f"GLIMPSE_REDIS_URL: {exc}") from exc


def gate_of(settings: Settings, metrics: Metrics) -> Gate | NoGate:
    """Read the keys in a file; those in Redis are read later. Raises SettingsError."""
    if not settings.keys:
        return NoGate()
    try:
        if settings.keys == IN_REDIS:
            assert settings.redis_url is not None
            return Gate(KeysInRedis(settings.redis_url.get_secret_value()), metrics)
        file = KeyFile(Path(settings.keys))
        return Gate(file, metrics, first=file.read())
    except KeysError as exc:
        raise SettingsError(f"GLIMPSE_KEYS: {exc}") from exc


def shared_images_of(settings: Settings, shared: RedisTier | None, metrics: Metrics) -> SharedImages | None:
    if settings.redis_url is None or shared is None or not settings.share_images:
        return None
    return SharedImages(settings.redis_url.get_secret_value(), shared, metrics, settings.image_ttl_s)


def quotas_of(settings: Settings, gate: Gate | NoGate, shared: RedisTier | None, metrics: Metrics) -> Quotas:
    """Count in Redis if there is one, else in this process."""
    defaults = Limits(
        settings.quota_requests_per_minute,
        settings.quota_images_per_minute,
        settings.quota_visual_tokens_per_minute,
        settings.quota_generated_tokens_per_minute,
        settings.quota_concurrent_requests,
    )
    windows = Windows(settings.quota_gateways or 1)
    if settings.redis_url is not None and shared is not None:
        windows = SharedWindows(
            settings.redis_url.get_secret_value(),
            shared,
            metrics,
            timeout_s=settings.redis_timeout_s,
            gateways=settings.quota_gateways,
        )

    def ring() -> Keyring:
        return (gate.keyring if isinstance(gate, Gate) else None) or NO_KEYS

    return Quotas(defaults, ring, windows, metrics)


def http_edge(
    pipeline: Pipeline,
    readiness: Readiness | Fleet,
    settings: Settings,
    metrics: Metrics,
    lag: LoopLag | None = None,
    access: Authenticator | None = None,
    turns: LoopTurns | None = None,
) -> Edge:
    """Give the HTTP edge the parts of the gateway that it uses."""
    turns = turns or LoopTurns()
    return Edge(
        pipeline=pipeline,
        questions=question_limits(settings),
        batches=batch_limits(settings),
        bodies=body_limits(settings),
        connections=ConnectionLimits(
            settings.max_connections,
            settings.max_connections_per_address,
            settings.replaced_connections_per_address_s,
        ),
        hosts=allowed_hosts(settings.http_host, settings.allowed_hosts),
        faults=partial(faults_of, readiness, access or NoGate()),
        degraded=lambda: readiness.degraded,
        metrics=Exposition(metrics.registry).text,
        count=lambda method, route, status: metrics.http_requests.labels(method, route, status).inc(),
        lag_s=lambda: max(lag.seconds if lag else 0.0, turns.waited_s),
        turns=turns,
        access=access or NoGate(),
        variants=Control(readiness) if isinstance(readiness, Fleet) and pipeline.has_variants else None,
        metrics_are_open=settings.metrics_without_key,
        log_client_address=settings.log_client_address,
        proxies=Proxies(settings.trusted_proxies),
        aliases=vertex_paths(settings),
        cors_origins=settings.cors_origins,
    )


def faults_of(readiness: Readiness | Fleet, access: Authenticator) -> Mapping[str, str]:
    """Return why the service cannot answer: by model, and for the API keys."""
    return {**readiness.faults, **({"keys": access.fault} if access.fault else {})}


def vertex_paths(settings: Settings) -> dict[str, str]:
    """Return Vertex AI's paths and ours; none where Vertex AI named no predict route."""
    if settings.vertex_predict_route is None:
        return {}
    paths = {settings.vertex_predict_route: PREDICT}
    return paths if settings.vertex_health_route is None else {settings.vertex_health_route: HEALTH} | paths


def grpc_edge(
    pipeline: Pipeline,
    readiness: Readiness | Fleet,
    settings: Settings,
    metrics: Metrics,
    lag: LoopLag | None = None,
    access: Authenticator | None = None,
    turns: LoopTurns | None = None,
) -> GrpcEdge:
    """Give the gRPC edge the parts of the gateway that it uses."""
    turns = turns or LoopTurns()
    return GrpcEdge(
        pipeline=pipeline,
        questions=question_limits(settings),
        batches=batch_limits(settings),
        bodies=body_limits(settings),
        max_connections=settings.max_connections,
        faults=partial(faults_of, readiness, access or NoGate()),
        count=lambda method, status: metrics.grpc_requests.labels(method, status).inc(),
        lag_s=lambda: max(lag.seconds if lag else 0.0, turns.waited_s),
        turns=turns,
        access=access or NoGate(),
        log_client_address=settings.log_client_address,
        proxies=Proxies(settings.trusted_proxies),
    )


def question_limits(settings: Settings) -> QuestionLimits:
    return QuestionLimits(settings.max_question_chars, settings.default_timeout_s, settings.max_timeout_s)


def batch_limits(settings: Settings) -> BatchLimits:
    return BatchLimits(settings.max_batch_questions, settings.batch_timeout_s)


def body_limits(settings: Settings) -> BodyLimits:
    return BodyLimits(settings.max_body_bytes, settings.max_image_bytes, settings.body_timeout_s)


def image_fetcher(settings: Settings, metrics: Metrics) -> ImageFetcher | None:
    """Make the fetcher of images from URLs, or None if no host is allowed."""
    if not settings.image_url_hosts:
        return None
    rules = FetchRules(
        hosts=settings.image_url_hosts,
        max_bytes=settings.max_image_bytes,
        ports=frozenset(settings.image_url_ports),
        allows_http=settings.image_url_http,
        private_networks=settings.image_url_private_networks,
        timeout_s=settings.image_url_timeout_s,
        at_once=settings.image_urls_at_once,
        at_once_of_a_tenant=settings.image_urls_at_once_of_a_tenant,
    )
    return ImageFetcher(rules, metrics)


def redis_tier(settings: Settings, card: ModelCard, metrics: Metrics) -> RedisTier | None:
    """Make the Redis tier, or None without a URL; start nothing."""
    if settings.redis_url is None:
        return None
    limits = RedisLimits(settings.redis_timeout_s, settings.redis_flight_s, settings.redis_ttl_s)
    return RedisTier(settings.redis_url.get_secret_value(), limits, card, metrics)


def traces_of(settings: Settings, card: ModelCard) -> Traces | None:
    """Make the sender of traces, or None without a receiver."""
    if settings.otlp_endpoint is None:
        return None
    from service.telemetry.spans import Traces  # noqa: PLC0415 - 20 MB that a service without traces does not need

    return Traces(settings.otlp_endpoint, settings.trace_share, card.name, gen_ai=settings.trace_gen_ai)


@asynccontextmanager
async def running(app: App) -> AsyncIterator[None]:
    """Start the embedded Triton, or connect to an external one, and watch it while the block runs.

    Raises StartFailed. A watcher that fails cancels the block, so the service never runs without its watchers.
    """
    settings = app.settings
    if app.precision is not None:
        log.info("precision", precision=app.precision.precision, why=app.precision.why)
    async with AsyncExitStack() as parts:
        if app.traces is not None:
            parts.callback(app.traces.close)
        parts.callback(app.reader.close)
        if app.fetcher is not None:
            parts.callback(app.fetcher.close)
        app.reader.start()
        if app.fleet is None:
            await parts.enter_async_context(app.client)
        triton: EmbeddedTriton | None = None
        if settings.embedded:
            triton = await parts.enter_async_context(embedded_triton(app))
            assert isinstance(app.readiness, Readiness)
            await app.readiness.probe(app.client, app.card, settings.probe_timeout_s)
        async with asyncio.TaskGroup() as tasks:
            watchers = [tasks.create_task(watch_models(app)), tasks.create_task(app.lag.watch())]
            if triton is not None:
                watchers.append(tasks.create_task(triton.supervise()))
            if app.shared is not None:
                watchers.append(tasks.create_task(app.shared.run()))
            if app.shared_images is not None:
                watchers.append(tasks.create_task(app.shared_images.run()))
            watchers.append(tasks.create_task(app.quotas.run()))
            if isinstance(app.gate, Gate):
                watchers.append(tasks.create_task(app.gate.run()))
            yield
            for watcher in watchers:
                watcher.cancel()


async def watch_models(app: App) -> None:
    """Probe the models until cancelled."""
    if isinstance(app.readiness, Fleet):
        await app.readiness.run()
    else:
        interval_s, timeout_s = app.settings.probe_interval_s, app.settings.probe_timeout_s
        await app.readiness.watch(app.client, app.card, interval_s, timeout_s)


def embedded_triton(app: App) -> EmbeddedTriton:
    settings = app.settings
    return EmbeddedTriton(
        settings.model_repository,
        client=app.client,
        card=app.card,
        log_path=settings.triton_log,
        access=app.access,
        precision=app.card.precision,
        start_timeout_s=settings.triton_start_timeout_s,
    )
