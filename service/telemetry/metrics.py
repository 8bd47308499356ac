"""Declare every metric of the gateway, in base units; counters end in `_total`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Self, cast

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.process_collector import ProcessCollector

from service.core.errors import BATCH_WAIT, SHORT_DEADLINE, error_codes
from service.core.variant import DEFAULT
from service.system.resources import Resources
from service.telemetry.costs import Costs

# Bucket bounds include the usual objectives 0.2, 0.5, 1 and 2 s.
SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.06,
    0.08,
    0.12,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    2.0,
    5.0,
    10.0,
    30.0,
)
TOKENS = (16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 400)
EVENNESS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 1.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class _Labelled(MetricWrapperBase):
    """Find a series that exists by one lookup. A question needs twenty, and the library checks and locks for each."""

    def labels(self, *values: object, **named: object) -> Self:
        known = cast(dict[tuple[object, ...], Self], self._metrics).get(values)
        return super().labels(*values, **named) if known is None else known


class Counter(_Labelled, prometheus_client.Counter):
    pass


class Gauge(_Labelled, prometheus_client.Gauge):
    pass


class Histogram(_Labelled, prometheus_client.Histogram):
    pass


class Metrics:
    """Hold one gateway's metrics in their own registry."""

    def __init__(self, tenant_labels: int = 50) -> None:  # noqa: PLR0915 - one statement a metric
        self.registry = CollectorRegistry()
        self._holders: defaultdict[tuple[Counter | Gauge, str, str], int] = defaultdict(int)
        ProcessCollector(registry=self.registry)
        self.registry.register(Resources())
        self.costs = Costs(tenant_labels)
        self.registry.register(self.costs)
        self.requests = self._counter(
            "requests",
            "Questions that ended, by outcome: ok, an error code, or short_deadline (a deadline that the caller made "
            "shorter than the service's default).",
            "outcome",
            "variant",
        )
        self.model_info = self._gauge("model_info", "1 for each served model and its precision.", "model", "precision")
        self.http_requests = self._counter(
            "http_requests", "HTTP requests, by method, route and status code.", "method", "route", "status"
        )
        self.grpc_requests = self._counter("grpc_requests", "gRPC calls, by method and status.", "method", "status")
        self.in_flight = self._gauge("requests_in_flight", "Questions that are admitted and have not ended.")
        self.refusals = self._counter(
            "refusals",
            "Refusals for lack of capacity, by reason: saturated, tenant_share, deadline, short_deadline (one that the "
            "caller made shorter than the default), shutting_down, batch_wait (a question of a batch is asked again). "
            "A refused request gets no answer; if only its closer view was refused, it is answered without that view.",
            "reason",
        )
        self.image_fetches = self._counter(
            "image_fetches", "Images fetched from URLs, by outcome: ok or an error code.", "outcome"
        )
        self.requests_waiting = self._gauge(
            "requests_waiting", "Requests that wait for a vision slot or for the LLM.", "kind"
        )
        self.requests_running = self._gauge(
            "requests_running", "Requests that hold vision slots or LLM tokens.", "kind"
        )
        self.resource_used = self._gauge(
            "resource_used", "Amount granted: images in the vision stage, tokens in the LLM.", "resource"
        )
        self.admitted_cost = self._gauge("admitted_cost", "Quota reserved by all admitted requests, by unit.", "unit")
        self.concurrency_limit = self._gauge(
            "concurrency_limit",
            "Most requests in service at once. It falls below the capacity if requests miss their deadlines.",
        )
        self.fidelity_level = self._gauge(
            "fidelity_level", "Level of elastic fidelity: 0 looks as closely as requested, 4 least closely."
        )
        self.fidelity_changes = self._counter("fidelity_changes", "Changes of the level of elastic fidelity.")
        self.reduced_answers = self._counter("reduced_answers", "Answers that looked less closely than requested.")
        self.request_queue_time = self._seconds(
            "request_queue_time_seconds", "Seconds that an answered question waited for grants.", "kind"
        )
        self.tokens_saved = self._counter(
            "tokens_saved",
            "Most tokens that cancelled or expired questions can have saved: max_tokens minus generated tokens.",
            "reason",
        )
        self.e2e_request_latency = self._seconds(
            "e2e_request_latency_seconds",
            "Seconds from arrival to the end of the answer, answered questions only.",
            "variant",
        )
        self.time_to_first_token = self._seconds(
            "time_to_first_token_seconds",
            "Seconds from arrival to the first token, of answers that are streamed.",
            "variant",
        )
        self.inter_token_latency = self._seconds(
            "inter_token_latency_seconds",
            "Seconds between two tokens of an answer; tokens that come in one response share the time since the last.",
        )
        self.stage = self._seconds(
            "stage_seconds",
            "Seconds in each stage of an answered question: queue; load (includes decode_image, decode_clip); vision "
            "(includes lookup, see or encode, attend); prefill and decode, or generate if the answer is not streamed.",
            "stage",
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Text tokens sent to the LLM, for questions of any outcome.", "variant"
        )
        self.generated_tokens = self._counter(
            "generated_tokens", "Tokens received from the LLM, for questions of any outcome.", "variant"
        )
        self.vision_tokens = self._tokens("vision_tokens", "Vision tokens kept per image and question.")
        self.visual_tokens = self._tokens("visual_tokens", "Visual tokens sent to the LLM per image and question.")
        self.images_seen = self._counter(
            "images_seen", "Images in answered questions, by detail: low, or high with a closer view.", "detail"
        )
        self.clip_frames = self._histogram(
            "clip_frames", "Frames that were looked at of a clip in an answered question.", (1, 2, 4, 8, 16, 32)
        )
        self.relevance_evenness = self._histogram(
            "relevance_entropy_ratio",
            "Entropy of an image's relevance map divided by that of a uniform map, 0 to 1.",
            EVENNESS,
        )
        self.tension = self._histogram(
            "tension_ratio",
            "The relevance allocator's tensions, 0 to 1: particularize, explore, diversify.",
            SHARES,
            "tension",
        )
        # Tiers: `memory` is this process's memory. `redis` is asked only if memory does not have the features.
        self.feature_cache_encodes = self._counter(
            "feature_cache_encodes", "Encodes that were sent to the vision encoder, one for each view of an image."
        )
        self.feature_cache_lookups = self._counter(
            "feature_cache_lookups",
            "Feature lookups, by tier and result: hit, miss, shared (waited for another request's encode); in Redis "
            "also failed, skipped (breaker open).",
            "tier",
            "result",
        )
        self.feature_cache_evictions = self._counter(
            "feature_cache_evictions",
            "Images evicted from the feature cache. For Redis: keys of any kind, the same number in every gateway.",
            "tier",
        )
        self.feature_cache_bytes = self._gauge(
            "feature_cache_bytes", "Bytes of cached features. For Redis: all memory that it uses.", "tier"
        )
        self.feature_cache_writes = self._counter(
            "feature_cache_writes",
            "Feature records for Redis, by result: kept, failed, dropped (too many waited), skipped (breaker open).",
            "result",
        )
        self.image_lookups = self._counter(
            "image_lookups",
            "Lookups of images by id, by tier and result: hit, miss; in Redis also skipped (not in use) or failed.",
            "tier",
            "result",
        )
        self.image_writes = self._counter(
            "image_writes",
            "Images for Redis, by result: kept, failed, dropped (too many waited), skipped (not in use).",
            "result",
        )
        self.visual_cache_lookups = self._counter(
            "visual_cache_lookups", "Lookups of visual tokens by image and question: hit, miss.", "result"
        )
        self.visual_cache_evictions = self._counter(
            "visual_cache_evictions", "Entries evicted from the cache of visual tokens."
        )
        self.images_held_bytes = self._gauge(
            "images_held_bytes", "Bytes of images in memory that requests look at by their ids."
        )
        self.visual_cache_bytes = self._gauge("visual_cache_bytes", "Bytes of cached visual tokens.")
        self.redis_lookup = self._seconds(
            "redis_lookup_seconds", "Seconds that a feature lookup spent on Redis, waits included."
        )
        self.redis_errors = self._counter(
            "redis_errors",
            "Redis errors, by kind: timeout, unreachable, denied, full, refused, fault (of the client).",
            "kind",
        )
        self.redis_bad_records = self._counter(
            "redis_bad_records", "Invalid records in Redis that were deleted, by what was wrong.", "reason"
        )
        self.redis_breaker_open = self._gauge(
            "redis_breaker_open", "1 while the breaker keeps requests from Redis or Redis was not reached, else 0."
        )
        self.event_loop_lag = self._seconds(
            "event_loop_lag_seconds",
            "Seconds by which the gateway's event loop was late, measured ten times a second. Above 0.1, one request "
            "holds up all others.",
        )
        self.keys = self._gauge("keys", "API keys in use, expired ones included.")
        self.keys_readable = self._gauge(
            "keys_readable", "1 while the API keys can be read or none are configured; at 0 the last ones stay in use."
        )
        self.keys_readable.set(1)
        self.keys_refused = self._counter(
            "keys_refused",
            "Requests with a missing or wrong API key, by code: missing_api_key, invalid_api_key, expired_api_key.",
            "code",
        )
        self.quota_refusals = self._counter(
            "quota_refusals",
            "Requests over their tenant's or key's quota, by unit: requests, images, visual_tokens, generated_tokens, "
            "concurrent_requests.",
            "unit",
        )
        self.quota_is_local = self._gauge(
            "quota_is_local",
            "1 while Redis is not in use and this gateway allows only its share of each quota, else 0.",
        )
        self.quota_gateways = self._gauge("quota_gateways", "Gateways that share the quotas, as this one knows.")
        self.quota_settlements_lost = self._counter(
            "quota_settlements_lost", "Settlements of quotas that were lost because too many waited."
        )
        self.ready = self._gauge(
            "ready", "1 while every model answers its probe and real requests, or with variants one variant's, else 0."
        )
        self.model_ready = self._gauge(
            "model_ready", "1 while the model answers its probe and requests, else 0.", "model"
        )
        self.fallbacks = self._counter(
            "fallbacks",
            "Questions that another variant got, by the variant that should have answered and the reason: out (none of "
            "its Tritons answers), failed, late (blown first-token budget).",
            "variant",
            "reason",
        )
        self.variant_weight = self._gauge(
            "variant_weight", "Weight of the variant in the split; 0 while it drains.", "variant"
        )
        self.variant_in_flight = self._gauge(
            "variant_requests_in_flight", "Questions that the variant answers now.", "variant"
        )
        self.variants_readable = self._gauge(
            "variants_readable", "1 while variants can be read or none are configured; at 0 the last ones stay in use."
        )
        self.variants_readable.set(1)
        self.upstream_ready = self._gauge(
            "upstream_ready", "1 while this Triton of the variant gets requests, else 0.", "variant", "upstream"
        )
        self.upstream_calls = self._counter(
            "upstream_calls",
            "Calls to a variant's Triton, by outcome: ok, failed, late (blown first-token budget), overloaded, left.",
            "variant",
            "upstream",
            "outcome",
        )
        self.upstream_retries = self._counter(
            "upstream_retries",
            "Calls that failed at one Triton: made again at another of the variant, or refused by the retry budget.",
            "variant",
            "result",
        )
        self.begin_variant(DEFAULT)
        self._begin_at_zero()

    def begin_variant(self, variant: str) -> None:
        """Make the series of a variant, at zero."""
        if variant != DEFAULT:
            for reason in ("out", "failed", "late"):
                self.fallbacks.labels(variant, reason)
            for result in ("made", "refused"):
                self.upstream_retries.labels(variant, result)
        for outcome in ("ok", SHORT_DEADLINE, *error_codes()):
            self.requests.labels(outcome, variant)
        for metric in (
            self.e2e_request_latency,
            self.time_to_first_token,
            self.prompt_tokens,
            self.generated_tokens,
        ):
            metric.labels(variant)

    def end_variant(self, variant: str) -> None:
        """Remove the series of a variant that is gone. Those of its Tritons ended with them."""
        for metric in (
            self.requests,
            self.fallbacks,
            self.upstream_retries,
            self.e2e_request_latency,
            self.time_to_first_token,
            self.prompt_tokens,
            self.generated_tokens,
        ):
            metric.remove_by_labels({"variant": variant})

    def hold(self, metric: Counter | Gauge, variant: str, upstream: str) -> None:
        """Keep the series of a Triton until each that held them has released them."""
        self._holders[metric, variant, upstream] += 1

    def release(self, metric: Counter | Gauge, variant: str, upstream: str) -> None:
        """Remove the series of a Triton, unless another holds them: a variant that changed begins before it ends."""
        self._holders[metric, variant, upstream] -= 1
        if not self._holders[metric, variant, upstream]:
            del self._holders[metric, variant, upstream]
            metric.remove_by_labels({"variant": variant, "upstream": upstream})

    def _begin_at_zero(self) -> None:
        """Make the series that alerts count: a rate does not see the first event of a series that begins with it."""
        for reason in ("saturated", "tenant_share", "deadline", "shutting_down", SHORT_DEADLINE, BATCH_WAIT):
            self.refusals.labels(reason)
        for reason in ("cancelled", "deadline", "deadline_exceeded", SHORT_DEADLINE):
            self.tokens_saved.labels(reason)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"glimpse_{name}", documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(f"glimpse_{name}", documentation, labels, registry=self.registry)

    def _seconds(self, name: str, documentation: str, *labels: str) -> Histogram:
        return self._histogram(name, documentation, SECONDS, *labels)

    def _tokens(self, name: str, documentation: str) -> Histogram:
        return self._histogram(name, documentation, TOKENS)

    def _histogram(self, name: str, documentation: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"glimpse_{name}", documentation, labels, buckets=buckets, registry=self.registry)
