"""Starts and watches the Triton that the nvidia-pytriton wheel bundles: no Docker, no GPU.

Three things that Triton 2.51 does not do are done here: a check before the start (without libpython a load hangs for
ever), a reload of a model whose process died (Triton keeps saying that it is ready), and an end that leaves no process
and no shared memory behind, however it comes.

Why processes die under load: one that has not reported for a second (it was stopped, or a crowded machine gave it no
core) counts as dead to Triton's python backend, which frees the shared memory of its request. When the process goes on
it writes there, and it or Triton itself ends in a segmentation fault or `lock_exception`. SIGSTOP for 2.5 s under load
brings it about.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import mmap
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog

from service.core.card import ModelCard
from service.core.errors import GlimpseError

SHARED_MEMORY = Path("/dev/shm")
# Of each model process's region of it. Triton's own 1 MiB grows with what comes together, and a process that writes as
# its region grows can write past the end: two died so in 40 minutes' soak.
REGION_BYTES = 32 << 20
LEAST_REGION_BYTES = 1 << 20
REGIONS_SHARE = 0.25  # of the shared memory that is free: all of a region is taken at once

WATCH_INTERVAL_S = 0.2
RELOAD_TIMEOUT_S = 5.0  # then the whole server is restarted: the service is to answer again within 10 s
EXIT_TIMEOUT_S = 8  # what Triton takes at most to end requests and models when it is told to stop
START_ATTEMPTS = 3
LOG_BYTES = 10_000_000  # a longer log is put aside at the next start
RESTART_PAUSE_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before each restart in a row, the last one from then on

# Runs in the child before tritonserver takes its place: when the process that started it dies, even by SIGKILL, the
# kernel tells Triton to stop. The last check covers a death before the first line.
GUARD = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)

DEAD = ("Z", "X")  # of /proc/PID/stat; Triton never collects its dead model processes

log = structlog.get_logger()


class StartFailed(Exception):
    """Triton cannot start here; the message names what is missing and what mends it."""


class Crashed(StartFailed):
    """Triton died of a signal while starting. On a crowded machine its python backend sometimes aborts in
    `boost::interprocess::lock_exception`; the next start goes well."""


class Client(Protocol):
    """What is needed of service.triton.TritonClient."""

    async def ready(self) -> bool: ...
    async def probe(self, model: str, card: ModelCard, timeout_s: float, fresh_s: float = 0.0) -> None: ...
    async def load(self, model: str, timeout_s: float) -> None: ...
    async def unload(self, model: str, timeout_s: float) -> None: ...
    def abandon(self, lost: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Ports:
    """All on 127.0.0.1: the embedded Triton is nobody's but ours."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002


@dataclass(frozen=True, slots=True)
class Installation:
    """Where the wheel has what we start, and what the loader needs to find."""

    server: Path
    stub: Path
    backend: Path  # the python backend's folder
    library_path: str
    preload: str = ""  # a library to load before the others, by its name in `library_path` or the loader's cache

    @classmethod
    def find(cls) -> Installation:
        """Raises StartFailed where the wheel is missing or not for this Python."""
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise StartFailed(
                "the Triton server is not installed: run `python3 scripts/set_up.py serve` in Glimpse's folder"
            )
        package = Path(spec.origin).parent
        root = package / "tritonserver"
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = root / "python_backend_stubs" / python / "triton_python_backend_stub"
        if not stub.is_file():
            raise StartFailed(f"nvidia-pytriton has no stub for Python {python}: use Python 3.11 to 3.13")
        bundled = package.parent / "nvidia_pytriton.libs"
        libraries = (
            sysconfig.get_config_var("LIBDIR"),
            f"{sys.base_prefix}/lib",
            str(bundled),
            os.environ.get("LD_LIBRARY_PATH"),
        )
        # The wheel's stub for 3.13 links a libpython of the wheel's, and its RPATH wins. On another build of 3.13 every
        # model fails with "PyCapsule_Import could not import module datetime". The stub uses what is loaded first.
        bundles_libpython = any(bundled.glob(f"libpython{sys.version_info.major}-*.{sys.version_info.minor}.so*"))
        return cls(
            server=root / "bin" / "tritonserver",
            stub=stub,
            backend=root / "backends" / "python",
            library_path=":".join(dict.fromkeys(path for path in libraries if path)),
            preload=f"libpython{python}.so.1.0" if bundles_libpython else "",
        )

    def link_backend(self, folder: Path) -> None:
        """A backends directory of our own, with the stub of this Python; site-packages stays as it is."""
        python = folder / "python"
        python.mkdir(parents=True)
        for file in (self.backend / "libtriton_python.so", self.backend / "triton_python_backend_utils.py", self.stub):
            (python / file.name).symlink_to(file)

    def environment(self) -> dict[str, str]:
        """The stub embeds the first Python on PATH: ours, so that it imports what we import."""
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": self.library_path,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        }
        if self.preload:
            environment["LD_PRELOAD"] = f"{self.preload}:{os.environ.get('LD_PRELOAD', '')}"
        return environment


