"""Health is true to readiness, and reflection lists what there is."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.edges.grpc.edge import MAX_CALLS, MAX_STREAMS
from service.edges.grpc.health import MOST_CHECKS, MOST_WATCHES, Health
from service.edges.grpc.reflection import MOST_STREAMS
from service.edges.grpc.server import SERVICE
from service.edges.grpc.stubs import vqa_pb2 as pb
from tests.support.calls import Service, failure, question, served
from tests.support.fakes import House, until
from tests.support.servers import eventually_async

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


def connections(service: Service) -> list[grpc.aio.Channel]:
    """As many as hold every call that the server takes."""
    own = (("grpc.use_local_subchannel_pool", 1),)  # else channels share a connection
    return [
        grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=own) for _ in range(MAX_CALLS // MAX_STREAMS)
    ]


async def test_calls_that_need_no_key_leave_room_for_answers(service):
    """Watches, streams of reflection, and checks whose message never comes, as many as the server takes calls."""
    set_all(service.house, "")
    methods = {
        "/grpc.health.v1.Health/Watch": MOST_WATCHES,
        "/grpc.health.v1.Health/Check": MOST_CHECKS,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": MOST_STREAMS,
    }
    assert 2 * sum(methods.values()) < MAX_CALLS
    for method, most in methods.items():
        channels, name = connections(service), method.rpartition("/")[2]
        # As streams, which send nothing: a client of these services sends a message at once.
        opened = [channel.stream_stream(method)() for channel in channels for _ in range(MAX_STREAMS)]
        await until(lambda opened=opened, most=most: sum(not call.done() for call in opened) == most)
        failed = await failure(service.channel.unary_stream(method)(b"").read())
        assert failed.code == "RESOURCE_EXHAUSTED"
        assert failed.message == f"{most} calls of {name} are open, and no more may be: try again later"
        assert (await service.stub.Answer(question())).answer == "red"
        for channel in channels:
            await channel.close()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def checks_that_read_nothing(number: int) -> bytes:
    """All that a client sends for so many checks, if it gives their answers a window of 0 bytes."""
    headers = {":method": "POST", ":scheme": "http", ":path": "/grpc.health.v1.Health/Check", ":authority": "glimpse"}
    headers |= {"te": "trailers", "content-type": "application/grpc"}
    head = b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers.items()
    )
    begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, struct.pack(">HI", 4, 0)) + frame(4, 1, 0)
    streams = range(1, 2 * number, 2)
    return begin + b"".join(frame(1, 4, each, head) + frame(0, 1, each, bytes(5)) for each in streams)


async def test_checks_whose_answers_are_not_read_leave_room_for_answers(service):
    """A check is over when its answer has left, which a client can prevent."""
    set_all(service.house, "")
    opened = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(MAX_CALLS // MAX_STREAMS)]
    for _, writer in opened:
        writer.write(checks_that_read_nothing(MAX_STREAMS))
    await until(lambda: sum(service.counted().values()) == MAX_CALLS)
    assert service.counted() == {("Check", "OK"): MOST_CHECKS, ("Check", "RESOURCE_EXHAUSTED"): MAX_CALLS - MOST_CHECKS}
    assert (await service.stub.Answer(question())).answer == "red"
    for _, writer in opened:
        writer.close()
    health = health_pb2_grpc.HealthStub(service.channel)

    async def answered() -> bool:
        with suppress(grpc.aio.AioRpcError):
            return (await health.Check(health_pb2.HealthCheckRequest())).status == SERVING
        return False

    await eventually_async(answered, 10, "the places came back with the connections")


async def test_each_call_counts_by_its_status(service):
    set_all(service.house, "")
    health = health_pb2_grpc.HealthStub(service.channel)
    gone = health.Watch(health_pb2.HealthCheckRequest())
    assert (await gone.read()).status == SERVING
    gone.cancel()
    await until(lambda: service.counted() == {("Watch", "CANCELLED"): 1})
    listed = reflection_pb2_grpc.ServerReflectionStub(service.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    )
    assert len([answer async for answer in listed]) == 1
    unknown = health_pb2.HealthCheckRequest(service="glimpse.v0.Guessing")
    assert (await failure(health.Check(unknown))).code == "NOT_FOUND"
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    service.stopped.set()
    assert (await watch.read()).status == NOT_SERVING
    assert await watch.read() is grpc.aio.EOF
    await service.run
    assert service.counted() == {
        ("Watch", "CANCELLED"): 1,
        ("Watch", "OK"): 1,
        ("ServerReflectionInfo", "OK"): 1,
        ("Check", "NOT_FOUND"): 1,
    }


async def test_a_watch_and_a_check_without_a_message_end_by_themselves():
    house = House()
    set_all(house, "")
    health = Health(house.rpc, (SERVICE,), longest_watch_s=0.5, longest_check_s=0.2)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((health.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(2):  # a client watches again
            watch = stub.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == SERVING
            failed = await failure(watch.read())
            assert (failed.code, failed.message) == (
                "UNAVAILABLE",
                "a call of Watch may be open for 0.5 s: make another one",
            )
        check = channel.stream_stream("/grpc.health.v1.Health/Check")()
        assert (await failure(check.read())).code == "UNAVAILABLE"
        empty = channel.stream_stream("/grpc.health.v1.Health/Check")()
        await empty.done_writing()
        assert (await failure(empty.read())).code == "INVALID_ARGUMENT"
    await server.stop(None)  # every call has been counted
    assert [
        house.counted("glimpse_grpc_requests_total", method=method, status=status)
        for method, status in (("Watch", "UNAVAILABLE"), ("Check", "UNAVAILABLE"), ("Check", "INVALID_ARGUMENT"))
    ] == [2, 1, 1]
    house.reader.close()
