"""Limits on a connection, by raw sockets against a uvicorn with the gateway's protocol and event loop."""

from __future__ import annotations

import base64
import gc
import json
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from ipaddress import ip_network

import pytest
import uvicorn
import uvloop

from service.admission.admission import MAX_LAG_S, UNHURRIED
from service.edges.http.application import http_api
from service.edges.http.edge import ConnectionLimits
from service.edges.http.protocol import limited_protocol
from service.edges.proxies import NO_PROXIES, Proxies
from service.serving import Server
from tests.support.fakes import CLOSER, House, png
from tests.support.servers import eventually

QUESTION = json.dumps({"image": base64.b64encode(png()).decode(), "question": "what colour?"}).encode()
APP = "https://app.example"
LIVE = b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n"
SHORT = ConnectionLimits(head_timeout_s=0.4, write_timeout_s=0.4, linger_s=0.4)


class Served:
    """A service without Triton that listens on a real port, in a thread with a loop of its own."""

    def __init__(self, limits: ConnectionLimits, proxies: Proxies) -> None:
        self.house = House(CLOSER, cors_origins=APP)
        self.lag_s = 0.0  # what the event loop is told to be late
        self.edge = replace(self.house.edge, connections=limits, proxies=proxies, lag_s=lambda: self.lag_s)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        config = uvicorn.Config(
            http_api(self.edge),
            http=limited_protocol(self.edge),
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
            timeout_keep_alive=round(limits.idle_timeout_s),
            timeout_graceful_shutdown=0,
        )
        self.server = Server(config)
        self.thread = threading.Thread(target=lambda: uvloop.run(self.server.serve(sockets=[self.listener])))

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=10)

    def open_connections(self) -> int:
        return len(self.server.server_state.connections)

    def exchange(self, *pieces: bytes) -> bytes:
        """Everything that comes back until the server closes."""
        with self.connect() as client:
            for piece in pieces:
                client.sendall(piece)
            return read_all(client)


@contextmanager
def served(limits: ConnectionLimits = SHORT, proxies: Proxies = NO_PROXIES) -> Iterator[Served]:
    served = Served(limits, proxies)
    served.thread.start()
    try:
        eventually(lambda: served.server.started, 10, "uvicorn started")
        yield served
    finally:
        served.server.should_exit = True
        served.thread.join(10)
        served.house.reader.close()


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served() as each:
        yield each


def read_all(client: socket.socket) -> bytes:
    """Fails if the server does not close within the socket's timeout."""
    received = b""
    try:
        while data := client.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def read_response(client: socket.socket) -> tuple[int, bytes]:
    """One response with a content-length."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = client.recv(65536)
        assert data, f"closed after {received!r}"
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    while len(body) < int(fields[b"content-length"]):
        body += client.recv(65536)
    return int(head.split()[1]), body


def refusal(response: bytes) -> tuple[int, str]:
    """The status and the code of an error that has the shape of every other one."""
    head, _, body = response.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["code"]


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/vqa") -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"host: localhost", b"content-type: application/json", *headers]
    return b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", body])


def get(*headers: bytes, path: bytes = b"/health/live") -> bytes:
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"host: localhost", b"connection: close", *headers, b"", b""])


TOO_LARGE_HEADS = {
    "one header": (get(b"x: " + b"a" * 40_000), 431, "head_too_large"),
    "many headers": (get(*(b"x-%d: a" % number for number in range(101))), 431, "too_many_headers"),
    "many large headers": (get(*(b"x: " + b"a" * 1000 for _ in range(60))), 431, "head_too_large"),
    "a name": (get(b"x" * 40_000 + b": a"), 431, "head_too_large"),
    "a URL": (get(path=b"/" + b"a" * 9000), 414, "url_too_long"),
    "a query": (get(path=b"/health/live?" + b"a" * 9000), 414, "url_too_long"),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400, "invalid_http"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_http"),
    "a proxy's request": (b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n", 405, "method_not_allowed"),
}


@pytest.mark.parametrize(("head", "status", "code"), TOO_LARGE_HEADS.values(), ids=TOO_LARGE_HEADS)
def test_a_head_beyond_a_limit_is_refused(service, head, status, code):
    assert refusal(service.exchange(head)) == (status, code)
    counted = service.house.counted("glimpse_http_requests_total", method="other", route="none", status=str(status))
    assert counted >= 1


@pytest.mark.parametrize("head", [each[0] for each in TOO_LARGE_HEADS.values()], ids=TOO_LARGE_HEADS)
def test_a_refused_head_keeps_nothing_of_its_connection(service, head):
    """Not even until Python's garbage collector runs."""
    client = service.connect()
    eventually(lambda: client.getsockname() in [each.client for each in connections(service)], 5, "it is there")
    (kept,) = [weakref.ref(each) for each in connections(service) if each.client == client.getsockname()]
    gc.disable()
    try:
        with client:
            client.sendall(head)
            while client.recv(65536):
                pass
        eventually(lambda: kept() is None, 5, "it is freed")
    finally:
        gc.enable()


