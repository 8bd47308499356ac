"""What many tests share: the committed repository, one real Triton a session, and gateways as real processes.

GLIMPSE_MODEL_REPOSITORY runs the same tests on another repository.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
import pytest_asyncio

from service.core.card import ModelCard
from service.core.vision import IMAGE_SIZE, UInt8Array
from service.text.prompt import PromptBuilder
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton
from tests.support.once import Once, of_this_run
from tests.support.paths import NODE_MODULES, PROJECT
from tests.support.servers import Gateway, RedisServer, StartGateway, StartRedis, free_ports, started_gateway
from tests.support.workers import Workers, tell_groups

if TYPE_CHECKING:
    from tests.support.shared_exports import SharedExports

DEBIAN = "Debian, Ubuntu: sudo apt-get install"
INSTALLED_BY = {
    "redis-server": f"{DEBIAN} redis-server",
    "promtool": f"{DEBIAN} prometheus",
    "prometheus": f"{DEBIAN} prometheus",
    "amtool": f"{DEBIAN} prometheus-alertmanager",
    "curl": f"{DEBIAN} curl",
    "node": f"{DEBIAN} nodejs",
    "chromium": f"{DEBIAN} chromium",
    "schemathesis": "python3 scripts/set_up.py develop",
    "npm's openai": "python3 scripts/set_up.py develop",
    "npm's axe-core": "python3 scripts/set_up.py develop",
}
# Fixtures that start a real server, or start one that a test asks for.
SERVERS = {"triton", "start_gateway", "starting", "start_redis"}
# Fixtures of several files that take long: one worker runs their tests.
TOGETHER = ("tiny_training",)
LEFT_OUT = "left out"
QUICK_EXAMPLES = 30
GARBAGE_AFTER = 20_000  # new objects before the next garbage collection, as in the service


def pytest_configure(config: pytest.Config) -> None:
    """Find what the set-up installed into .venv, after what the system has."""
    gc.disable()  # until the tests are collected: modules are no garbage
    os.environ["PATH"] += f":{Path(sys.executable).parent}"
    # No test asks a public host. Each client would read 150 certificates of authorities, which takes up to 100 ms.
    os.environ.pop("SSL_CERT_FILE", None)
    os.environ["SSL_CERT_DIR"] = os.devnull
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of PyTorch: the workers share the cores
    elif config.getoption("numprocesses", None):
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        config.pluginmanager.register(Workers(Path(folder.name)))
    config.addinivalue_line("markers", "needs(program): one of INSTALLED_BY that the test runs for real")
    config.addinivalue_line("markers", "servers: starts a real server; set here for those that use SERVERS")
    config.addinivalue_line("markers", "stack: needs a Docker engine and images; `make test-stack` runs these")
    config.addinivalue_line(
        "markers", "slow: builds or trains a model, starts many processes, or takes more than two seconds"
    )


def bound_hypothesis() -> None:
    """As many examples as ever, the same ones in CI; a failing one is shown as it is found.

    Shrinking one can take minutes: `--hypothesis-profile shrink` does it for a failure that needs it.
    """
    in_ci = "CI" in os.environ
    every = tuple(hypothesis.Phase)
    quick = [phase for phase in every if phase not in (hypothesis.Phase.shrink, hypothesis.Phase.explain)]
    hypothesis.settings.register_profile("bounded", deadline=None, derandomize=in_ci, phases=quick, print_blob=True)
    hypothesis.settings.register_profile("shrink", deadline=None)
    # For `make quick`: `make test` runs the other examples.
    hypothesis.settings.register_profile(
        "quick", hypothesis.settings.get_profile("bounded"), max_examples=QUICK_EXAMPLES
    )
    # For `make mutants`: the same few examples each time, and no failure but the mutant's own.
    hypothesis.settings.register_profile(
        "mutants",
        derandomize=True,
        deadline=None,
        database=None,
        max_examples=30,
        phases=[
            hypothesis.Phase.explicit,
            hypothesis.Phase.generate,
        ],  # a smaller example of a planted fault is of no use
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("bounded")


bound_hypothesis()  # before --hypothesis-profile is read


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what starts servers; under pytest-xdist, the longest first."""
    for item in items:
        fixtures = SERVERS.intersection(getattr(item, "fixturenames", ()))
        if "start_redis" in fixtures:
            item.add_marker(pytest.mark.needs("redis-server"))
        if fixtures:
            item.add_marker(pytest.mark.servers)
    if hasattr(config, "workerinput"):
        items.sort(key=order)
        tell_groups(config, {item.nodeid: group for item in items if (group := group_of(item))})


