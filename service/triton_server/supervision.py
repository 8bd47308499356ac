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
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import structlog

from service.core.card import ModelCard
from service.core.errors import GlimpseError
from service.triton_server.installation import Installation, Ports, StartFailed, check
from service.triton_server.processes import SHARED_MEMORY, ModelProcess, ServerProcess, region_bytes

WATCH_INTERVAL_S = 0.2
RELOAD_TIMEOUT_S = 5.0  # then the whole server is restarted: the service is to answer again within 10 s
EXIT_TIMEOUT_S = 8  # what Triton takes at most to end requests and models when it is told to stop
START_ATTEMPTS = 3
LOG_BYTES = 10_000_000  # a longer log is put aside at the next start
RESTART_PAUSE_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before each restart in a row, the last one from then on

log = structlog.get_logger()


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
        ports: Ports,
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
        self._server = ServerProcess(shared_memory_prefix=f"glimpse-{os.getpid()}-{ports.grpc}-")
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
        return self._server.pid

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
            if self._server.exit_status is not None:
                log.error("triton died", status=self._server.exit_status)
                await self._restart()
            elif dead := [process for process in self._models if not process.is_alive]:
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
            self._kill()
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
                self._kill()
            else:
                return

    async def _start(self) -> None:
        """Raises StartFailed with Triton's last words."""
        if self._installation is None or self._folder is None:
            raise RuntimeError("enter the context first")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".previous.log"))
        with self.log_path.open("ab") as output:
            log_start = output.tell()
            # In the loop's own thread, which lives as long as the service; a fork takes a millisecond.
            self._server.start(self._command(), self._installation.environment(), output)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not await self._client.ready():
                    if (status := self._server.exit_status) is not None:
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
            f"--backend-config=python,shm-region-prefix-name={self._server.shared_memory_prefix}",
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
        """Every model process is up: remember which process is which model's."""
        self._models = self._server.models()
        self.ready = True

    def _last_words(self, log_start: int) -> str:
        with self.log_path.open("rb") as output:
            output.seek(log_start)
            lines = output.read().decode(errors="replace").splitlines()
        # Tables and what follows a failure say little, and two errors come on every machine without a GPU.
        errors = [line for line in lines if line.startswith(("E", "error:")) and "cuda" not in line.lower()]
        words = "\n  ".join((errors or lines)[-12:])
        return f"see {self.log_path}; its last errors:\n  {words}"

    async def _stop(self) -> None:
        """Triton gets the time it needs to end by itself. No process and no shared memory is left."""
        self.ready = False
        try:
            await self._server.stop(EXIT_TIMEOUT_S + 2)
        finally:
            self._models = []
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        self._server.kill()
        self._models = []
