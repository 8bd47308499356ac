"""The parts of the gateway that gRPC uses, and the limits on its connections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from service.core.access import Authenticator
from service.edges.asking import QuestionLimits
from service.edges.batching import BatchLimits
from service.edges.http.body import BodyLimits
from service.edges.loop_turns import LoopTurns
from service.edges.proxies import NO_PROXIES, Proxies
from service.pipeline import Pipeline

MAX_STREAMS = 256  # concurrent calls of one connection: more than may be in flight, so that a caller is told of a limit
MAX_CALLS = 1024  # concurrent calls in all, those that still send included
PING_INTERVAL_S = 60  # to a client whose calls are open, to find out that it is gone
PING_TIMEOUT_S = 20
LEAST_CLIENT_PING_INTERVAL_S = 10  # a client that pings more often is told to go away (ENHANCE_YOUR_CALM)
MAX_PING_STRIKES = 2
HANDSHAKE_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class GrpcEdge:
    """Hold the parts of the gateway that gRPC uses. Made once by the composition root."""

    pipeline: Pipeline
    questions: QuestionLimits
    batches: BatchLimits
    bodies: BodyLimits  # of a message, and of an image in chunks
    max_connections: int
    faults: Callable[[], Mapping[str, str]]  # by model, why it does not answer; empty if the service is ready
    count: Callable[[str, str], None]  # one call: its method and the name of its status
    lag_s: Callable[[], float]  # how late the event loop is, or the next request of `turns` if that is more
    turns: LoopTurns  # in which questions are read
    access: Authenticator
    log_client_address: bool = False  # to the log's lines of each call
    proxies: Proxies = NO_PROXIES  # in front of the service

    def options(self) -> list[tuple[str, int]]:
        """Return the server's channel arguments. Connections have no maximum age."""
        return [
            ("grpc.so_reuseport", 0),  # a second server on the port must fail
            ("grpc.max_receive_message_length", self.bodies.max_body_bytes),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.max_allowed_incoming_connections", self.max_connections),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_S * 1000),
            ("grpc.keepalive_time_ms", PING_INTERVAL_S * 1000),
            ("grpc.keepalive_timeout_ms", PING_TIMEOUT_S * 1000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", LEAST_CLIENT_PING_INTERVAL_S * 1000),
            ("grpc.http2.max_ping_strikes", MAX_PING_STRIKES),
        ]