def connections(service: Served) -> list[object]:
    return list(service.server.server_state.connections)


LARGEST_HEADS = {
    "a header": get(b"x: " + b"a" * 32_000),
    "headers": get(*(b"x-%d: a" % number for number in range(98))),
    "a query": get(path=b"/health/live?" + b"a" * 8170),
}


@pytest.mark.parametrize("head", LARGEST_HEADS.values(), ids=LARGEST_HEADS)
def test_a_head_at_its_limit_is_taken(service, head):
    assert service.exchange(head).startswith(b"HTTP/1.1 200 ")


CHUNKED = b"POST /v1/vqa HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
ENDLESS = {
    "a header": (b"GET / HTTP/1.1\r\nx: ", b"a"),
    "headers": (b"GET / HTTP/1.1\r\n", b"x: a\r\n"),
    "a URL": (b"GET /", b"a"),
    "a method": (b"", b"A"),
    "empty lines": (b"", b"\r\n"),
    "a header after a request": (LIVE + b"GET / HTTP/1.1\r\nx: ", b"a"),
    "a trailer": (CHUNKED + b"0\r\nx: ", b"a"),
    "trailers": (CHUNKED + b"0\r\n", b"x: a\r\n"),
    "an extension of a chunk": (CHUNKED + b"2;x=", b"a"),
    "a trailer of a refused body": (CHUNKED.replace(b"/v1/vqa", b"/nowhere") + b"0\r\nx: ", b"a"),
}


@pytest.mark.parametrize(("start", "more"), ENDLESS.values(), ids=ENDLESS)
def test_what_never_ends_is_not_read_for_ever(service, start, more):
    """The server closes after at most some megabytes, whatever comes."""
    chunk, sent = more * (65536 // len(more)), 0
    with service.connect() as client:
        client.sendall(start)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):  # noqa: PT012
            while sent < 50_000_000:
                client.sendall(chunk)
                sent += len(chunk)
    assert sent < 20_000_000
    assert service.exchange(get()).startswith(b"HTTP/1.1 200 ")


SLOW_HEADS = {
    "half a head": (b"GET / HTTP/1.1\r\nhost: a\r\n", b"x"),
    "half a second head": (LIVE + b"GET / HTTP/1.1\r\n", b"x"),
    "empty lines": (b"\r\n", b"\r\n"),
}


@pytest.mark.parametrize(("start", "more"), SLOW_HEADS.values(), ids=SLOW_HEADS)
def test_a_head_has_a_time_limit_however_often_a_byte_comes(service, start, more):
    started = time.monotonic()
    with service.connect() as client:
        client.sendall(start)
        client.settimeout(0.05)
        received = b""
        while time.monotonic() - started < 20:
            try:
                client.sendall(more)
                if not (data := client.recv(65536)):
                    break
                received += data
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                break
    assert 0.3 < time.monotonic() - started < 15
    assert refusal(b"HTTP/1.1 " + received.rpartition(b"HTTP/1.1 ")[2]) == (408, "slow_head")


