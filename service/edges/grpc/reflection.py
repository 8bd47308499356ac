"""Serve grpc.reflection.v1alpha: tell clients the services, methods and messages."""

from __future__ import annotations

import grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection, reflection_pb2  # type: ignore[import-untyped]

from service.edges.grpc.edge import GrpcEdge
from service.edges.grpc.keyless import KeylessCalls

MOST_STREAMS = 32
LONGEST_STREAM_S = 60.0


class Reflection:
    """Answer for the named services and for itself."""

    def __init__(self, edge: GrpcEdge, services: tuple[str, ...]) -> None:
        self._answers = reflection.aio.ReflectionServicer((*services, reflection.SERVICE_NAME))
        self._streams = KeylessCalls("ServerReflectionInfo", MOST_STREAMS, LONGEST_STREAM_S, edge.count)

    def handler(self) -> grpc.GenericRpcHandler:
        info = grpc.stream_stream_rpc_method_handler(
            self.info,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        return grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, {"ServerReflectionInfo": info})

    async def info(self, requests: object, context: grpc.aio.ServicerContext) -> None:
        async with self._streams.one(context):
            async for answer in self._answers.ServerReflectionInfo(requests, context):
                await context.write(answer)