def check(repository: Path, ports: Ports) -> Installation:
    """Everything that can be known before the start. Raises StartFailed with what mends it."""
    check_platform(sys.platform, platform.machine(), platform.libc_ver())
    installation = Installation.find()
    check_libraries(installation)
    check_repository(repository)
    check_ports(ports)
    return installation


def check_platform(system: str, machine: str, libc: tuple[str, str]) -> None:
    if system != "linux" or machine != "x86_64":
        raise StartFailed(
            f"the bundled Triton runs on Linux x86-64, this is {system} {machine}: "
            "run Triton elsewhere and set GLIMPSE_VISION_URL and GLIMPSE_LLM_URL"
        )
    name, version = libc
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < (2, 35):
        raise StartFailed(
            f"the bundled Triton needs glibc 2.35 or newer, this is {name or 'another libc'} {version}: "
            "use Debian 12, Ubuntu 22.04 or newer"
        )


def check_libraries(installation: Installation) -> None:
    """Asks the loader, without running anything: a stub without libpython makes every load hang for ever."""
    for program in (installation.server, installation.stub):
        environment = {**installation.environment(), "LD_TRACE_LOADED_OBJECTS": "1"}
        listing = subprocess.run([program], env=environment, capture_output=True, text=True, check=False, timeout=30)
        missing = sorted(line.split()[0] for line in listing.stdout.splitlines() if "not found" in line)
        if installation.preload not in listing.stdout:
            missing.append(installation.preload)
        if any(name.startswith("libpython") for name in missing):
            python = f"python{sys.version_info.major}.{sys.version_info.minor}"
            raise StartFailed(
                f"{', '.join(missing)} was not found, Triton's models need it: run `sudo apt-get install lib{python}` "
                "(or use a Python built with --enable-shared)"
            )
        if missing:
            raise StartFailed(f"{program.name} needs libraries that were not found: {', '.join(missing)}")


def check_repository(repository: Path) -> None:
    absent = [
        name for name in ("card.json", "see/config.pbtxt", "llm/config.pbtxt") if not (repository / name).exists()
    ]
    if absent:
        raise StartFailed(
            f"{repository} is not a model repository, it lacks {', '.join(absent)}: set GLIMPSE_MODEL_REPOSITORY, "
            "or write one with `make repository`"
        )


def region_bytes(free: int, models: int) -> int:
    """Of each model process's region, where that much shared memory is free. Docker gives a container 64 MiB."""
    pages = int(REGIONS_SHARE * free) // models // mmap.PAGESIZE
    return min(max(pages * mmap.PAGESIZE, LEAST_REGION_BYTES), REGION_BYTES)


def check_ports(ports: Ports) -> None:
    for name, port in (("HTTP", ports.http), ("GRPC", ports.grpc), ("METRICS", ports.metrics)):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError as exc:
                raise StartFailed(
                    f"port {port} is taken: stop what listens there (`ss -ltnp 'sport = :{port}'` shows it) "
                    f"or set GLIMPSE_TRITON_{name}_PORT"
                ) from exc


@dataclass(frozen=True, slots=True)
class ModelProcess:
    """The stub of one instance of a python model, and the shared memory through which Triton talks to it."""

    model: str
    pid: int
    region: Path


