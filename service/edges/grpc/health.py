"""Serve grpc.health.v1: the service is healthy exactly while `/health/ready` answers 200."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]
from grpc_health.v1.health import SERVICE_NAME  # type: ignore[import-untyped]

from service.edges.grpc.edge import GrpcEdge
from service.edges.grpc.keyless import KeylessCall, KeylessCalls

LOOK_INTERVAL_S = 0.2  # at the readiness, while somebody watches
MOST_WATCHES, MOST_CHECKS = 128, 128  # open ones, far fewer than calls in all
LONGEST_WATCH_S = 600.0  # clients watch again
LONGEST_CHECK_S = 5.0  # its message comes with the call

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """Answer for the server as a whole (the empty name) and for the named services."""

    def __init__(
        self,
        edge: GrpcEdge,
        services: tuple[str, ...],
        *,
        longest_watch_s: float = LONGEST_WATCH_S,
        longest_check_s: float = LONGEST_CHECK_S,
    ) -> None:
        self._edge = edge
        self._services = ("", *services)
        self._checks = KeylessCalls("Check", MOST_CHECKS, longest_check_s, edge.count)
        self._watches = KeylessCalls("Watch", MOST_WATCHES, longest_watch_s, edge.count)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """End the watches after they were told a last time."""
        self._stopped.set()

    def handler(self) -> grpc.GenericRpcHandler:
        """Return the handler of the service. To a client, its calls are as if the server took them for one message."""
        told = (health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString)
        handlers = {
            "Check": grpc.stream_unary_rpc_method_handler(self.check, *told),
            "Watch": grpc.stream_stream_rpc_method_handler(self.watch, *told),
        }
        return grpc.method_handlers_generic_handler(SERVICE_NAME, handlers)

    async def check(self, _: object, context: grpc.aio.ServicerContext) -> health_pb2.HealthCheckResponse:
        async with self._checks.one(context) as call:
            status = self._status(await asked(call))
            if status == SERVICE_UNKNOWN:
                told = "there is no such service: reflection lists the services"
                await call.abort(grpc.StatusCode.NOT_FOUND, told)
            return health_pb2.HealthCheckResponse(status=status)

    async def watch(self, _: object, context: grpc.aio.ServicerContext) -> None:
        """Tell the status, and again each time it changes."""
        async with self._watches.one(context) as call:
            service, told = await asked(call), None
            while not self._stopped.is_set():
                if (status := self._status(service)) != told:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                    told = status
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_INTERVAL_S):
                        await self._stopped.wait()
            if told == SERVING:
                await context.write(health_pb2.HealthCheckResponse(status=NOT_SERVING))

    def _status(self, service: str) -> int:
        if service not in self._services:
            return int(SERVICE_UNKNOWN)
        return int(NOT_SERVING if self._edge.faults() else SERVING)


async def asked(call: KeylessCall) -> str:
    """Read the call's message -> the service that it names."""
    message = await call.context.read()
    if message is grpc.aio.EOF:
        await call.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message: send one")
    return str(message.service)
