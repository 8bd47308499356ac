"""The composition root: makes every part from Settings once, and owns the tasks that live as long as the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0 as METRICS_TYPE

from service.admission.admission import Admission
from service.admission.scheduler import Scheduler
from service.cache.redis_tier import RedisLimits, RedisTier
from service.core.card import ModelCard
from service.edges.asking import QuestionLimits
from service.edges.http.application import http_api
from service.edges.http.body import BodyLimits
from service.edges.http.edge import ConnectionLimits, Edge
from service.edges.http.hosts import allowed_hosts
from service.edges.loop_lag import watch_loop
from service.media.decoder import ImageLimits
from service.media.reader import ImageReader
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.prompt import PromptBuilder
from service.readiness import Readiness
from service.settings import Settings, SettingsError
from service.triton import TritonClient, read_engines
from service.triton_server.installation import Ports
from service.triton_server.supervision import EmbeddedTriton


@dataclass(frozen=True, slots=True)
class App:
    """Everything that makes up one running service."""

    settings: Settings
    card: ModelCard
    client: TritonClient
    admission: Admission
    reader: ImageReader
    shared: RedisTier | None
    readiness: Readiness
    metrics: Metrics
    api: FastAPI


def build(settings: Settings, scheduling: type[Scheduler] = Scheduler) -> App:
    """Reads the model repository's card and tokenizers; starts nothing. Raises SettingsError."""
    try:
        card = ModelCard.from_json((settings.model_repository / "card.json").read_text())
        prompts = PromptBuilder.load(card, settings.model_repository)
        engines = read_engines(settings.model_repository)
    except Exception as exc:  # tokenizers raises plain Exception
        raise SettingsError(
            f"no model repository that can be read in {settings.model_repository} ({exc}): "
            "point GLIMPSE_MODEL_REPOSITORY at one, or make it with `make repository`"
        ) from exc
    if settings.llm_tokens is not None and settings.llm_tokens < card.max_positions:
        raise SettingsError(
            f"GLIMPSE_LLM_TOKENS must hold at least one request of {card.name}, {card.max_positions} tokens"
        )
    embedded_url = f"127.0.0.1:{settings.triton_grpc_port}"
    metrics = Metrics()
    client = TritonClient(settings.vision_url or embedded_url, settings.llm_url or embedded_url)
    reader = ImageReader(ImageLimits(settings.max_image_bytes, settings.max_image_pixels), settings.decode_threads)
    readiness = Readiness(card.called, metrics)
    admission = Admission(settings, engines, card.max_positions, metrics, scheduling)
    shared = redis_tier(settings, card, metrics)
    pipeline = Pipeline(
        vision=client,
        language=client,
        admission=admission,
        card=card,
        prompts=prompts,
        reader=reader,
        settings=settings,
        metrics=metrics,
        shared=shared,
    )
    api = http_api(http_edge(pipeline, readiness, settings, metrics))
    return App(settings, card, client, admission, reader, shared, readiness, metrics, api)


def http_edge(pipeline: Pipeline, readiness: Readiness, settings: Settings, metrics: Metrics) -> Edge:
    """All that HTTP sees of the gateway."""
    return Edge(
        pipeline=pipeline,
        questions=QuestionLimits(settings.max_question_chars, settings.default_timeout_s, settings.max_timeout_s),
        bodies=BodyLimits(settings.max_body_bytes, settings.max_image_bytes, settings.body_timeout_s),
        connections=ConnectionLimits(settings.max_connections, settings.max_connections_per_address),
        hosts=allowed_hosts(settings.http_host, settings.allowed_hosts),
        faults=lambda: {model: fault for model, fault in readiness.faults.items() if fault},
        metrics=lambda: (generate_latest(metrics.registry), METRICS_TYPE),
        count=lambda method, route, status: metrics.http_requests.labels(method, route, status).inc(),
    )


def redis_tier(settings: Settings, card: ModelCard, metrics: Metrics) -> RedisTier | None:
    """Starts nothing. Raises SettingsError."""
    if settings.redis_url is None:
        return None
    limits = RedisLimits(settings.redis_timeout_s, settings.redis_flight_s, settings.redis_ttl_s)
    try:
        return RedisTier(settings.redis_url.get_secret_value(), limits, card, metrics)
    except ValueError as exc:
        raise SettingsError(f"GLIMPSE_REDIS_URL: {exc}") from exc


@asynccontextmanager
async def running(app: App) -> AsyncIterator[None]:
    """Triton is started (embedded) or only addressed (external), and watched while the block runs.

    Raises StartFailed. A watcher that fails cancels the block: a service that nobody watches is not left standing.
    """
    settings = app.settings
    async with AsyncExitStack() as parts:
        parts.callback(app.reader.close)
        await parts.enter_async_context(app.client)
        triton: EmbeddedTriton | None = None
        if settings.embedded:
            triton = await parts.enter_async_context(embedded_triton(app))
            await app.readiness.probe(app.client, app.card, settings.probe_timeout_s)
        async with asyncio.TaskGroup() as tasks:
            watch = app.readiness.watch(app.client, app.card, settings.probe_interval_s, settings.probe_timeout_s)
            watchers = [tasks.create_task(watch), tasks.create_task(watch_loop(app.metrics.event_loop_lag.observe))]
            if triton is not None:
                watchers.append(tasks.create_task(triton.supervise()))
            if app.shared is not None:
                watchers.append(tasks.create_task(app.shared.run()))
            yield
            for watcher in watchers:
                watcher.cancel()


def embedded_triton(app: App) -> EmbeddedTriton:
    settings = app.settings
    return EmbeddedTriton(
        settings.model_repository,
        client=app.client,
        card=app.card,
        log_path=settings.log_dir / "triton.log",
        ports=Ports(settings.triton_http_port, settings.triton_grpc_port, settings.triton_metrics_port),
        start_timeout_s=settings.triton_start_timeout_s,
    )
