"""Start and stop each measured system. Only one runs at a time."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.bench.models import PROJECT, Model
from benchmarks.bench.processes import Process, family, shared_regions
from benchmarks.ports import free_ports

START_S = 240.0
STOP_S = 30.0


@dataclass(frozen=True, slots=True)
class System:
    """A system to measure."""

    asked_as: str  # its interface: glimpse, triton, naive or litserve
    how: str  # its description in the report
    settings: Mapping[str, str] = field(default_factory=dict)  # GLIMPSE_ settings
    # By model: parameters that replace those in the repository's config.pbtxt.
    parameters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    module: tuple[str, ...] = ("service",)  # what `python -m` runs as the gateway, and its arguments


@dataclass(frozen=True, slots=True)
class Running:
    """A running system."""

    asked_as: str
    urls: tuple[str, ...]
    pids: tuple[int, ...]  # roots of its process trees
    folder: Path  # for its logs
    triton_metrics: str = ""  # URL
    rpc: str = ""  # host and port of the gateway's gRPC

    def processes(self) -> list[Process]:
        return [process for pid in self.pids for process in family(pid)]

    def shared_memory(self) -> int:
        """Count the regions of shared memory that its processes have mapped."""
        return len({region for process in self.processes() for region in shared_regions(process.pid)})


AT_THE_DOOR = "two vision slots, and the encoder's niceness equals the LLM's"

SYSTEMS: Mapping[str, System] = {
    "naive": System(
        "naive", "FastAPI's thread pool, transformers generate, PyTorch's threads: one per core for each request"
    ),
    "litserve": System("litserve", "one worker, batches of up to 16 that wait 10 ms, PyTorch's threads: one per core"),
    "triton": System("triton", "the vqa ensemble over gRPC, same repository as glimpse, no gateway, no cache"),
    "glimpse": System("glimpse", "default settings"),
    "glimpse-no-cache": System("glimpse", "no feature cache", {"FEATURE_CACHE_BYTES": "0"}),
    "glimpse-no-scheduler": System(
        "glimpse", "all requests enter Triton at once", {"VISION_SLOTS": "1000", "LLM_TOKENS": "10000000"}
    ),
    "glimpse-no-fidelity": System("glimpse", "no elastic fidelity", {"ELASTIC_FIDELITY": "false"}),
    "glimpse-no-limit": System("glimpse", "no concurrency limit", {}, module=("benchmarks.bench.orders", "unlimited")),
    "fifo": System(
        "glimpse",
        "glimpse with one queue in order of arrival, whose head blocks the others; no elastic fidelity",
        {"ELASTIC_FIDELITY": "false"},
        module=("benchmarks.bench.orders", "fifo"),
    ),
    "glimpse-door": System(
        "glimpse",
        f"requests queue in the gateway: {AT_THE_DOOR}; no elastic fidelity",
        {"VISION_SLOTS": "2", "ELASTIC_FIDELITY": "false"},
        {"vision_encoder": {"nice": "5"}},
    ),
    "fifo-door": System(
        "glimpse",
        f"one queue in order of arrival, otherwise as glimpse-door: {AT_THE_DOOR}",
        {"VISION_SLOTS": "2", "ELASTIC_FIDELITY": "false"},
        {"vision_encoder": {"nice": "5"}},
        module=("benchmarks.bench.orders", "fifo"),
    ),
    "glimpse-no-reuse": System("glimpse", "no prefix reuse", {}, {"llm": {"prefix_cache_bytes": "0"}}),
}


@contextmanager
def running(system: System, model: Model, folder: Path) -> Iterator[Running]:
    """Start a system, yield it when it is ready, stop it at the end. Raises RuntimeError if it does not start."""
    folder.mkdir(parents=True, exist_ok=True)
    match system.asked_as:
        case "glimpse":
            if system.parameters:
                model = replace(model, repository=with_parameters(model.repository, folder, system.parameters))
            starting = gateway(model, folder, system.settings, system.module)
        case "triton":
            starting = triton(model, folder)
        case "naive":
            starting = python_server("naive", "benchmarks.bench.naive", model, folder)
        case "litserve":
            starting = python_server("litserve", "benchmarks.bench.litserve_server", model, folder)
        case other:
            raise ValueError(f"nothing starts {other}")
    with starting as started:
        yield started


@contextmanager
def gateway(
    model: Model,
    folder: Path,
    settings: Mapping[str, str],
    module: Sequence[str] = ("service",),
    checkout: Path = PROJECT,
) -> Iterator[Running]:
    """Run `python -m MODULE` in that checkout, which starts its own Triton unless the settings name one.

    Another checkout runs with its own packages if it has any.
    """
    http_port, metrics_port, grpc_port, *others = free_ports(5)
    # A checkout from before the embedded Triton's socket has to be told ports for HTTP and gRPC.
    declared = (checkout / "service" / "settings.py").read_text()
    has_ports = "triton_http_port" in declared
    old = dict(zip(("TRITON_HTTP_PORT", "TRITON_GRPC_PORT"), map(str, others), strict=True)) if has_ports else {}
    if " grpc_port:" in declared:
        old["GRPC_PORT"] = str(grpc_port)
    told = {
        "MODEL_REPOSITORY": str(model.repository),
        "HTTP_PORT": str(http_port),
        "TRITON_METRICS_PORT": str(metrics_port),
        **old,
        "TRITON_START_TIMEOUT_S": str(START_S),
        "LOG_DIR": str(folder),
        "LOG_LEVEL": "warning",
        **settings,
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GLIMPSE_")}
    environment |= {f"GLIMPSE_{name}": value for name, value in told.items()}
    own = checkout / ".venv" / "bin" / "python"
    python = sys.executable if checkout == PROJECT or not own.exists() else str(own)
    with process([python, "-m", *module], folder / "gateway.log", environment, checkout) as started:
        wait_until(lambda: answers(http_port, "/health/ready"), started, folder / "gateway.log")
        metrics = f"http://127.0.0.1:{metrics_port}/metrics"
        urls, rpc = (f"http://127.0.0.1:{http_port}",), f"127.0.0.1:{grpc_port}"
        yield Running("glimpse", urls, (started.pid,), folder, metrics, rpc)


def with_parameters(repository: Path, folder: Path, parameters: Mapping[str, Mapping[str, str]]) -> Path:
    """Make a repository of links to the given one and replace these parameters of its models.

    Raises ValueError if a model does not have the parameter.
    """
    own = folder / "repository"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir(parents=True)
    for path in repository.iterdir():
        if path.name not in parameters:
            (own / path.name).symlink_to(path.resolve())
    for model, values in parameters.items():
        (own / model).mkdir()
        (own / model / "1").symlink_to((repository / model / "1").resolve())
        configuration = (repository / model / "config.pbtxt").read_text()
        for name, value in values.items():
            entry = rf'(key: "{name}", value: {{ string_value: )"[^"]*"'
            configuration, found = re.subn(entry, rf'\1"{value}"', configuration)
            if not found:
                raise ValueError(f"{model} has no parameter {name}")
        (own / model / "config.pbtxt").write_text(configuration)
    return own


@contextmanager
def triton(model: Model, folder: Path) -> Iterator[Running]:
    ports = free_ports(2)
    log = folder / "triton_server.log"
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench.triton_server",
        str(model.repository),
        str(folder / "triton.log"),
    ]
    with process([*command, *map(str, ports)], log) as started:
        wait_until(lambda: "ready" in log.read_text(), started, log)
        metrics = f"http://127.0.0.1:{ports[1]}/metrics"
        yield Running("triton", (f"127.0.0.1:{ports[0]}",), (started.pid,), folder, metrics)


@contextmanager
def python_server(name: str, module: str, model: Model, folder: Path) -> Iterator[Running]:
    (port,) = free_ports(1)
    log = folder / f"{name}.log"
    with process([sys.executable, "-m", module, str(model.checkpoint), str(port)], log) as started:
        wait_until(lambda: answers(port, "/health"), started, log)
        yield Running(name, (f"http://127.0.0.1:{port}",), (started.pid,), folder)


@contextmanager
def two_gateways(model: Model, folder: Path, settings: Mapping[str, str]) -> Iterator[Running]:
    """Start two gateways that share one Triton and one Redis. Needs redis-server."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        (redis_port,) = free_ports(1)
        command = ["redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--save", ""]
        redis = stack.enter_context(process(command, folder / "redis.log"))
        behind = stack.enter_context(triton(model, folder))
        shared = {
            "VISION_URL": behind.urls[0],
            "LLM_URL": behind.urls[0],
            "REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            **settings,
        }
        fronts = [stack.enter_context(gateway(model, made(folder / f"gateway_{n}"), shared)) for n in (1, 2)]
        urls = tuple(url for front in fronts for url in front.urls)
        pids = (redis.pid, *behind.pids, *(pid for front in fronts for pid in front.pids))
        yield Running("glimpse", urls, pids, folder, behind.triton_metrics)


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def process(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, folder: Path = PROJECT
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command in its own session.

    At the end it gets SIGTERM. After STOP_S it gets SIGKILL. Descendants that remain in its session are killed. A
    SIGTERM to the benchmark is such an end too.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
        )
    try:
        yield started
    finally:
        below = [each.pid for each in family(started.pid)]
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(STOP_S)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        for pid in below:  # LitServe leaves its workers running
            if _session(pid) in below:
                os.kill(pid, signal.SIGKILL)


def _session(pid: int) -> int:
    """Return the session of a process, or 0 if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return 0


def wait_until(condition: Callable[[], bool], started: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the condition holds. Raises RuntimeError with the log's end if the process does not start."""
    deadline = time.monotonic() + START_S
    while not condition():
        if started.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the system did not start, see {log}:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.1)


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