def order(item: pytest.Item) -> int:
    """Servers; what takes long; the rest. A server that is built first belongs to the second."""
    if item.get_closest_marker("slow"):
        return 1
    return 0 if item.get_closest_marker("servers") else 2


def group_of(item: pytest.Item) -> str | None:
    """Name the group of tests that one worker runs; None for a test that runs with its file."""
    if order(item) == 0:
        return "servers"
    return next((name for name in TOGETHER if name in getattr(item, "fixturenames", ())), None)


def pytest_collection_finish() -> None:
    """Leave what was imported out of later garbage collections: they would scan a million objects each time."""
    gc.freeze()
    gc.set_threshold(GARBAGE_AFTER)
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test whose program is not installed. In CI it fails, because the set-up installs every program."""
    for mark in item.iter_markers("needs"):
        (program,) = mark.args
        package = program.removeprefix("npm's ")
        if not ((NODE_MODULES / package).exists() if package != program else shutil.which(program)):
            said = f"{program} is not installed ({INSTALLED_BY[program]})"
            if "CI" in os.environ:
                pytest.fail(said, pytrace=False)
            item.user_properties.append((LEFT_OUT, said))  # a worker's report carries it to the summary
            pytest.skip(said)


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Name what was left out after everything else."""
    yield
    left_out: dict[str, list[str]] = {}
    for report in terminalreporter.getreports("skipped"):
        for name, said in report.user_properties:
            if name == LEFT_OUT:
                left_out.setdefault(said, []).append(report.nodeid)
    for said, tests in left_out.items():
        terminalreporter.section(f"LEFT OUT ({len(tests)})", yellow=True, bold=True)
        terminalreporter.line(f"{said}:")
        for test in tests:
            terminalreporter.line(f"  {test}")


@pytest.fixture(autouse=True, scope="module")
def frozen() -> None:
    """Leave what earlier files have imported and made out of garbage collections: late in a run one takes 0.6 s."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def same_scheduling() -> Iterator[None]:
    """Fail if a file's tests leave their thread another priority, which all later tests and servers would inherit."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(os.environ.get("GLIMPSE_MODEL_REPOSITORY", PROJECT / "model_repository"))


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes what several files need once in a run, for all workers."""
    return of_this_run(tmp_path_factory)


@pytest.fixture(scope="session")
def exports(once: Once) -> SharedExports:
    """Builds that export each graph once in a run."""
    from tests.support.shared_exports import SharedExports  # noqa: PLC0415  (PyTorch: only for tests that build)

    return SharedExports(once)


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
    access = Access.choose(Ports(metrics=free_ports(1)[0]))
    log_path = tmp_path_factory.mktemp("triton") / "triton.log"
    async with (
        TritonClient(access.url, access.url) as client,
        EmbeddedTriton(repository, client=client, card=card, log_path=log_path, access=access) as triton,
    ):
        yield triton


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def client(triton: EmbeddedTriton) -> AsyncIterator[TritonClient]:
    """For tests in the session's event loop: `pytestmark = pytest.mark.asyncio(loop_scope="session")`."""
    url = triton.access.url
    async with TritonClient(url, url) as client:
        yield client


@pytest.fixture(scope="session")
def start_gateway(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> StartGateway:
    """Starts `python -m service` with these GLIMPSE_ settings, ready when it yields."""

    @contextmanager
    def start(settings: Mapping[str, str]) -> Iterator[Gateway]:
        told = {
            "GLIMPSE_MODEL_REPOSITORY": str(repository),
            "GLIMPSE_ELASTIC_FIDELITY": "false",  # a busy machine must not change what is answered
            **settings,
        }
        with started_gateway(tmp_path_factory.mktemp("gateway"), told) as gateway:
            gateway.wait_until_ready()
            yield gateway

    return start


@pytest.fixture
def starting(repository: Path, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway with a Triton of its own, from its first moment."""
    with started_gateway(tmp_path, {"GLIMPSE_MODEL_REPOSITORY": str(repository)}) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def gateway(start_gateway: StartGateway, triton: EmbeddedTriton) -> Iterator[Gateway]:
    """A gateway in front of the session's Triton."""
    url = triton.access.url
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
