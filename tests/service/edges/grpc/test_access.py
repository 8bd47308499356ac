"""A service with keys: who may call what over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.core.access import Scope
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.grpc.stubs.vqa_pb2_grpc import VisualQuestionAnsweringStub
from tests.support.calls import Failed, Service, chunks, failure, question, served, streamed
from tests.support.fakes import House, png
from tests.support.keys import Keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest_asyncio.fixture
async def service(keys: Keys) -> AsyncIterator[Service]:
    async with served(House(keys=str(keys.path))) as service:
        yield service


async def made(service: Service, keys: Keys, *scopes: Scope) -> tuple[tuple[str, str], ...]:
    key = keys.make("acme", frozenset(scopes))
    await service.house.gate.look()
    return (("authorization", f"Bearer {key}"),)


async def test_each_scope_allows_its_calls_and_no_others(service, keys):
    ask, upload = await made(service, keys, Scope.ASK), await made(service, keys, Scope.UPLOAD)
    assert (await service.stub.Answer(question(), metadata=ask)).answer == "red"
    assert (await streamed(service.stub.StreamAnswer(question(), metadata=ask)))[0] == "red"
    assert (await service.stub.PutImage(chunks(png()), metadata=upload)).id.startswith("img_")
    for call in (
        service.stub.Answer(question(), metadata=upload),
        service.stub.PutImage(chunks(png()), metadata=ask),
    ):
        failed = await failure(call)
        assert (failed.code, failed.reason) == ("PERMISSION_DENIED", "insufficient_scope")


@pytest.mark.parametrize(
    ("metadata", "status", "code"),
    [
        ((), "UNAUTHENTICATED", "missing_api_key"),
        ((("x-api-key", "none"),), "UNAUTHENTICATED", "invalid_api_key"),
        ((("authorization", "Basic x"),), "UNAUTHENTICATED", "invalid_authorization"),
    ],
)
async def test_a_call_without_a_right_key_is_refused_and_not_read(service, metadata, status, code):
    read: list[int] = []

    def body() -> Iterator[pb.PutImageRequest]:
        for number in range(1000):
            read.append(number)
            yield pb.PutImageRequest(data=b"x" * 64 * 1024)

    def put() -> Failed:
        """By the synchronous client: grpc.aio's may call a write that met the refusal INTERNAL, and lose the status."""
        with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel, pytest.raises(grpc.RpcError) as caught:
            VisualQuestionAnsweringStub(channel).PutImage(body(), metadata=metadata)
        return Failed(caught.value)

    failed = await asyncio.to_thread(put)
    assert (failed.code, failed.reason) == (status, code)
    assert len(read) < 1000


async def test_another_tenants_name_is_refused(service, keys):
    metadata = await made(service, keys, Scope.ASK)
    assert (await service.stub.Answer(question(), metadata=(*metadata, ("x-tenant-id", "acme")))).answer == "red"
    failed = await failure(service.stub.Answer(question(), metadata=(*metadata, ("x-tenant-id", "other"))))
    assert (failed.code, failed.reason) == ("PERMISSION_DENIED", "wrong_tenant")


async def test_health_needs_no_key(service):
    stub = health_pb2_grpc.HealthStub(service.channel)
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status != 0
