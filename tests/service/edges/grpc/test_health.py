"""Health is true to readiness, and reflection lists what there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.edges.grpc.server import SERVICE
from service.edges.grpc.stubs import vqa_pb2 as pb
from tests.support.calls import Service, failure, question, served
from tests.support.fakes import House, until

SERVING, NOT_SERVING, SERVICE_UNKNOWN = (
    health_pb2.HealthCheckResponse.ServingStatus.Value(name) for name in ("SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
)

WATCHES, ANSWERS = 50, 4
STOP_S = 4.0  # less than the grace of calls in work, and far more than a stop takes


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    async with served(House()) as service:
        yield service


def set_all(house: House, fault: str) -> None:
    for model in house.pipeline.card.called:
        house.readiness.set(model, fault)


@pytest.mark.parametrize("name", ["", SERVICE])
async def test_a_check_says_what_readiness_says_at_that_moment(service, name):
    health = health_pb2_grpc.HealthStub(service.channel)

    async def status() -> int:
        return (await health.Check(health_pb2.HealthCheckRequest(service=name))).status

    assert await status() == NOT_SERVING
    set_all(service.house, "")
    assert await status() == SERVING
    service.house.readiness.set("llm", "died")
    assert await status() == NOT_SERVING
    service.house.readiness.set("llm", "")
    service.house.readiness.stop()
    assert await status() == NOT_SERVING
    assert service.counted() == {("Check", "OK"): 4}


async def test_a_watch_is_told_each_change_and_the_end(service):
    watch = health_pb2_grpc.HealthStub(service.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == NOT_SERVING
    set_all(service.house, "")
    assert (await watch.read()).status == SERVING
    service.house.readiness.set("llm", "died")
    assert (await watch.read()).status == NOT_SERVING
    set_all(service.house, "")
    assert (await watch.read()).status == SERVING
    service.stopped.set()
    assert (await watch.read()).status == NOT_SERVING
    await service.run  # it does not wait for the watch


async def test_every_watch_and_answer_ends_as_it_should_when_the_server_stops(service):
    """The last message of none is cut, of however many."""
    set_all(service.house, "")
    health = health_pb2_grpc.HealthStub(service.channel)
    watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(WATCHES)]
    assert {(await watch.read()).status for watch in watches} == {SERVING}
    language = service.house.language
    language.gate.clear()
    answers = [asyncio.ensure_future(service.stub.Answer(question())) for _ in range(ANSWERS)]
    await until(lambda: language.open == ANSWERS)
    service.stopped.set()
    language.gate.set()
    assert [(await watch.read()).status for watch in watches] == [NOT_SERVING] * WATCHES
    assert {await watch.read() for watch in watches} == {grpc.aio.EOF}
    assert {await watch.code() for watch in watches} == {grpc.StatusCode.OK}
    assert [(await answer).answer for answer in answers] == ["red"] * ANSWERS
    await service.run


async def test_a_stream_that_its_client_keeps_open_holds_a_stop_only_for_a_moment(service):
    opened = reflection_pb2_grpc.ServerReflectionStub(service.channel).ServerReflectionInfo()
    await opened.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert (await opened.read()).list_services_response.service
    service.stopped.set()
    async with asyncio.timeout(STOP_S):
        await service.run


async def test_a_service_that_is_not_there_has_no_health(service):
    health = health_pb2_grpc.HealthStub(service.channel)
    asked = health_pb2.HealthCheckRequest(service="glimpse.v0.Guessing")
    assert (await failure(health.Check(asked))).code == "NOT_FOUND"
    watch = health.Watch(asked)
    assert (await watch.read()).status == SERVICE_UNKNOWN
    watch.cancel()


async def test_reflection_lists_the_services_and_describes_ours(service):
    def asks() -> list[reflection_pb2.ServerReflectionRequest]:
        asked = reflection_pb2.ServerReflectionRequest
        return [asked(list_services=""), asked(file_containing_symbol=SERVICE)]

    answers = reflection_pb2_grpc.ServerReflectionStub(service.channel).ServerReflectionInfo(iter(asks()))
    listed, described = [answer async for answer in answers]
    assert {each.name for each in listed.list_services_response.service} == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert pb.DESCRIPTOR.serialized_pb in described.file_descriptor_response.file_descriptor_proto
