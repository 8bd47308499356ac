"""What a running service says of itself while its parts die, hang, or cannot be asked about."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import httpx
import pytest

from service.triton_server.supervision import EmbeddedTriton
from tests.service.triton_server.test_supervision import Asking, arguments, children, processes
from tests.support.servers import START_S, Gateway, StartGateway, eventually, started_gateway


def triton_of(gateway: Gateway) -> int:
    (server,) = (pid for pid in children(gateway.process.pid) if "tritonserver" in arguments(pid))
    return server


@contextmanager
def few_descriptors(pid: int) -> Iterator[None]:
    """A process that has no file descriptor left."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    held = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (held // 2, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def test_the_service_outlives_what_its_system_refuses_and_tells_deaths_at_once(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    (tmp_path / "logs").write_text("a file in the place of the folder")
    with start_gateway({"GLIMPSE_LOG_DIR": str(tmp_path / "logs")}) as gateway:
        assert gateway.log().count("triton_log_not_written") == 1
        server = triton_of(gateway)
        url = urlsplit(gateway.url)
        with few_descriptors(gateway.process.pid), socket.create_connection((url.hostname, url.port)):
            # The listener tells each time that it has none for the caller; the supervisor looks meanwhile.
            eventually(lambda: gateway.log().count("no_open_files") >= 5, 20, "its system refuses")
        eventually(lambda: gateway.status("/health/ready") == 200, 10, "ready again")
        assert triton_of(gateway) == server
        assert "died" not in gateway.log()

        os.kill(server, signal.SIGKILL)
        eventually(lambda: "triton_died" in gateway.log(), 5, "the death is known")
        assert gateway.status("/health/ready") == 503
        eventually(lambda: gateway.status("/health/ready") == 200, START_S, "ready again")
        assert triton_of(gateway) != server

        with Asking(gateway.url, clients=2) as asking:
            eventually(lambda: asking.statuses[200] >= 2, 20, "answers")
            (llm,) = (pid for pid in processes(triton_of(gateway)) if "/llm/1/model.py" in arguments(pid))
            os.kill(llm, signal.SIGSTOP)
            eventually(lambda: asking.statuses[503], 20, "requests fail")
            eventually(lambda: gateway.status("/health/ready") == 503, 2, "ready tells it")
            eventually(lambda: gateway.status("/health/ready") == 200, START_S, "ready again, with another process")
        assert llm not in processes(triton_of(gateway))
        assert "Traceback" not in gateway.log()


@pytest.fixture
def hanging(repository: Path, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway whose Triton takes every call and answers none."""
    over = threading.Event()
    silence = grpc.unary_unary_rpc_method_handler(lambda *_: b"" if over.wait() else None)
    with ThreadPoolExecutor(32) as threads:
        mute = grpc.server(threads)
        mute.add_generic_rpc_handlers([type("Mute", (grpc.GenericRpcHandler,), {"service": lambda *_: silence})()])
        url = f"127.0.0.1:{mute.add_insecure_port('127.0.0.1:0')}"
        mute.start()
        settings = {"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_STOP_GRACE_S": "0.5"}
        try:
            with started_gateway(tmp_path, settings | {"GLIMPSE_MODEL_REPOSITORY": str(repository)}) as gateway:
                eventually(lambda: gateway.status("/health/live") == 200, START_S, "alive")
                yield gateway
        finally:
            over.set()
            mute.stop(0)


def test_what_still_runs_when_the_grace_is_over_is_told_and_what_does_not_listen_is_cut(hanging: Gateway) -> None:
    host, _, port = hanging.url.removeprefix("http://").partition(":")
    asked = Asking(hanging.url, clients=0).body | {"timeout_s": 60}
    head = b"POST /v1/vqa HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: "
    whole = [
        head + b"%d\r\n\r\n" % len(body) + body
        for body in map(str.encode, map(json.dumps, (asked, asked | {"stream": True})))
    ]
    with ExitStack() as stack:
        callers = [stack.enter_context(socket.create_connection((host, int(port)), timeout=20)) for _ in range(4)]
        for caller, data in zip(callers, (*whole, head + b"1000\r\n\r\n{", head), strict=True):
            caller.sendall(data)
        eventually(lambda: "glimpse_requests_in_flight 2.0" in httpx.get(f"{hanging.url}/metrics").text, 10, "running")
        hanging.process.send_signal(signal.SIGTERM)
        for caller in callers[:3]:
            answer = b"".join(iter(lambda caller=caller: caller.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b'"shutting_down"' in answer
        assert hanging.process.wait(timeout=10) == 0
        assert callers[3].recv(1000) == b""
    assert "Traceback" not in hanging.log()


def test_a_service_that_stops_says_so_before_it_closes(start_gateway: StartGateway, triton: EmbeddedTriton) -> None:
    url = triton.access.url
    settings = {"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url, "GLIMPSE_STOP_NOTICE_S": "3"}
    with start_gateway(settings) as gateway:
        asking = Asking(gateway.url, clients=0)
        body = asking.body | {"max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{gateway.url}/v1/vqa", json=body, timeout=20) as running:
            pieces = running.iter_text()
            assert next(pieces)
            rest: list[str] = []
            reading = threading.Thread(target=lambda: rest.extend(pieces))
            reading.start()
            gateway.process.send_signal(signal.SIGTERM)
            eventually(lambda: gateway.status("/health/ready") == 503, 2, "not ready")
            assert gateway.status("/health/live") == 200
            refused = httpx.post(f"{gateway.url}/v1/vqa", json=asking.body, timeout=20)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "shutting_down"
            assert "retry-after" in refused.headers
            reading.join()
            assert "[DONE]" in "".join(rest)
        assert gateway.process.wait(timeout=20) == 0
