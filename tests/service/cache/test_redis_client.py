import asyncio
import inspect

import pytest
import redis.exceptions as foreign
from structlog.testing import capture_logs

from service.cache.redis_client import Lane, RedisFault, connect, counters, fault_of
from tests.support.fakes import cancelled

EVERY = [
    error
    for _, error in inspect.getmembers(foreign, inspect.isclass)
    if issubclass(error, foreign.RedisError) and error.__module__ == foreign.__name__
]


@pytest.mark.parametrize("error", EVERY)
def test_every_error_of_the_client_has_a_kind(error):
    with capture_logs() as logs:
        assert fault_of(error.__new__(error, "x")).kind != "fault"
    assert not logs


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (foreign.AuthenticationError("x"), "denied"),
        (foreign.NoPermissionError("x"), "denied"),
        (foreign.ResponseError("The user executing the script can't run this command or subcommand"), "denied"),
        (foreign.ResponseError("ACL failure in script: User x has no permissions"), "denied"),
        (foreign.OutOfMemoryError("x"), "full"),
        (foreign.ReadOnlyError("x"), "refused"),
        (foreign.BusyLoadingError("x"), "unreachable"),
        (foreign.TimeoutError("x"), "timeout"),
        (TimeoutError(), "timeout"),
        (ConnectionResetError("x"), "unreachable"),
    ],
)
def test_kinds(error, kind):
    assert fault_of(error).kind == kind
    assert fault_of(error).message


CLOSED = RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")  # uvloop's


def test_a_closed_connection_is_no_fault_of_the_client():
    with capture_logs() as logs:
        assert fault_of(CLOSED).kind == "unreachable"
        assert fault_of(RuntimeError("of another kind")).kind == "fault"
    assert len(logs) == 1


@pytest.mark.parametrize("times", [1, 2])
async def test_a_command_that_meets_a_closed_connection_is_sent_again_once(times, monkeypatch):
    lane = Lane("redis://127.0.0.1:1", 1.0)
    sent = []

    async def send(commands):
        sent.append(commands)
        if len(sent) <= times:
            raise CLOSED
        return [b"value"]

    monkeypatch.setattr(lane, "_sent", send)
    if times == 1:
        assert await lane._pipeline([("GET", "key")]) == [b"value"]
    else:
        with pytest.raises(RedisFault) as caught:
            await lane._pipeline([("GET", "key")])
        assert caught.value.kind == "unreachable"
    assert len(sent) == 2


def test_what_nobody_foresaw_is_a_fault_and_is_logged_with_its_traceback():
    with capture_logs() as logs:
        assert fault_of(AttributeError("'NoneType' object has no attribute 'read'")).kind == "fault"
    assert [line["event"] for line in logs] == ["redis_client_fault"]


async def test_a_host_that_no_resolver_takes_is_not_reached():
    lane = Lane("redis://a..b:6379", 1.0)
    running = asyncio.create_task(lane.run())
    with capture_logs() as logs, pytest.raises(RedisFault) as caught:
        await lane.ask(("GET", "x"))
    assert (caught.value.kind, logs) == ("unreachable", [])
    await cancelled(running)


@pytest.mark.parametrize("url", ["http://x", "redis://x:port", "x", "redis+cluster://x:port", "redis+cluster://x/1"])
def test_what_is_no_address_of_a_redis_is_refused(url):
    with pytest.raises(ValueError):
        Lane(url, 1.0)


@pytest.mark.parametrize(
    "url",
    [
        *("redis://h", "redis://h:", "redis://h/3", "redis://u:p%40@h", "rediss://h?ssl_cert_reqs=none", "unix:///r"),
        *("redis+cluster://h", "redis+cluster://[::1]", "rediss+cluster://u:p@h:7000/0"),
    ],
)
async def test_what_the_client_connects_to_the_counters_do_too(url):
    connect(url)
    counters(url)
