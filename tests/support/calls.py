"""gRPC clients of a service: of one without Triton in this process, and of a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from service.edges.grpc.server import GrpcServer
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.grpc.stubs.vqa_pb2_grpc import VisualQuestionAnsweringStub
from tests.support.fakes import House, png

ChannelOptions = tuple[tuple[str, int], ...]
UNLIMITED: ChannelOptions = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.RequestInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
)


def question(*parts: bytes | str, **fields: Any) -> pb.AnswerRequest:
    """A question of these parts: see `part_of`."""
    return pb.AnswerRequest(parts=[part_of(part) for part in parts or (png(), "what colour?")], **fields)


def part_of(part: bytes | str) -> pb.Part:
    """Bytes are a file, a text that begins with img_ is an id, one that begins with https:// is an address."""
    if isinstance(part, bytes):
        return pb.Part(image=part)
    if part.startswith("https://"):
        return pb.Part(image_url=part)
    return pb.Part(image_id=part) if part.startswith("img_") else pb.Part(text=part)


async def chunks(data: bytes, size: int = 64 * 1024) -> AsyncIterator[pb.PutImageRequest]:
    for start in range(0, len(data), size):
        yield pb.PutImageRequest(data=data[start : start + size])


async def streamed(call: grpc.aio.UnaryStreamCall) -> tuple[str, pb.AnswerResponse]:
    """The deltas put together, and the last event."""
    every = []
    while (event := await call.read()) is not grpc.aio.EOF:
        every.append(event)
    return "".join(event.delta for event in every[:-1]), every[-1].end


class Failed:
    """A failed call as its caller sees it."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code().name
        self.message = error.details()
        self.trailing = dict(error.trailing_metadata())
        self.status: status_pb2.Status | None = rpc_status.from_call(error)
        self.details = {kind: detail for kind in DETAILS for detail in self._of(kind)}

    def _of(self, kind: type[Message]) -> Iterable[Message]:
        for packed in self.status.details if self.status else ():
            detail = kind()
            if packed.Unpack(detail):
                yield detail

    @property
    def reason(self) -> str:
        return self.details[error_details_pb2.ErrorInfo].reason

    @property
    def field(self) -> str | None:
        bad = self.details.get(error_details_pb2.BadRequest)
        return bad.field_violations[0].field if bad else None

    @property
    def retry_after_s(self) -> float | None:
        retry = self.details.get(error_details_pb2.RetryInfo)
        return retry.retry_delay.ToMilliseconds() / 1e3 if retry else None


async def failure(call: Awaitable[object]) -> Failed:
    """How the call failed; it must."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return Failed(caught.value)


class Service:
    """A service without Triton that answers gRPC, and a client of it."""

    def __init__(
        self, house: House, port: int, channel: grpc.aio.Channel, stopped: asyncio.Event, run: asyncio.Task[None]
    ) -> None:
        self.house = house
        self.port = port
        self.channel = channel
        self.stub = VisualQuestionAnsweringStub(channel)
        self.stopped = stopped
        self.run = run

    def counted(self) -> dict[tuple[str, str], float]:
        """Calls by method and status."""
        return {
            (sample.labels["method"], sample.labels["status"]): sample.value
            for metric in self.house.metrics.grpc_requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }


@asynccontextmanager
async def served(house: House, *, grace_s: float = 5.0, options: ChannelOptions = ()) -> AsyncIterator[Service]:
    server, stopped = GrpcServer(house.rpc), asyncio.Event()
    port = server.listen("127.0.0.1", 0)
    run = asyncio.create_task(server.run(stopped, grace_s))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=UNLIMITED + options) as channel:
        yield Service(house, port, channel, stopped, run)
    stopped.set()
    await run
    house.reader.close()
