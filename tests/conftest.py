"""What many tests share: the committed repository, one real Triton a session, and gateways as real processes.

GLIMPSE_MODEL_REPOSITORY runs the same tests on another repository.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import pytest_asyncio
import redis
from hypothesis import HealthCheck, Phase, settings

from service.core.card import ModelCard
from service.core.vision import IMAGE_SIZE, UInt8Array
from service.prompt import PromptBuilder
from service.triton import TritonClient
from service.triton_server.supervision import EmbeddedTriton, Ports

PROJECT = Path(__file__).parent.parent
SCENES = PROJECT / "build_engines" / "evaluation" / "scenes"

# For `make mutants`: the same few examples each time, and no failure but the mutant's own.
settings.register_profile(
    "mutants",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=30,
    phases=[Phase.explicit, Phase.generate],  # a smaller example of a planted fault is of no use
    suppress_health_check=[HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Gateway:
    """A running `python -m service`."""

    url: str
    process: subprocess.Popen[bytes]
    log_path: Path


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
StartGateway = Callable[[Mapping[str, str]], AbstractContextManager[Gateway]]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on: all are held until all are known."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def eventually(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Polls until the condition holds; fails with `what` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.02)


async def eventually_async(condition: Callable[[], Awaitable[object]], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s:g} s")
        await asyncio.sleep(0.02)


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(os.environ.get("GLIMPSE_MODEL_REPOSITORY", PROJECT / "model_repository"))


@pytest.fixture(scope="session")
def card(repository: Path) -> ModelCard:
    return ModelCard.from_json((repository / "card.json").read_text())


@pytest.fixture(scope="session")
def prompts(repository: Path, card: ModelCard) -> PromptBuilder:
    return PromptBuilder.load(card, repository)


@pytest.fixture(scope="session")
def pixels() -> UInt8Array:
    """Some image as the encoder reads it: RGB [3, 224, 224]."""
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    return np.stack([rows, columns, (rows // 16 + columns // 16) % 2 * 255]).astype(np.uint8)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def triton(
    repository: Path, card: ModelCard, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EmbeddedTriton]:
    """The session's Triton; whoever breaks one starts their own."""
    ports = Ports(*free_ports(3))
    log_path = tmp_path_factory.mktemp("triton") / "triton.log"
    async with (
        TritonClient(f"127.0.0.1:{ports.grpc}", f"127.0.0.1:{ports.grpc}") as client,
        EmbeddedTriton(repository, client=client, card=card, log_path=log_path, ports=ports) as triton,
    ):
        yield triton


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(triton: EmbeddedTriton) -> AsyncIterator[TritonClient]:
    """For tests in the session's event loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`."""
    url = f"127.0.0.1:{triton.ports.grpc}"
    async with TritonClient(url, url) as client:
        yield client


@pytest.fixture(scope="session")
def start_gateway(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> StartGateway:
    """Starts `python -m service` with these GLIMPSE_ settings on a free port, ready when it yields."""

    @contextmanager
    def start(settings: Mapping[str, str]) -> Iterator[Gateway]:
        folder = tmp_path_factory.mktemp("gateway")
        (port,) = free_ports(1)
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("GLIMPSE_")},
            "GLIMPSE_MODEL_REPOSITORY": str(repository),
            "GLIMPSE_HTTP_PORT": str(port),
            "GLIMPSE_LOG_DIR": str(folder),
            "GLIMPSE_ELASTIC_FIDELITY": "false",  # a busy machine must not change what is answered
            **settings,
        }
        log_path = folder / "gateway.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "service"], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        gateway = Gateway(f"http://127.0.0.1:{port}", process, log_path)
        try:
            eventually(lambda: process.poll() is not None or is_ready(gateway), 60, f"gateway ready, see {log_path}")
            if process.poll() is not None:
                pytest.fail(f"the gateway ended while starting:\n{log_path.read_text()[-3000:]}")
            yield gateway
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise

    return start


def is_ready(gateway: Gateway) -> bool:
    try:
        return httpx.get(f"{gateway.url}/health/ready", timeout=2).is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def gateway(start_gateway: StartGateway, triton: EmbeddedTriton) -> Iterator[Gateway]:
    """A gateway in front of the session's Triton."""
    url = f"127.0.0.1:{triton.ports.grpc}"
    with start_gateway({"GLIMPSE_VISION_URL": url, "GLIMPSE_LLM_URL": url}) as gateway:
        yield gateway


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[StartRedis]:
    """Starts a redis-server of the test's own with these options."""
    servers: list[RedisServer] = []

    def start(*options: str) -> RedisServer:
        servers.append(RedisServer(tmp_path, *options))
        servers[-1].start()
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def redis_server(start_redis: StartRedis) -> RedisServer:
    return start_redis()
