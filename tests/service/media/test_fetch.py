"""Images come from allowed servers over verified TLS, and no try reaches a server that is not allowed.

The allowed server is 127.0.0.1, because the tests' rules list that one address. On the same port stand servers that no
fetch may reach: 127.0.0.2 and ::1. They count every connection.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_network

import pytest
import pytest_asyncio
import trustme

from service.core.errors import GlimpseError, InvalidImage, InvalidRequest, Overloaded, TooLarge
from service.media.fetch import FetchRules, ImageFetcher, SystemResolver
from service.telemetry.metrics import Metrics
from tests.support.fakes import until
from tests.support.image_hosts import ImageHost, Names, image_host, redirect, response
from tests.support.pictures import encoded, picture
from tests.support.samples import sample

IMAGE = encoded(picture(40, 30))
ALLOWED, INNER = "127.0.0.1", "127.0.0.2"
NAMES = {
    "images.test": [[ALLOWED]],
    "cdn.images.test": [[ALLOWED]],
    "other.test": [[ALLOWED]],  # its certificate is for other names
    "inner.test": [[INNER]],
    "both.test": [[ALLOWED, INNER]],
    "six.test": [["::1"]],
    "mapped.test": [[f"::ffff:{INNER}"]],
    "mapped-allowed.test": [[f"::ffff:{ALLOWED}"]],
    "compatible.test": [[f"::{INNER}"]],
    "nat64.test": [["64:ff9b::7f00:2"]],
    "6to4.test": [["2002:7f00:2::1"]],
    "teredo.test": [["2001:0:7f00:2::1"]],
    "scoped.test": [["fe80::1%lo"]],
    "zero.test": [["0.0.0.0"]],
    "zero6.test": [["::"]],
    "private.test": [["10.0.0.1"]],
    "shared.test": [["100.64.0.1"]],
    "linklocal.test": [["169.254.169.254"]],
    "metadata6.test": [["fd00:ec2::254"]],
    "multicast.test": [["224.0.0.1"]],
    "broadcast.test": [["255.255.255.255"]],
    "nowhere.test": [[]],
    "odd.test": [["127.2"]],
    "rebinding.test": [[ALLOWED], [INNER]],
    "localhost": [[INNER]],
    "metadata": [["169.254.169.254"]],
}


@dataclass
class World:
    """The servers, and a fetcher that may use one of them."""

    allowed: ImageHost
    plain: ImageHost  # at the allowed address, without TLS
    forbidden: Sequence[ImageHost]
    rules: FetchRules
    tls: ssl.SSLContext

    def fetcher(self, names: Names | None = None, **changes: object) -> ImageFetcher:
        return ImageFetcher(replace(self.rules, **changes), Metrics(), resolve=names or Names(NAMES), tls=self.tls)

    def url(self, host: str = "images.test", path: str = "/a.png") -> str:
        return f"https://{host}:{self.allowed.port}{path}"

    def nothing_forbidden_was_reached(self) -> bool:
        return not any(host.connections for host in self.forbidden)


@pytest_asyncio.fixture(scope="module")
async def servers() -> AsyncIterator[World]:
    authority = trustme.CA()
    tls = ssl.create_default_context()
    authority.configure_trust(tls)
    names = ["images.test", "*.images.test", "rebinding.test", "both.test", "inner.test", "127.0.0.2", "localhost"]
    async with AsyncExitStack() as running:
        allowed = await running.enter_async_context(image_host(ALLOWED, 0, authority, names))
        plain = await running.enter_async_context(image_host(ALLOWED))
        forbidden = [
            await running.enter_async_context(image_host(address, allowed.port, authority, names))
            for address in (INNER, "::1")
        ]
        rules = FetchRules(
            hosts=("*",),
            ports=frozenset({allowed.port}),
            private_networks=(ip_network(ALLOWED),),
            max_bytes=100_000,
            timeout_s=5.0,
        )
        yield World(allowed, plain, forbidden, rules, tls)


@pytest.fixture
def world(servers: World) -> World:
    for host in (servers.allowed, servers.plain, *servers.forbidden):
        host.forget()
        host.answers["/a.png"] = response(IMAGE, "content-type: image/png")
    return servers


def free(nbytes: int) -> None:
    """There is room for all bytes."""


async def failure(fetcher: ImageFetcher, url: str) -> GlimpseError:
    with pytest.raises(GlimpseError) as caught:
        await fetcher.fetch(url, "", free)
    assert caught.value.param in ("image", None)
    for inner in (INNER, ALLOWED, "10.0.0.1", "169.254", "::1"):
        assert inner not in caught.value.message.replace(url, "")
    return caught.value


async def test_an_image_arrives_with_nothing_but_what_is_needed_sent(world):
    fetcher = world.fetcher()
    reserved: list[int] = []
    data = await fetcher.fetch(world.url(path="/a.png?size=2&x=%20#top"), "", reserved.append)
    assert data == IMAGE
    assert sum(reserved) == len(IMAGE)
    assert world.allowed.names == ["images.test"]
    line, *headers = world.allowed.requests[0].decode().strip().split("\r\n")
    assert line == "GET /a.png?size=2&x=%20 HTTP/1.1"
    assert {header.partition(":")[0].lower() for header in headers} == {
        "host",
        "user-agent",
        "accept",
        "accept-encoding",
        "connection",
    }
    assert world.nothing_forbidden_was_reached()


@pytest.mark.parametrize(
    "host", ["images.test", "IMAGES.test", "cdn.images.test", "images.test."], ids=["name", "case", "below", "dot"]
)
async def test_a_host_on_the_list_is_fetched_from(world, host):
    fetcher = world.fetcher(hosts=("images.test", "*.images.test"))
    assert await fetcher.fetch(world.url(host), "", free) == IMAGE


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_redirects_between_allowed_hosts_are_followed(world, status):
    world.allowed.answers["/there"] = redirect(world.url("cdn.images.test", "/next"), status)
    world.allowed.answers["/next"] = redirect("/a.png", status)
    assert await world.fetcher().fetch(world.url(path="/there"), "", free) == IMAGE
    assert world.allowed.names == ["images.test", "cdn.images.test", "cdn.images.test"]


async def test_no_cookie_of_one_answer_goes_into_the_next_request(world):
    world.allowed.answers["/there"] = response(b"", "set-cookie: a=b", "location: /a.png", status="302 Found")
    await world.fetcher().fetch(world.url(path="/there"), "", free)
    assert b"cookie" not in world.allowed.requests[1].lower()


async def test_proxies_of_the_environment_are_not_used(world, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://{INNER}:{world.allowed.port}")
    assert await world.fetcher().fetch(world.url(), "", free) == IMAGE
    assert world.nothing_forbidden_was_reached()


async def test_http_is_fetched_if_the_operator_allows_it(world):
    fetcher = world.fetcher(allows_http=True, ports=frozenset({world.plain.port, world.allowed.port}))
    assert await fetcher.fetch(f"http://images.test:{world.plain.port}/a.png", "", free) == IMAGE


# What is no name of an allowed server, in every spelling that some program reads as an address.
HOSTS = [
    "127.0.0.2",
    "127.2",
    "2130706434",
    "0x7f000002",
    "0x7f.0.0.2",
    "0177.0.0.2",
    "017700000002",
    "127.0.0.0x2",
    "127.0.2",
    "127.0.0.2.",
    "127.000.000.002",
    "127。0。0。2",
    "１２７.0.0.2",
    "①②⑦.0.0.2",
    "[::1]",
    "[::]",
    "[0:0:0:0:0:0:0:1]",
    "[::ffff:127.0.0.2]",
    "[::ffff:7f00:2]",
    "[::127.0.0.2]",
    "[64:ff9b::7f00:2]",
    "[2002:7f00:2::]",
    "[fe80::1%25lo]",
    "[::1%25lo]",
    "0.0.0.0",
    "0",
    "169.254.169.254",
    "localhost",
    "metadata",
    "inner.test",
    "INNER.TEST",
    "inner.test.",
    "both.test",
    "six.test",
    "mapped.test",
    "mapped-allowed.test",
    "compatible.test",
    "nat64.test",
    "6to4.test",
    "teredo.test",
    "scoped.test",
    "zero.test",
    "zero6.test",
    "private.test",
    "shared.test",
    "linklocal.test",
    "metadata6.test",
    "multicast.test",
    "broadcast.test",
    "nowhere.test",
    "odd.test",
    "unknown.test",
    "-images.test",
    "images..test",
    "images.test%00.inner.test",
    "images.test%2f@inner.test",
    "a" * 64 + ".test",
    ".".join(["a" * 60] * 5),
]


@pytest.mark.parametrize("host", HOSTS)
async def test_no_spelling_of_a_host_reaches_a_forbidden_server(world, host):
    error = await failure(world.fetcher(), f"https://{host}:{world.allowed.port}/a.png")
    assert isinstance(error, InvalidRequest)
    assert error.code == "image_url_refused"
    assert "send" in error.message
    assert world.nothing_forbidden_was_reached()
    assert world.allowed.connections == 0


@pytest.mark.parametrize("host", HOSTS)
async def test_no_redirect_reaches_a_forbidden_server(world, host):
    world.allowed.answers["/there"] = redirect(f"https://{host}:{world.allowed.port}/a.png")
    error = await failure(world.fetcher(), world.url(path="/there"))
    assert error.code == "image_url_refused"
    assert world.nothing_forbidden_was_reached()
    assert world.allowed.connections == 1


URLS = [
    "http://images.test:{port}/a.png",
    "HTTP://images.test:{port}/a.png",
    "https://user@images.test:{port}/a.png",
    "https://user:word@images.test:{port}/a.png",
    "https://:@images.test:{port}/a.png",
    "https://images.test:{port}@127.0.0.2:{port}/a.png",
    "https://images.test:{port}@inner.test:{port}/a.png",
    "https://images.test:{port}\\@inner.test:{port}/a.png",
    "https://inner.test:{port}\\@images.test:{port}/a.png",
    "https://inner.test:{port}#@images.test:{port}/a.png",
    "https://inner.test:{port}?@images.test:{port}/a.png",
    "https:\\\\inner.test:{port}\\a.png",
    "https:///inner.test:{port}/a.png",
    "https:inner.test:{port}/a.png",
    "//inner.test:{port}/a.png",
    "https://images.test\t.inner.test:{port}/a.png",
    "https://images.test:{port}/a.png\r\nhost: inner.test",
    "https://images.test:{port}/ a.png",
    "https://images.test:{port}/\u2028a.png",
    "https://images.test:{port}/\0a.png",
    "https://images.test:0/a.png",
    "https://images.test/a.png",
    "https://images.test:22/a.png",
    "https://images.test:99999/a.png",
    "https://images.test:-1/a.png",
    "https://images.test:{port}x/a.png",
    "file:///etc/passwd",
    "ftp://inner.test:{port}/a.png",
    "gopher://inner.test:{port}/_GET",
    "data:image/png;base64,aaaa",
    "unix:///var/run/docker.sock",
    "dict://inner.test:{port}/x",
    "jar:https://inner.test:{port}!/a.png",
    "view-source:https://inner.test:{port}/a.png",
    "https://",
    "https://:{port}/",
    "https://[::1/a.png",
    "https://]/a.png",
    "https://images.test:{port}/" + "a" * 4096,
    "",
]


@pytest.mark.parametrize("url", URLS)
async def test_no_url_reaches_a_forbidden_server(world, url):
    error = await failure(world.fetcher(), url.format(port=world.allowed.port))
    assert error.code == "image_url_refused"
    assert world.nothing_forbidden_was_reached()
    assert world.allowed.connections == 0


@pytest.mark.parametrize("url", [url for url in URLS if "\r" not in url and "\0" not in url and len(url) > 1])
async def test_no_redirect_to_a_url_reaches_a_forbidden_server(world, url):
    """A relative address stays on the server that sent it."""
    world.allowed.answers["/there"] = redirect(url.format(port=world.allowed.port))
    error = await failure(world.fetcher(), world.url(path="/there"))
    assert error.code in ("image_url_refused", "image_url_unreachable")
    assert world.nothing_forbidden_was_reached()
    assert world.plain.connections == 0


@pytest.mark.parametrize(
    ("host", "patterns"),
    [
        ("other.test", ("images.test",)),
        ("images.test", ("*.images.test",)),
        ("evilimages.test", ("images.test", "*.images.test")),
        ("images.test.inner.test", ("images.test",)),
        ("cdn.images.test", ("images.test",)),
        ("images.test", ()),
    ],
)
async def test_a_host_that_is_not_listed_is_not_even_looked_up(world, host, patterns):
    names = Names(NAMES)
    error = await failure(world.fetcher(names, hosts=patterns), world.url(host))
    assert error.code == "image_url_refused"
    assert names.asked == []


async def test_a_redirect_leaves_the_list_no_more_than_the_first_url(world):
    world.allowed.answers["/there"] = redirect(world.url("other.test"))
    names = Names(NAMES)
    error = await failure(world.fetcher(names, hosts=("images.test",)), world.url(path="/there"))
    assert "does not fetch from other.test" in error.message
    assert names.asked == ["images.test"]


async def test_a_name_is_looked_up_once_a_hop_and_the_connection_goes_to_what_was_checked(world):
    """The second look-up of the name leads inside: DNS rebinding."""
    names = Names(NAMES)
    assert await world.fetcher(names).fetch(world.url("rebinding.test"), "", free) == IMAGE
    assert names.asked == ["rebinding.test"]
    assert world.nothing_forbidden_was_reached()


async def test_a_redirect_to_the_same_name_is_checked_anew(world):
    world.allowed.answers["/there"] = redirect("/a.png")
    error = await failure(world.fetcher(), world.url("rebinding.test", "/there"))
    assert error.code == "image_url_refused"
    assert world.nothing_forbidden_was_reached()


async def test_a_name_that_does_not_exist_and_a_private_one_look_alike(world):
    inner, unknown = [await failure(world.fetcher(), world.url(host)) for host in ("inner.test", "unknown.test")]
    assert inner.message.replace("inner.test", "") == unknown.message.replace("unknown.test", "")
    assert inner.code == unknown.code
    assert INNER in inner.cause  # for the log


async def test_the_certificate_is_verified_for_the_name(world):
    error = await failure(world.fetcher(), world.url("other.test"))
    assert error.code == "image_url_unreachable"
    assert "certificate" in error.message
    assert world.allowed.requests == []


async def test_a_certificate_of_an_unknown_authority_is_refused(world):
    fetcher = ImageFetcher(world.rules, Metrics(), resolve=Names(NAMES), tls=ssl.create_default_context())
    error = await failure(fetcher, world.url())
    assert "certificate" in error.message
    assert world.allowed.requests == []


async def test_a_server_without_tls_is_not_spoken_to(world):
    fetcher = world.fetcher(ports=frozenset({world.plain.port}))
    error = await failure(fetcher, f"https://images.test:{world.plain.port}/a.png")
    assert error.code == "image_url_unreachable"
    assert world.plain.requests == []


async def without_tls(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    os.write(writer.get_extra_info("socket").fileno(), b"HTTP/1.1 200 OK\r\n\r\n")


async def test_a_server_that_leaves_tls_after_the_handshake_is_unreachable(world):
    """As one that demands a client's certificate: in TLS 1.3 the client's handshake is over before it is refused."""
    world.allowed.answers["/x"] = without_tls
    error = await failure(world.fetcher(), world.url(path="/x"))
    assert error.code == "image_url_unreachable"
    assert "broke off" in error.message


async def test_redirects_end(world):
    world.allowed.answers["/there"] = redirect("/there")
    error = await failure(world.fetcher(), world.url(path="/there"))
    assert "more than 3 times" in error.message
    assert world.allowed.connections == 4


async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await writer.wait_closed()


def dripping(head: bytes) -> object:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while not reader.at_eof():
            writer.write(b"\0")
            await writer.drain()
            with_none = asyncio.create_task(reader.read(1))
            await asyncio.wait([with_none], timeout=0.05)
            with_none.cancel()

    return drip


@pytest.mark.parametrize(
    "answer",
    [
        silent,
        dripping(b"HTTP/1.1 200 OK\r\nx: "),
        dripping(b"HTTP/1.1 200 OK\r\ncontent-length: 90000\r\n\r\n\x89PNG\r\n\x1a\n"),
    ],
    ids=["nothing", "headers", "body"],
)
async def test_a_slow_server_costs_no_more_than_the_time_limit(world, answer):
    world.allowed.answers["/slow"] = answer
    before = time.monotonic()
    error = await failure(world.fetcher(timeout_s=0.4), world.url(path="/slow"))
    assert time.monotonic() - before < 2
    assert error.code == "image_url_unreachable"
    assert "within 0.4 s" in error.message


@pytest.mark.parametrize(
    "endless",
    [
        b"HTTP/1.1 102 \r\n\r\n",  # interim answers, of which HTTP allows any number
        b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n",
        b"a",
    ],
)
async def test_a_head_without_an_end_is_refused_before_it_costs_time(world, endless):
    sent = 0

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        while True:
            writer.write(endless * 1000)
            sent += 1000 * len(endless)
            await writer.drain()

    world.allowed.answers["/a.png"] = flood
    reading = time.thread_time()
    error = await failure(world.fetcher(timeout_s=30.0), world.url())
    assert "broke off or did not answer in HTTP" in error.message
    assert "head has more than 32,768 bytes" in error.cause
    assert time.thread_time() - reading < 5  # unbounded, it is the whole time limit
    assert sent < 20_000_000


async def test_a_few_interim_answers_are_passed(world):
    world.allowed.answers["/a.png"] = b"HTTP/1.1 103 Early Hints\r\nlink: </b>\r\n\r\n" * 20 + response(IMAGE)
    assert await world.fetcher().fetch(world.url(), "", free) == IMAGE


async def test_slow_redirects_share_one_time_limit(world):
    async def late(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.wait([asyncio.create_task(writer.wait_closed())], timeout=0.3)
        writer.write(redirect("/late"))

    world.allowed.answers["/late"] = late
    error = await failure(world.fetcher(timeout_s=0.5), world.url(path="/late"))
    assert "within 0.5 s" in error.message
    assert world.allowed.connections == 2


async def endless(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n8\r\n\x89PNG\r\n\x1a\n\r\n")
    while not writer.is_closing():
        writer.write(b"1000\r\n" + bytes(4096) + b"\r\n")
        await writer.drain()


async def test_bytes_are_counted_as_they_come(world):
    """No length is told. The limit is 100,000 bytes, and no more than that is ever kept."""
    world.allowed.answers["/endless"] = endless
    reserved: list[int] = []
    with pytest.raises(TooLarge, match="more than 100,000 bytes") as caught:
        await world.fetcher().fetch(world.url(path="/endless"), "", reserved.append)
    assert caught.value.param == "image"
    assert sum(reserved) <= 100_000


async def in_crumbs(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n8\r\n\x89PNG\r\n\x1a\n\r\n")
    writer.write(b"1\r\n\0\r\n" * 5_000)
    await writer.drain()


async def test_a_body_in_crumbs_is_refused(world):
    world.allowed.answers["/crumbs"] = in_crumbs
    error = await failure(world.fetcher(), world.url(path="/crumbs"))
    assert "pieces of a few bytes" in error.message


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (response(IMAGE, length=100_001), TooLarge, "more than 100,000 bytes"),
        (response(IMAGE, length=10**15), TooLarge, "more than 100,000 bytes"),
        (response(b"<!doctype html><html>" + b" " * 200, "content-type: image/png"), InvalidImage, "an HTML page"),
        (response(b'{"secret": 1}', "content-type: image/png"), InvalidImage, "looks like JSON"),
        (response(b""), InvalidImage, "is empty"),
        (response(IMAGE, "content-encoding: gzip"), InvalidRequest, "compressed"),
        (response(IMAGE, status="404 Not Found"), InvalidRequest, "status 404"),
        (response(IMAGE, status="500 Oops"), InvalidRequest, "status 500"),
        (response(IMAGE, status="206 Partial Content"), InvalidRequest, "status 206"),
        (response(IMAGE, status="304 Not Modified"), InvalidRequest, "status 304"),
        (response(b"", status="302 Found"), InvalidRequest, "redirects to nowhere"),
        (response(IMAGE, length=len(IMAGE) + 9), InvalidRequest, "broke off"),
        (response(IMAGE, "transfer-encoding: gzip"), InvalidRequest, "broke off"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", InvalidRequest, "did not answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 100_000 + b"\r\n", InvalidRequest, "did not answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 500_000 + b"\r\n\r\n", InvalidRequest, "did not answer in HTTP"),
        (b"", InvalidRequest, "did not answer in HTTP"),
    ],
    ids=range(17),
)
async def test_a_server_that_lies_or_fails_is_told_apart(world, answer, kind, message):
    world.allowed.answers["/x"] = answer
    error = await failure(world.fetcher(), world.url(path="/x"))
    assert type(error) is kind
    assert message in error.message


async def test_what_a_server_calls_an_image_does_not_matter(world):
    world.allowed.answers["/x"] = response(IMAGE, "content-type: text/html")
    assert await world.fetcher().fetch(world.url(path="/x"), "", free) == IMAGE


async def test_a_quota_that_is_full_ends_the_fetch(world):
    def full(nbytes: int) -> None:
        raise Overloaded("full")

    with pytest.raises(Overloaded):
        await world.fetcher().fetch(world.url(), "", full)


async def test_a_tenant_waits_for_its_turn_and_others_do_not(world):
    world.allowed.answers["/slow"] = silent
    fetcher = world.fetcher(at_once=3, at_once_of_a_tenant=1, timeout_s=0.5)
    waiting = [asyncio.create_task(fetcher.fetch(world.url(path="/slow"), "one", free)) for _ in range(2)]
    assert await fetcher.fetch(world.url(), "two", free) == IMAGE
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["InvalidRequest", "Overloaded"]
    assert await fetcher.fetch(world.url(), "one", free) == IMAGE


async def test_no_more_run_at_once_than_allowed(world):
    world.allowed.answers["/slow"] = silent
    fetcher = world.fetcher(at_once=2, timeout_s=20)
    running = [asyncio.create_task(fetcher.fetch(world.url(path="/slow"), "", free)) for _ in range(2)]
    await until(lambda: world.allowed.connections == 2)
    fetcher.rules = replace(fetcher.rules, timeout_s=0.2)  # of those that wait, who end before the others
    waiting = [fetcher.fetch(world.url(path="/slow"), "", free) for _ in range(3)]
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Overloaded] * 3
    assert world.allowed.connections == 2
    for fetch in running:
        fetch.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_outcomes_are_counted(world):
    metrics = Metrics()
    fetcher = ImageFetcher(world.rules, metrics, resolve=Names(NAMES), tls=world.tls)
    await fetcher.fetch(world.url(), "", free)
    await failure(fetcher, world.url("inner.test"))
    counted = [
        sample(metrics, "glimpse_image_fetches_total", {"outcome": outcome}) for outcome in ("ok", "image_url_refused")
    ]
    assert counted == [1, 1]


async def test_the_systems_resolver_finds_this_machine():
    resolver = SystemResolver(threads=1)
    assert set(await resolver("localhost", 443)) <= {"127.0.0.1", "::1"}
    resolver.close()
