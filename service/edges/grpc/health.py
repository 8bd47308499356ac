"""Serve grpc.health.v1: the service is healthy exactly while `/health/ready` answers 200."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from service.edges.grpc.edge import GrpcEdge

LOOK_INTERVAL_S = 0.2  # at the readiness, while somebody watches

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answer for the server as a whole (the empty name) and for the named services."""

    def __init__(self, edge: GrpcEdge, services: tuple[str, ...]) -> None:
        self._edge = edge
        self._services = ("", *services)
        self._stopped = asyncio.Event()

    def stop(self) -> None:
        """End the watches after they were told a last time."""
        self._stopped.set()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        status = self._status(request.service)
        self._edge.count("Check", "NOT_FOUND" if status == SERVICE_UNKNOWN else "OK")
        if status == SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service: reflection lists the services")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, _: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Tell the status, and again each time it changes."""
        told = None
        while not self._stopped.is_set():
            if (status := self._status(request.service)) != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await self._stopped.wait()
        if told == SERVING:
            yield health_pb2.HealthCheckResponse(status=NOT_SERVING)

    def _status(self, service: str) -> int:
        if service not in self._services:
            return int(SERVICE_UNKNOWN)
        return int(NOT_SERVING if self._edge.faults() else SERVING)
