"""Every metric of the gateway, declared here and nowhere else. Base units, and `_total` on counters."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.process_collector import ProcessCollector

# With what people promise as bounds: 0.2, 0.5, 1 and 2 s.
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


class Metrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Questions by how they ended: ok, or an error's code.", "outcome")
        self.http_requests = self._counter(
            "http_requests", "HTTP requests by route and status.", "method", "route", "status"
        )
        self.in_flight = self._gauge("requests_in_flight", "Questions admitted and not ended.")
        self.refusals = self._counter(
            "refusals",
            "No room, by reason: saturated, tenant_share, deadline, shutting_down. The request is turned away; if only "
            "its closer view found none, it is answered without.",
            "reason",
        )
        self.requests_waiting = self._gauge("requests_waiting", "Waiting for a vision slot or for the LLM.", "kind")
        self.requests_running = self._gauge("requests_running", "Holding vision slots or tokens of the LLM.", "kind")
        self.resource_used = self._gauge(
            "resource_used", "Held of what may run at once: images in the vision stage, tokens of the LLM.", "resource"
        )
        self.admitted_cost = self._gauge("admitted_cost", "Reserved by all requests that are in, by unit.", "unit")
        self.request_window = self._gauge(
            "request_window",
            "Worked on at once, at most: less than there is room for where deadlines are missed.",
        )
        self.fidelity_level = self._gauge("fidelity_level", "0: as closely as asked; up to 4, the least closely.")
        self.fidelity_changes = self._counter("fidelity_changes", "Changes of the level of fidelity.")
        self.reduced_answers = self._counter("reduced_answers", "Answers that looked less closely than was asked.")
        self.request_queue_time = self._seconds("request_queue_time_seconds", "Waiting of answered questions.", "kind")
        self.tokens_saved = self._counter(
            "tokens_saved",
            "At most so many were not generated: left to max_tokens of questions that were cancelled or expired.",
            "reason",
        )
        self.e2e_request_latency = self._seconds(
            "e2e_request_latency_seconds", "From arrival to the end of the answer; answered questions only."
        )
        self.time_to_first_token = self._seconds("time_to_first_token_seconds", "From arrival to the first token.")
        self.inter_token_latency = self._seconds("inter_token_latency_seconds", "Between two tokens of an answer.")
        self.stage = self._seconds(
            "stage_seconds",
            "Stages of an answered question: queue; load, of it decode_image; vision, of it lookup, see (or encode), "
            "attend; prefill and decode, or generate where the answer comes whole.",
            "stage",
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Text tokens that the LLM was given, however the question ended."
        )
        self.generated_tokens = self._counter(
            "generated_tokens", "Tokens that came from the LLM, however the question ended."
        )
        self.vision_tokens = self._tokens("vision_tokens", "Vision tokens kept of one image for one question.")
        self.visual_tokens = self._tokens("visual_tokens", "Visual tokens handed to the LLM of one image.")
        self.images_seen = self._counter(
            "images_seen", "Images that answers are about, by detail: low, or high with a closer view.", "detail"
        )
        self.relevance_evenness = self._histogram(
            "relevance_entropy_ratio", "Entropy of one image's relevance map over that of an even one.", EVENNESS
        )
        self.tension = self._histogram(
            "tension_ratio", "The allocator's tensions: particularize, explore, diversify.", SHARES, "tension"
        )
        # Tiers: memory (this process's), and redis, which only what memory does not hold is asked of.
        self.feature_cache_lookups = self._counter(
            "feature_cache_lookups",
            "Lookups: hit, miss, shared (waited for another's encode); of Redis also failed, skipped (breaker open).",
            "tier",
            "result",
        )
        self.feature_cache_evictions = self._counter(
            "feature_cache_evictions", "Images pushed out; of Redis any key, and the same to every gateway.", "tier"
        )
        self.feature_cache_bytes = self._gauge(
            "feature_cache_bytes", "Memory of the features; of Redis all that it uses.", "tier"
        )
        self.feature_cache_writes = self._counter(
            "feature_cache_writes",
            "Records for Redis: kept, failed, dropped (too many waited), skipped (breaker open).",
            "result",
        )
        self.visual_cache_lookups = self._counter(
            "visual_cache_lookups", "Lookups of what an image gave for a question: hit, miss.", "result"
        )
        self.visual_cache_evictions = self._counter("visual_cache_evictions", "What was pushed out of that cache.")
        self.visual_cache_bytes = self._gauge("visual_cache_bytes", "Memory of what images gave for questions.")
        self.redis_lookup = self._seconds("redis_lookup_seconds", "In Redis's part of a lookup, waits included.")
        self.redis_errors = self._counter(
            "redis_errors", "Faults: timeout, unreachable, denied, full, refused, fault (of the client).", "kind"
        )
        self.redis_bad_records = self._counter(
            "redis_bad_records", "Records that did not fit and were deleted, by what did not.", "reason"
        )
        self.redis_breaker_open = self._gauge("redis_breaker_open", "1 while Redis is left alone, or was not reached.")
        self.ready = self._gauge("ready", "1 while every model answers its probe.")

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
