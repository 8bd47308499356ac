"""The real servers that tests start: `python -m service` and redis-server, on ports of this process's own."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from benchmarks.ports import free_ports

START_S = 60.0
STOP_S = 20.0


def eventually(condition: Callable[[], object], timeout_s: float, what: str, every_s: float = 0.02) -> None:
    """Polls until the condition holds; fails with `what` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s:g} s")
        time.sleep(every_s)


async def eventually_async(condition: Callable[[], Awaitable[object]], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s:g} s")
        await asyncio.sleep(0.02)


@dataclass(frozen=True)
class Gateway:
    """A `python -m service`."""

    url: str
    rpc: str  # gRPC's host and port
    process: subprocess.Popen[bytes]
    log_path: Path

    def status(self, path: str) -> int:
        """0 if nobody answers."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def log(self) -> str:
        return self.log_path.read_text()

    def wait_until_ready(self) -> None:
        """Fails the test if it ends before."""
        eventually(
            lambda: self.process.poll() is not None or self.status("/health/ready") == 200,
            START_S,
            f"gateway ready, see {self.log_path}",
        )
        if self.process.poll() is not None:
            pytest.fail(f"the gateway ended while starting:\n{self.log()[-3000:]}")


StartGateway = Callable[[Mapping[str, str]], AbstractContextManager[Gateway]]


@contextmanager
def started_gateway(folder: Path, settings: Mapping[str, str]) -> Iterator[Gateway]:
    """`python -m service` from its first moment, on free ports. At the end it is told to stop, and must."""
    names = ("HTTP_PORT", "GRPC_PORT", "TRITON_METRICS_PORT")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GLIMPSE_")},
        **{f"GLIMPSE_{name}": str(port) for name, port in ports.items()},
        "GLIMPSE_LOG_DIR": str(folder),
        "GLIMPSE_STOP_NOTICE_S": "0",  # nothing balances load here
        **settings,
    }
    log_path = folder / "gateway.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        url, rpc = f"http://127.0.0.1:{ports['HTTP_PORT']}", f"127.0.0.1:{ports['GRPC_PORT']}"
        yield Gateway(url, rpc, process, log_path)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


class RedisServer:
    """A real one, on a port that stays its own when it is killed and started again; it starts empty each time."""

    def __init__(self, folder: Path, *options: str) -> None:
        (self.port,) = free_ports(1)
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis.from_url(self.url)  # for a look behind the service's back
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *self._options],
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
        )
        eventually(self.answers, 10, "redis-server started")

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return bool(connection.recv(64))
        except OSError:
            return False

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self.client.close()  # it connects again when it is used again
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)


StartRedis = Callable[..., RedisServer]