def test_a_stall_of_the_loop_is_not_the_clients(service):
    """uvloop reads before it looks at its timers, so a head that came during the stall is whole."""
    with service.connect() as client:
        client.sendall(b"GET /health/live HTTP/1.1\r\n")
        eventually(lambda: any(each._begun for each in set(service.server.server_state.connections)), 5, "begun")
        (loop,) = {each.loop for each in set(service.server.server_state.connections)}
        blocked = threading.Event()
        loop.call_soon_threadsafe(lambda: (blocked.set(), time.sleep(1)))
        blocked.wait(5)
        client.sendall(b"host: localhost\r\n\r\n")
        assert read_response(client)[0] == 200


def test_a_connection_that_sends_nothing_is_closed(service):
    assert service.exchange() == b""


def test_an_idle_connection_is_kept_longer_than_a_head_may_take(service):
    with service.connect() as client:
        client.sendall(LIVE)
        assert read_response(client)[0] == 200
        client.settimeout(1)  # more than twice the limit of a head
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(10)
        client.sendall(LIVE)
        assert read_response(client)[0] == 200


def test_a_body_that_goes_on_after_its_refusal_is_not_awaited(service):
    head = b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n"
    response = service.exchange(head, b"a")
    assert response.startswith(b"HTTP/1.1 404 ")


