"""What uptime monitors, browsers and proxies ask: HEAD, and by which name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from service.edges.http.hosts import allowed_hosts
from service.settings import listed
from tests.service.edges.http.test_protocol import Served, served
from tests.service.edges.http.test_vqa import ASKED, Caller, fault
from tests.support.fakes import FakeProber, House


@pytest_asyncio.fixture
async def caller() -> AsyncIterator[Caller]:
    caller = Caller(House())
    yield caller
    await caller.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as each:
        yield each


PATHS = ["/", "/health/live", "/health/ready", "/v1/models", "/metrics", "/openapi.json", "/nowhere", "/v1/vqa"]


@pytest.mark.parametrize("path", PATHS)
async def test_head_is_get_without_its_body(caller, path):
    get, head = await caller.http.get(path), await caller.http.head(path)
    assert head.status_code == get.status_code
    assert head.content == b""
    for name in ("content-type", "allow"):
        assert head.headers.get(name) == get.headers.get(name)
    if path != "/metrics":  # it counts the requests between
        assert head.headers["content-length"] == get.headers["content-length"]


async def test_head_tells_that_the_service_is_not_ready(caller):
    assert (await caller.http.head("/health/ready")).status_code == 503
    await caller.house.readiness.probe(FakeProber(), caller.house.pipeline.card, 1.0)
    assert (await caller.http.head("/health/ready")).status_code == 200


async def test_head_is_counted_as_head(caller):
    await caller.http.head("/health/live")
    count = caller.house.counted("glimpse_http_requests_total", method="HEAD", route="/health/live", status="200")
    assert count == 1


@pytest.mark.parametrize("path", PATHS)
def test_head_leaves_the_connection_in_order(service, path):
    """Bytes of a body behind the head would be taken for the next response."""
    head = f"HEAD {path} HTTP/1.1\r\nhost: localhost\r\n"
    received = service.exchange(f"{head}\r\n{head}connection: close\r\n\r\n".encode())
    assert received.count(b"HTTP/1.1 ") == 2
    assert received.endswith(b"\r\n\r\n")


# Names.
OURS = ["localhost", "localhost:8080", "LOCALHOST", "localhost.", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8080", ""]
NOT_OURS = ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "localhost@evil"]
NOT_OURS += ["169.254.169.254", "[::2]", "[::1].evil", "[::1", "<script>", "localhost evil.example", ":8080"]


@pytest.mark.parametrize("host", OURS)
async def test_names_of_this_machine_are_ours(caller, host):
    assert (await caller.http.get("/health/live", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", NOT_OURS)
@pytest.mark.parametrize("path", ["/", "/metrics", "/nowhere"])
async def test_other_names_are_refused(caller, host, path):
    error = fault(await caller.http.get(path, headers={"host": host}), 421)
    assert error["code"] == "unknown_host"
    assert "GLIMPSE_ALLOWED_HOSTS" in error["message"]


async def test_no_work_is_done_for_another_name(caller):
    assert (await caller.http.post("/v1/vqa", json=ASKED, headers={"host": "evil.example"})).status_code == 421
    assert caller.house.vision.calls == []


def test_a_second_host_does_not_hide_the_first(service):
    received = service.exchange(b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\nconnection: close\r\n\r\n")
    assert received.startswith((b"HTTP/1.1 421 ", b"HTTP/1.1 400 "))


@pytest.mark.parametrize(
    ("http_host", "named", "host", "allowed"),
    [
        ("127.0.0.1", "", "glimpse", False),
        ("127.0.0.1", "glimpse", "glimpse", True),
        ("127.0.0.1", "a.example, Glimpse.Example", "glimpse.example", True),
        ("127.0.0.2", "", "127.0.0.2", True),
        ("::1", "", "[::1]", True),
        ("::1", "", "glimpse", False),
        ("localhost", "", "glimpse", False),
        ("0.0.0.0", "", "glimpse", True),
        ("::", "", "glimpse", True),
        ("192.0.2.1", "", "glimpse", True),
        ("0.0.0.0", "glimpse", "glimpse", True),
        ("0.0.0.0", "glimpse", "other", False),
        ("0.0.0.0", "glimpse", "127.0.0.1", True),
        ("192.0.2.1", "glimpse", "192.0.2.1", True),
    ],
)
def test_which_names_are_ours(http_host, named, host, allowed):
    hosts = allowed_hosts(http_host, listed(named))
    assert (hosts is None or host in hosts) is allowed


@pytest.mark.parametrize("host", ['"><script>alert(1)</script>', "<b>", "a&b"])
async def test_the_front_page_holds_no_host_as_it_came(host):
    caller = Caller(House(http_host="0.0.0.0"))
    page = await caller.http.get("/", headers={"host": host})
    assert page.status_code == 200
    assert host not in page.text
    await caller.close()
