"""Start and watch the Triton that the nvidia-pytriton wheel bundles: no Docker, no GPU.

This package does three things that Triton 2.51 does not do. `installation` checks everything before the start. If a
model's process dies, the model is loaded again, although Triton still reports it as ready. After the server ends, for
whatever reason, no process and no shared memory is left.

Why model processes die under load: Triton's python backend counts a process as dead if it has not reported for a
second, for example because a busy machine gave it no core. It then frees the request's shared memory. When the process
continues, it writes to that memory, and it or Triton ends with a segmentation fault or `lock_exception`. SIGSTOP for
2.5 s under load reproduces this.
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
RELOAD_TIMEOUT_S = 5.0  # then the whole server is restarted: the target is to answer again within 10 s
EXIT_TIMEOUT_S = 8  # for Triton to end its requests and models after SIGTERM
START_ATTEMPTS = 3
LOG_BYTES = 10_000_000  # a longer log is renamed at the next start
RESTART_PAUSE_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before consecutive restarts; the last one repeats

log = structlog.get_logger()


class Crashed(StartFailed):
    """A signal ended Triton while it was starting.

    On a busy machine its python backend sometimes aborts in `boost::interprocess::lock_exception`. The next start
    succeeds.
    """


class Client(Protocol):
    """The part of service.triton.TritonClient that is used here."""

    async def ready(self) -> bool: ...
    async def probe(self, model: str, card: ModelCard, timeout_s: float, fresh_s: float = 0.0) -> None: ...
    async def load(self, model: str, timeout_s: float) -> None: ...
    async def unload(self, model: str, timeout_s: float) -> None: ...
    def abandon(self, lost: str) -> None: ...


class EmbeddedTriton:
    """Run one Triton server and its model processes, from start to stop.

    Entering the context waits until every model has answered an inference. From then on `supervise` must run.
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
        """Two consecutive canaries without an answer in `canary_timeout_s` count as a hang: the server is restarted."""
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
            await self._start_despite_crashes()
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
        """Return one process id of each python model."""
        return {process.model: process.pid for process in self._models}

    async def supervise(self) -> None:
        """Reload a model whose process died; restart the server if that does not help. Runs until cancelled."""
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
        """Probe all models: a process can live without answering. `_watch_processes` acts on the result."""
        failures = 0
        while True:
            await asyncio.sleep(self._canary_interval_s)
            try:
                await self._probe_all(self._canary_timeout_s, fresh_s=self._canary_interval_s)
            except GlimpseError as exc:
                failures = failures + 1 if self.ready else 0  # otherwise the other watch is already at work
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
            for process in dead:  # Triton keeps it, because the dead instance still counts requests in flight
                process.region.unlink(missing_ok=True)
            self._note_processes()
            log.warning("model is back", models=models, after_s=round(time.monotonic() - started, 2))

    async def _reload(self, model: str) -> None:
        """Unload first: Triton ignores a load of a model that it believes to be loaded."""
        self._client.abandon(model)
        await self._client.unload(model, RELOAD_TIMEOUT_S)
        self._client.abandon(model)  # requests that came in between
        await self._client.load(model, RELOAD_TIMEOUT_S)

    async def _restart(self) -> None:
        """Restart the server, again and again until a start succeeds."""
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

    async def _start_despite_crashes(self) -> None:
        """Start, again after a crash up to START_ATTEMPTS times. Raises StartFailed."""
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
        """Start once. Raises StartFailed with the end of Triton's log."""
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
        for model in (*self._card.called, "vqa"):  # together they infer every model
            await self._client.probe(model, self._card, timeout_s, fresh_s)

    def _note_processes(self) -> None:
        """Remember the process of each model, now that all are up."""
        self._models = self._server.models()
        self.ready = True

    def _last_words(self, log_start: int) -> str:
        with self.log_path.open("rb") as output:
            output.seek(log_start)
            lines = output.read().decode(errors="replace").splitlines()
        # Tables say little, and two errors about CUDA come on every machine without a GPU.
        errors = [line for line in lines if line.startswith(("E", "error:")) and "cuda" not in line.lower()]
        words = "\n  ".join((errors or lines)[-12:])
        return f"see {self.log_path}; its last errors:\n  {words}"

    async def _stop(self) -> None:
        """Give Triton time to end by itself, then kill it. Leave no process and no shared memory."""
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