def test_a_body_that_ends_after_its_refusal_leaves_the_connection_open(service):
    with service.connect() as client:
        client.sendall(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\na")
        assert read_response(client)[0] == 404
        client.sendall(b"a" + LIVE)
        assert read_response(client)[0] == 200


@pytest.mark.parametrize("count", [2, 17])
def test_pipelined_requests_are_answered_in_order(service, count):
    paths = [b"/health/live" if number % 2 else b"/nowhere/%d" % number for number in range(count)]
    heads = [b"GET " + path + b" HTTP/1.1\r\nhost: localhost\r\n\r\n" for path in paths]
    with service.connect() as client:
        client.sendall(b"".join(heads[:-1]) + get(path=paths[-1]))
        received = read_all(client)
    statuses = [int(part.split()[0]) for part in received.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [200 if number % 2 else 404 for number in range(count)]


def test_too_many_pipelined_requests_end_the_connection_after_those_before(service):
    for _ in range(20):
        received = service.exchange(LIVE * 10_000)
        assert received.count(b"HTTP/1.1 200 ") == 17
        assert b"connection: close" in received.rpartition(b"HTTP/1.1 ")[2]


def test_a_refusal_reaches_a_client_that_still_sends_and_asked_to_close(service):
    for _ in range(20):
        received = service.exchange(post(bytes(900_000), b"connection: close", path=b"/nowhere"))
        assert received.startswith(b"HTTP/1.1 404 ")
        assert b"not_found" in received


def test_pipelined_bodies_keep_their_places(service):
    with service.connect() as client:
        client.sendall(post(QUESTION) + post(b"{", b"connection: close"))
        received = read_all(client)
    assert [int(part.split()[0]) for part in received.split(b"HTTP/1.1 ")[1:]] == [200, 400]


def test_what_is_sent_while_a_request_waits_is_not_read(service):
    """One request in work and one queued: the rest stays in the sockets' buffers."""
    service.house.language.gate.clear()
    try:
        with service.connect() as client:
            client.sendall(post(QUESTION) + LIVE)
            eventually(lambda: service.house.language.open == 1, 5, "the question runs")
            client.settimeout(0.5)
            sent = 0
            with pytest.raises(TimeoutError):  # noqa: PT012
                while sent < 50_000_000:
                    sent += client.send(LIVE * 1000)
            assert sent < 20_000_000
    finally:
        service.house.language.gate.set()
    eventually(lambda: service.house.language.open == 0, 5, "the question ended")


def test_a_response_comes_in_one_piece(service):
    with service.connect() as client:
        for _ in range(20):
            client.sendall(LIVE)
            head, _, body = client.recv(65536).partition(b"\r\n\r\n")
            assert b"content-length: %d" % len(body) in head


def test_a_streams_first_token_does_not_wait_for_its_second(service):
    language = service.house.language
    language.gate.clear()
    language.wait_at = 1
    try:
        with service.connect() as client:
            client.sendall(post(json.dumps(json.loads(QUESTION) | {"stream": True}).encode()))
            received = b""
            while b"red" not in received:
                received += client.recv(65536)
            assert received.startswith(b"HTTP/1.1 200 ")
            language.gate.set()
            while not received.endswith(b"0\r\n\r\n"):
                received += client.recv(65536)
    finally:
        language.gate.set()
        language.wait_at = 0


def test_an_idle_connection_keeps_nothing_of_its_last_request(service):
    with service.connect() as client:
        client.sendall(post(QUESTION))
        assert read_response(client)[0] == 200
        here = client.getsockname()
        (protocol,) = [each for each in service.server.server_state.connections if each.client == here]
        eventually(lambda: (protocol.cycle, protocol.scope, protocol.headers) == (None,) * 3, 5, "it is let go")
        client.sendall(LIVE)
        assert read_response(client)[0] == 200


def test_a_connection_that_is_lost_is_freed_without_the_garbage_collector(service):
    client = service.connect()
    client.sendall(LIVE)
    assert read_response(client)[0] == 200
    lost = [
        weakref.ref(each) for each in service.server.server_state.connections if each.client == client.getsockname()
    ]
    assert len(lost) == 1
    gc.disable()
    try:
        client.close()
        eventually(lambda: lost[0]() is None, 5, "it is freed")
    finally:
        gc.enable()


def test_a_head_that_has_begun_outlives_the_response_before_it(service):
    service.house.language.gate.clear()
    try:
        with service.connect() as client:
            client.sendall(post(QUESTION) + LIVE[:30])
            eventually(lambda: service.house.language.open == 1, 5, "the question runs")
            service.house.language.gate.set()
            assert read_response(client)[0] == 200
            client.sendall(LIVE[30:])
            assert read_response(client)[0] == 200
    finally:
        service.house.language.gate.set()


@pytest.mark.parametrize("paced", [True, False])
def test_a_client_that_never_reads_is_cut_off(paced, capfd):
    """It asks for more than the sockets' buffers hold, one by one or all at once, and then waits."""
    ask = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with served(replace(SHORT, max_queued_requests=1_000_000)) as service:
        # Left alone, the kernel keeps up to 4 MB for a client: as many responses as it happens to.
        service.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        with service.connect() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(0.2)
            total = service.server.server_state
            try:
                for number in range(5_000):
                    client.sendall(ask)
                    if paced and number < 2:
                        eventually(lambda asked=number: total.total_requests > asked, 5, "answered")
            except (TimeoutError, ConnectionResetError, BrokenPipeError):
                pass
            eventually(lambda: service.open_connections() == 0, 5, "the connection is gone")
            assert total.total_requests <= 6
    assert not capfd.readouterr().err.count("Traceback")


# Connections in all.
FEW = replace(SHORT, max_connections=4, max_connections_per_address=4, head_timeout_s=20.0)


def test_a_new_connection_takes_the_place_of_one_that_has_sent_nothing():
    with served(FEW) as service, ExitStack() as stack:
        kept = stack.enter_context(service.connect())
        kept.sendall(LIVE)
        assert read_response(kept)[0] == 200
        for _ in range(20):
            stack.enter_context(service.connect())
        stack.enter_context(service.connect()).sendall(b"GET / HTT")
        with service.connect() as client:
            client.sendall(get())
            assert read_all(client).startswith(b"HTTP/1.1 200 ")
        kept.sendall(LIVE)
        assert read_response(kept)[0] == 200
        assert service.open_connections() <= 4


def test_a_new_connection_is_refused_while_all_have_requests():
    with served(FEW) as service, ExitStack() as stack:
        service.house.language.gate.clear()
        clients = [stack.enter_context(service.connect()) for _ in range(4)]
        for client in clients:
            client.sendall(post(QUESTION))
        eventually(lambda: service.house.language.open == 4, 5, "all questions run")
        assert refusal(service.exchange()) == (503, "too_many_connections")
        service.house.language.gate.set()
        assert [read_response(client)[0] for client in clients] == [200] * 4
        assert service.exchange(get()).startswith(b"HTTP/1.1 200 ")


def test_one_address_leaves_room_for_others():
    with served(replace(FEW, max_connections_per_address=2)) as service, ExitStack() as stack:
        service.house.language.gate.clear()
        for _ in range(2):
            stack.enter_context(service.connect()).sendall(post(QUESTION))
        eventually(lambda: service.house.language.open == 2, 5, "both questions run")
        assert refusal(service.exchange()) == (503, "too_many_connections")
        other = socket.create_connection(service.address, timeout=10, source_address=("127.0.0.2", 0))
        stack.enter_context(other).sendall(get())
        assert read_all(other).startswith(b"HTTP/1.1 200 ")
        service.house.language.gate.set()


def test_many_callers_behind_one_proxy_are_not_one_address():
    limits = replace(FEW, max_connections_per_address=1)
    with served(limits, Proxies((ip_network("127.0.0.2"),))) as service, ExitStack() as stack:
        for _ in range(3):
            source = ("127.0.0.2", 0)
            proxied = stack.enter_context(socket.create_connection(service.address, timeout=10, source_address=source))
            proxied.sendall(LIVE)
            assert read_response(proxied)[0] == 200
        assert service.open_connections() == 3


def test_who_connects_again_and_again_waits_and_is_closed_and_others_come_in():
    with served(replace(FEW, replaced_per_address_s=0.1, held_s=1.0)) as service, ExitStack() as stack:
        first = stack.enter_context(service.connect())
        first.sendall(LIVE)
        assert read_response(first)[0] == 200
        began = time.monotonic()
        crowd = [stack.enter_context(service.connect()) for _ in range(100)]
        other = socket.create_connection(service.address, timeout=10, source_address=("127.0.0.2", 0))
        stack.enter_context(other).sendall(get())
        assert read_all(other).startswith(b"HTTP/1.1 200 ")
        first.sendall(LIVE)
        assert read_response(first)[0] == 200
        assert service.open_connections() <= 4
        refused = crowd[4:]  # three found room, and one took another's place
        assert [read_all(each) for each in refused] == [b""] * 96
        assert time.monotonic() - began >= 1.0


def test_a_client_with_one_connection_keeps_it_whatever_others_do():
    with served(replace(FEW, replaced_per_address_s=1000.0)) as service, ExitStack() as stack:
        honest = stack.enter_context(service.connect())
        eventually(lambda: service.open_connections() == 1, 5, "it is the oldest")
        for number in range(40):
            source = (f"127.0.0.{2 + number % 2}", 0)
            other = stack.enter_context(socket.create_connection(service.address, timeout=10, source_address=source))
            other.sendall(LIVE)
            other.recv(1)  # of a response, or nothing if it is closed
        honest.sendall(LIVE)
        assert read_response(honest)[0] == 200


def test_a_connection_that_has_sent_something_is_known_before_it_is_read():
    with served(FEW) as service, service.connect() as silent, service.connect() as calling:
        eventually(lambda: service.open_connections() == 2, 5, "both are open")
        stands, goes_on = threading.Event(), threading.Event()
        seen = {}

        def look() -> None:
            stands.set()
            goes_on.wait(10)
            seen.update({each.client: each.has_sent() for each in service.server.server_state.connections})

        next(iter(service.server.server_state.connections)).loop.call_soon_threadsafe(look)
        assert stands.wait(10)  # the loop reads nothing now
        calling.sendall(LIVE)
        goes_on.set()
        assert read_response(calling)[0] == 200
        assert seen == {silent.getsockname(): False, calling.getsockname(): True}


# More than the event loop can do.
@contextmanager
def crowd(limits: ConnectionLimits = SHORT) -> Iterator[Served]:
    """As many questions are open as are let in however late the loop is, and it is late."""
    with served(limits) as service, ExitStack() as stack:
        service.house.language.gate.clear()
        for _ in range(UNHURRIED + 1):
            stack.enter_context(service.connect()).sendall(post(QUESTION))
        eventually(
            lambda: service.house.counted("glimpse_requests_in_flight") == UNHURRIED + 1, 10, "all questions are open"
        )
        service.lag_s = 2 * MAX_LAG_S
        yield service
        service.house.language.gate.set()


@pytest.fixture
def crowded() -> Iterator[Served]:
    with crowd() as service:
        yield service


@pytest.mark.parametrize("path", [b"/v1/vqa", b"/v1/images"])
def test_while_the_loop_does_not_keep_up_questions_are_refused_before_they_are_read(crowded, path):
    with crowded.connect() as client:
        for _ in range(3):  # the connection stays
            client.sendall(post(QUESTION, path=path))
            status, body = read_response(client)
            assert (status, json.loads(body)["error"]["code"]) == (429, "saturated")
        client.sendall(LIVE)  # health is told meanwhile
        assert read_response(client)[0] == 200
        crowded.lag_s = 0.0
        client.sendall(post(b"{}"))
        assert read_response(client)[0] == 400
    assert crowded.house.counted("glimpse_refusals_total", reason="saturated") == 3


def test_refused_questions_in_one_piece_leave_nothing_behind(crowded):
    client = crowded.connect()
    client.sendall(2 * post(QUESTION))
    received = b""
    while received.count(b"}}") < 2:
        received += client.recv(65536)
    assert received.count(b" 429 ") == 2
    (lost,) = [
        weakref.ref(each) for each in crowded.server.server_state.connections if each.client == client.getsockname()
    ]
    gc.disable()
    try:
        client.close()
        eventually(lambda: lost() is None, 5, "it is freed")
    finally:
        gc.enable()


def test_too_many_refused_questions_in_one_piece_end_the_connection(crowded):
    received = crowded.exchange(1000 * b"POST /v1/vqa HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
    most = SHORT.max_queued_requests
    assert received.count(b"saturated") == most
    assert refusal(received[received.rindex(b"HTTP/1.1 ") :]) == (429, "too_many_requests")


def test_a_client_that_reads_no_refusal_is_not_read_either():
    with crowd(replace(SHORT, write_timeout_s=60.0)) as crowded, crowded.connect() as client:
        here = client.getsockname()
        eventually(lambda: any(each.client == here for each in crowded.server.server_state.connections), 5, "it is in")
        (protocol,) = [each for each in crowded.server.server_state.connections if each.client == here]
        client.setblocking(False)
        left = memoryview(2000 * post(20_000 * b"x"))  # a few in each piece that is read at once

        def sent() -> bool:
            nonlocal left
            with suppress(BlockingIOError):
                left = left[client.send(left) :]
            return protocol.flow.read_paused

        def received() -> bool:
            with suppress(BlockingIOError):
                client.recv(65536)
            return not protocol.flow.read_paused

        eventually(sent, 10, "it is read no more")
        eventually(received, 10, "it is read again")


def test_the_body_of_a_refused_question_is_discarded(crowded):
    with crowded.connect() as client:
        head, _, rest = post(b"x" * 300_000).partition(b"\r\n\r\n")
        client.sendall(head + b"\r\n\r\n" + rest[:1000])
        assert read_response(client)[0] == 429
        client.sendall(rest[1000:])
        client.sendall(LIVE)
        assert read_response(client)[0] == 200


def test_a_refused_question_that_goes_on_for_ever_is_cut(crowded):
    with crowded.connect() as client:
        client.sendall(post(b"x" * 1000)[:-1])
        assert b" 429 " in read_all(client)


def heads(response: bytes) -> dict[str, str]:
    lines = response.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


def test_a_refusal_before_the_application_has_its_id_and_can_be_read_by_a_page(crowded):
    mine = [b"x-request-id: mine-1", b"origin: " + APP.encode(), b"connection: close"]
    told = heads(crowded.exchange(post(QUESTION, *mine)))
    assert (told["x-request-id"], told["access-control-allow-origin"]) == ("mine-1", APP)
    assert "retry-after" in told["access-control-expose-headers"]
    assert told["vary"] == "Origin"
    other = heads(crowded.exchange(post(QUESTION, b"origin: https://other.example", b"connection: close")))
    assert len(other["x-request-id"]) == 32
    assert "access-control-allow-origin" not in other


def test_a_refused_head_has_its_id_and_can_be_read_by_a_page(service):
    mine = [b"x-request-id: mine-2", b"origin: " + APP.encode()]
    told = heads(service.exchange(get(*mine, *(b"x-%d: a" % number for number in range(101)))))
    assert (told["x-request-id"], told["access-control-allow-origin"]) == ("mine-2", APP)
    assert len(heads(service.exchange(b"no http\r\n\r\n"))["x-request-id"]) == 32


@pytest.mark.parametrize("last", [b"connection: close", None])
def test_a_connection_that_is_to_close_after_a_refusal_closes(crowded, last):
    request = post(QUESTION, *([last] if last else []))
    request = request if last else request.replace(b"HTTP/1.1", b"HTTP/1.0")
    received = crowded.exchange(request)
    assert b" 429 " in received
    assert b"retry-after: 1" in received
    assert b"connection: close" in received


def test_the_door_is_told_how_large_a_body_is(service, monkeypatch):
    """New images that are refused must not close it to small questions."""
    told = []
    monkeypatch.setattr(service.house.pipeline, "refuse_early", lambda count, lag_s, nbytes: told.append(nbytes))
    with service.connect() as client:
        client.sendall(post(QUESTION))
        assert read_response(client)[0] == 200
        chunked = post(QUESTION).replace(b"content-length: %d" % len(QUESTION), b"transfer-encoding: chunked")
        client.sendall(chunked.replace(QUESTION, b"%x\r\n%s\r\n0\r\n\r\n" % (len(QUESTION), QUESTION)))
        assert read_response(client)[0] == 200
    assert set(told[: len(told) // 2]) == {len(QUESTION)}
    assert set(told[len(told) // 2 :]) == {None}


def test_few_questions_are_let_in_however_late_the_loop_is(service):
    """It may be another program's fault."""
    service.lag_s = 10.0
    with service.connect() as client:
        client.sendall(post(QUESTION))
        assert read_response(client)[0] == 200
    service.lag_s = 0.0


# Upgrades.
UPGRADE = (b"connection: Upgrade, HTTP2-Settings", b"http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA")


@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"TLS/1.0", b"anything"])
def test_an_upgrade_is_ignored_and_its_body_read(service, offer):
    with service.connect() as client:
        for _ in range(2):
            client.sendall(post(QUESTION, b"upgrade: " + offer, *UPGRADE))
            status, body = read_response(client)
            assert (status, json.loads(body)["answer"]) == (200, "red")


@pytest.mark.parametrize("size", [1, 7, 100])
def test_an_upgrade_is_ignored_however_it_is_cut(service, size):
    request = post(QUESTION, b"upgrade: h2c", *UPGRADE) + get(b"upgrade: h2c", *UPGRADE[1:])
    received = service.exchange(*(request[start : start + size] for start in range(0, len(request), size)))
    assert received.count(b"HTTP/1.1 200 ") == 2


def test_a_trailer_is_no_header_and_does_not_end_the_connection(service):
    chunked = b"%x\r\n%s\r\n0\r\nx-request-id: late\r\n\r\n" % (len(QUESTION), QUESTION)
    received = service.exchange(CHUNKED + chunked + get())
    assert received.count(b"HTTP/1.1 200 ") == 2
    assert b"late" not in received


def test_an_upgrade_with_a_chunked_body(service):
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(QUESTION), QUESTION)
    head = b"POST /v1/vqa HTTP/1.1\r\nhost: localhost\r\nupgrade: h2c\r\nconnection: upgrade, close\r\n"
    received = service.exchange(head + b"transfer-encoding: chunked\r\n\r\n" + chunked)
    assert received.startswith(b"HTTP/1.1 200 ")