class EmbeddedTriton:
    """One Triton server and its model processes, from start to stop.

    `async with` returns when every model has really inferred; `supervise` is then to run beside the requests.
    """

    def __init__(
        self,
        repository: Path,
        *,
        client: Client,
        card: ModelCard,
        log_path: Path,
        ports: Ports = Ports(),
        start_timeout_s: float = 60.0,
        canary_interval_s: float = 10.0,
        canary_timeout_s: float = 15.0,
    ) -> None:
        """Two canaries in a row that get no answer in `canary_timeout_s` mean a hang, and a restart of the server."""
        self.repository = repository.resolve()
        self.ports = ports
        self.log_path = log_path
        self.ready = False  # False while the server or a model is being brought back
        self._client = client
        self._card = card
        self._start_timeout_s = start_timeout_s
        self._canary_interval_s = canary_interval_s
        self._canary_timeout_s = canary_timeout_s
        self._hangs = False
        self._shared_memory_prefix = f"glimpse-{os.getpid()}-{ports.grpc}-"
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None
        self._installation: Installation | None = None
        self._models: list[ModelProcess] = []

    async def __aenter__(self) -> EmbeddedTriton:
        self._installation = check(self.repository, self.ports)
        self._folder = Path(tempfile.mkdtemp(prefix="glimpse-triton-"))
        try:
            self._installation.link_backend(self._folder)
            await self._start_at_last()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def model_pids(self) -> Mapping[str, int]:
        """A process of each python model."""
        return {process.model: process.pid for process in self._models}

    async def supervise(self) -> None:
        """Brings back a model whose process died, the whole server where that does not help. Runs until cancelled."""
        async with asyncio.TaskGroup() as watch:
            watch.create_task(self._watch_processes())
            watch.create_task(self._watch_answers())

    async def _watch_processes(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL_S)
            if self._exit_status() is not None:
                log.error("triton died", status=self._exit_status())
                await self._restart()
            elif dead := [process for process in self._models if not _is_alive(process.pid)]:
                await self._bring_back(dead)
            elif self._hangs:
                log.error("triton hangs")
                await self._restart()

    async def _watch_answers(self) -> None:
        """The canary: a process can live and answer nothing. Acting is left to `_watch_processes`."""
        failures = 0
        while True:
            await asyncio.sleep(self._canary_interval_s)
            try:
                await self._probe_all(self._canary_timeout_s, fresh_s=self._canary_interval_s)
            except GlimpseError as exc:
                failures = failures + 1 if self.ready else 0  # else the other watch is at work already
                log.warning("canary failed", error=exc.message, failures=failures)
            else:
                failures = 0
            self._hangs = failures >= 2

    async def _bring_back(self, dead: list[ModelProcess]) -> None:
        started = time.monotonic()
        self.ready = False
        models = sorted({process.model for process in dead})
        log.error("model process died", models=models)
        try:
            async with asyncio.timeout(RELOAD_TIMEOUT_S):
                await asyncio.gather(*(self._reload(model) for model in models))
                await self._probe_all(RELOAD_TIMEOUT_S)
        except (GlimpseError, TimeoutError) as exc:
            log.warning("reload failed, restarting triton", models=models, error=str(exc))
            await self._restart()
        else:
            for process in dead:  # Triton would keep it: the dead instance still counts requests in flight
                process.region.unlink(missing_ok=True)
            self._note_processes()
            log.warning("model is back", models=models, after_s=round(time.monotonic() - started, 2))

    async def _reload(self, model: str) -> None:
        """A plain load of a model that Triton believes to be loaded does nothing: unload it first."""
        self._client.abandon(model)
        await self._client.unload(model, RELOAD_TIMEOUT_S)
        self._client.abandon(model)  # what came in between
        await self._client.load(model, RELOAD_TIMEOUT_S)

    async def _restart(self) -> None:
        """Starts the server anew until it stands."""
        self._hangs = False
        attempt = 0
        started = time.monotonic()
        while True:
            self.ready = False
            for model in self.model_pids:
                self._client.abandon(model)
            self._end_processes()
            await asyncio.sleep(RESTART_PAUSE_S[min(attempt, len(RESTART_PAUSE_S) - 1)])
            attempt += 1
            try:
                await self._start()
            except StartFailed as exc:
                log.warning("triton did not restart", attempt=attempt, error=str(exc))
            else:
                log.warning("triton is back", after_s=round(time.monotonic() - started, 2))
                return

    async def _start_at_last(self) -> None:
        """Raises StartFailed; a crash only once it has happened START_ATTEMPTS times."""
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                await self._start()
            except Crashed as exc:
                if attempt == START_ATTEMPTS:
                    raise
                log.warning("triton crashed while starting", attempt=attempt, error=str(exc))
                self._end_processes()
            else:
                return

    async def _start(self) -> None:
        """Raises StartFailed with Triton's last words."""
        if self._installation is None or self._folder is None:
            raise RuntimeError("enter the context first")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".previous.log"))
        command = [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid()), *self._command()]
        with self.log_path.open("ab") as output:
            log_start = output.tell()
            # In the loop's own thread, which the death signal is bound to; a fork takes a millisecond.
            self._process = subprocess.Popen(  # noqa: ASYNC220
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._installation.environment(),
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not await self._client.ready():
                    if (status := self._exit_status()) is not None:
                        kind = Crashed if status < 0 else StartFailed
                        raise kind(f"Triton ended while starting, {self._last_words(log_start)}")
                    await asyncio.sleep(0.05)
                await self._probe_all(self._start_timeout_s)
        except TimeoutError as exc:
            raise StartFailed(
                f"Triton was not ready within {self._start_timeout_s:g} s, {self._last_words(log_start)}"
            ) from exc
        except GlimpseError as exc:
            raise StartFailed(f"{exc.message}, {self._last_words(log_start)}") from exc
        self._note_processes()

    def _command(self) -> list[str]:
        if self._installation is None:
            raise RuntimeError("enter the context first")
        models = len(list(self.repository.glob("*/config.pbtxt")))
        region = region_bytes(shutil.disk_usage(SHARED_MEMORY).free, models)
        return [
            str(self._installation.server),
            f"--model-repository={self.repository}",
            f"--backend-directory={self._folder}",
            "--disable-auto-complete-config",
            "--model-control-mode=explicit",
            "--load-model=*",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory_prefix}",
            f"--backend-config=python,shm-default-byte-size={region}",
            "--http-address=127.0.0.1",
            f"--http-port={self.ports.http}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.ports.grpc}",
            "--metrics-address=127.0.0.1",
            f"--metrics-port={self.ports.metrics}",
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S}",
        ]

    async def _probe_all(self, timeout_s: float, fresh_s: float = 0.0) -> None:
        for model in (*self._card.called, "vqa"):  # between them they infer every model
            await self._client.probe(model, self._card, timeout_s, fresh_s)

    def _note_processes(self) -> None:
        """Every model process is up: remember which is whose."""
        self._models = []
        for pid in self._group():
            program, *arguments = _arguments(pid)
            if program.endswith("triton_python_backend_stub"):  # its arguments: MODEL/1/model.py, the region, ...
                script, region, *_ = arguments
                self._models.append(ModelProcess(Path(script).parent.parent.name, pid, SHARED_MEMORY / region))
        self.ready = True

    def _exit_status(self) -> int | None:
        return self._process.poll() if self._process else None

    def _last_words(self, log_start: int) -> str:
        with self.log_path.open("rb") as output:
            output.seek(log_start)
            lines = output.read().decode(errors="replace").splitlines()
        # Tables and what follows a failure say little, and two errors come on every machine without a GPU.
        errors = [line for line in lines if line.startswith(("E", "error:")) and "cuda" not in line.lower()]
        words = "\n  ".join((errors or lines)[-12:])
        return f"see {self.log_path}; its last errors:\n  {words}"

    async def _stop(self) -> None:
        """SIGTERM, the time Triton needs, then SIGKILL for whoever is left, and the shared memory goes."""
        self.ready = False
        try:
            if self._process and self._exit_status() is None:
                self._process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + EXIT_TIMEOUT_S + 2
                while self._exit_status() is None and time.monotonic() < deadline:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        finally:
            self._end_processes()
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _end_processes(self) -> None:
        """Kills whoever is left of the server and its models, and frees their shared memory."""
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._models = []
        for region in SHARED_MEMORY.glob(f"{self._shared_memory_prefix}*"):
            region.unlink(missing_ok=True)

    def _group(self) -> Iterable[int]:
        """The living processes of the server's group."""
        for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            status = _status(pid)
            if self._process and status and status.group == self._process.pid and status.state not in DEAD:
                yield pid


@dataclass(frozen=True, slots=True)
class _Status:
    state: str
    group: int


def _status(pid: int) -> _Status | None:
    """Of /proc/PID/stat; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return _Status(state=fields[0], group=int(fields[2]))


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def _is_alive(pid: int) -> bool:
    status = _status(pid)
    return status is not None and status.state not in DEAD
