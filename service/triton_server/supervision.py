"""Start and watch the Triton that the nvidia-pytriton wheel bundles: no Docker, no GPU.

This package does three things that Triton 2.51 does not do. `installation` checks everything before the start. If a
model's process dies, the model is loaded again, although Triton still reports it as ready. After the server ends, for
whatever reason, no process and no shared memory is left.

Why model processes die under load: Triton's python backend counts a process as dead if it has not reported for a
second, for example because a busy machine gave it no core. It then frees the request's shared memory. When the process
continues, it writes to that memory, and it or Triton ends with a segmentation fault or `lock_exception`, at once or
seconds later. SIGSTOP for 2.5 s under load reproduces this. So a process that Triton counts as dead is killed before it
can continue.

Only an exit code or a process that is not there is a death. A question that the system could not answer (no file
descriptor left, no memory) says nothing of Triton, and neither does a time in which this process's own loop stood
still. No error of the supervisor's own ends it: it is logged once, and the watch goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from service.core.card import ModelCard
from service.core.errors import GlimpseError
from service.core.precision import VARIABLE
from service.system.watch import Watch
from service.triton_server.access import SHARED_MEMORY, Access, parents
from service.triton_server.installation import Installation, StartFailed, check
from service.triton_server.leftovers import claim, clean_up
from service.triton_server.processes import Exits, ModelProcess, Proc, ServerProcess, Stops, region_bytes
from service.triton_server.triton_log import TritonLog

WATCH_INTERVAL_S = 0.2
REGIONS_INTERVAL_S = 1.0  # between two looks for regions of shared memory that other users can read
STOPPED_INTERVAL_S = 0.4  # between two looks for stopped processes; Triton gives a process up after a second
RELOAD_TIMEOUT_S = 5.0  # then the whole server is restarted: the target is to answer again within 10 s
EXIT_TIMEOUT_S = 8  # for Triton to end its requests and models after SIGTERM, unless the caller gives more
START_ATTEMPTS = 3
RESTART_PAUSE_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # before consecutive restarts; the last one repeats

log = structlog.get_logger()


class Crashed(StartFailed):
    """A signal ended Triton while it was starting, or stopped a model's process. The next start may succeed.

    On a busy machine Triton's python backend sometimes aborts in `boost::interprocess::lock_exception`.
    """


class Client(Protocol):
    """The part of service.triton.TritonClient that is used here."""

    async def ready(self) -> bool: ...
    async def probe(self, model: str, card: ModelCard, timeout_s: float, fresh_s: float = 0.0) -> None: ...
    async def load(self, model: str, timeout_s: float) -> None: ...
    async def unload(self, model: str, timeout_s: float) -> None: ...
    def abandon(self, lost: str) -> None: ...
    def unhealthy(self) -> set[str]: ...


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
        log_path: Path | None,
        access: Access,
        called: Sequence[str] | None = None,
        precision: str = "fp32",
        start_timeout_s: float = 60.0,
        exit_timeout_s: int = EXIT_TIMEOUT_S,
        canary_interval_s: float = 10.0,
        canary_timeout_s: float = 15.0,
        proc: Proc | None = None,
    ) -> None:
        """`called` are the models to load, with what they need; None loads all of the repository. They compute in
        `precision`.

        Without a `log_path` Triton's log goes to stderr. Two consecutive canaries without an answer in
        `canary_timeout_s` count as a hang: the server is restarted."""
        self.repository = repository.resolve()
        self.access = access
        self.ready = False  # False while the server or a model is being brought back
        self._log = TritonLog(log_path)
        self._client = client
        self._card = card
        self._called = called
        self._precision = precision
        self._start_timeout_s = start_timeout_s
        self._exit_timeout_s = exit_timeout_s
        self._canary_interval_s = canary_interval_s
        self._canary_timeout_s = canary_timeout_s
        self._hangs = False
        self._proc = proc or Proc()
        self._server = ServerProcess(access.region_prefix, self._proc)
        self._claim: int | None = None  # of the folder, while this is entered
        self._installation: Installation | None = None
        self._names: list[str] = []  # of the repository's models
        self._models: list[ModelProcess] = []
        self._exits, self._stops = Exits(), Stops()  # of the model processes
        self._noted = True  # False if the model processes could not be asked for: they will be
        self._looked_at = -math.inf  # for processes that stand still
        self._standing: set[int] = set()  # their ids, at the last look
        self._stalls = Stalls()
        self._unknown = ""  # why a process could not be asked about at the last look

    async def __aenter__(self) -> EmbeddedTriton:
        await clean_up(parents(), self._proc)
        self._installation = await asyncio.to_thread(check, self.repository, self.access.ports)
        self._names = [path.parent.name for path in self.repository.glob("*/config.pbtxt")]
        self._claim = claim(self.access.folder)
        try:
            self._installation.link_backend(self.access.folder)
            await self._start_despite_crashes()
        except OSError as exc:
            await self._stop()
            raise StartFailed(f"nothing can be written in {self.access.folder.parent} ({exc.strerror})") from exc
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
        closed_at, watch = -REGIONS_INTERVAL_S, Watch("processes")
        while True:
            await self._stalls.sleep(WATCH_INTERVAL_S)
            if time.monotonic() - closed_at >= REGIONS_INTERVAL_S:
                closed_at = time.monotonic()
                with contextlib.suppress(OSError):  # tried again
                    self._server.close_regions()  # Triton starts a model's process again by itself, with a new region
            with watch.surviving():
                if self._server.exit_status is not None:
                    self._lose(self._names)
                    log.error("triton_died", status=self._server.exit_status)
                    await self._restart()
                elif dead := self._dead():
                    await self._bring_back(dead)
                elif unhealthy := self._client.unhealthy() | self._stopped():
                    self._end(unhealthy)
                elif self._hangs:
                    log.error("triton_hangs")
                    await self._restart()
                elif not self._noted:
                    self._note_processes()

    async def _watch_answers(self) -> None:
        """Probe all models: a process can live without answering. `_watch_processes` acts on the result."""
        failures, watch = 0, Watch("answers")
        while True:
            await asyncio.sleep(self._canary_interval_s)
            with watch.surviving():
                failures = await self._canary(failures)
                self._hangs = failures >= 2

    async def _canary(self, failures: int) -> int:
        """Probe all models -> the consecutive failures so far."""
        started, stalled_s = time.monotonic(), self._stalls.total_s
        try:
            await self._probe_all(self._canary_timeout_s, fresh_s=self._canary_interval_s)
        except GlimpseError as exc:
            took_s = time.monotonic() - started
            await self._stalls.noticed()
            stalled_s = self._stalls.total_s - stalled_s
            if stalled_s and took_s - stalled_s < self._canary_timeout_s / 2:
                log.warning("canary_failed_while_stalled", stalled_s=round(stalled_s, 2))
                return failures
            failures = failures + 1 if self.ready else 0  # otherwise the other watch is already at work
            log.warning("canary_failed", error=exc.message, failures=failures)
            return failures
        return 0

    def _dead(self) -> list[ModelProcess]:
        """The model processes that have ended. One that cannot be asked about is taken for alive."""
        dead, unknown, suspects = [], "", self._exits.suspects()
        for process in self._models:
            if process.pid not in suspects:
                continue
            try:
                if self._server.has_lost(process):
                    dead.append(process)
            except OSError as exc:
                unknown = str(exc)
        if unknown and unknown != self._unknown:
            log.warning("model_processes_unknown", error=unknown)
        self._unknown = unknown
        return dead

    def _stopped(self) -> set[str]:
        """Return the models whose process stands still, at this look and the one before.

        A client's requests tell of such a process too, but only of a server that this client asks.
        """
        now = time.monotonic()
        if now - self._looked_at < STOPPED_INTERVAL_S:
            return set()
        before, self._standing, self._looked_at = self._standing, self._stops.stopped(), now
        return {each.model for each in self._models if each.pid in before & self._standing}

    def _end(self, unhealthy: Iterable[str]) -> None:
        """End processes that Triton counts as dead or soon will, before they go on and write to memory that it frees.

        Raises OSError if they cannot be asked about. The next look finds them dead.
        """
        for process in self._models:
            if process.model in unhealthy:
                log.error("model_process_not_reporting", model=process.model, pid=process.pid)
                self._server.end_model(process)

    async def _bring_back(self, dead: list[ModelProcess]) -> None:
        started = time.monotonic()
        models = sorted({process.model for process in dead})
        self._lose(models)
        log.error("model_process_died", models=models)
        try:
            async with asyncio.timeout(RELOAD_TIMEOUT_S):
                await asyncio.gather(*(self._reload(model) for model in models))
                await self._probe_all(RELOAD_TIMEOUT_S)
        except (GlimpseError, TimeoutError) as exc:
            log.warning("reload_failed", models=models, error=str(exc))
            await self._restart()
        else:
            self._watch([process for process in self._models if process not in dead])  # even if none can be listed
            for process in dead:  # Triton keeps it, because the dead instance still counts requests in flight
                with contextlib.suppress(OSError):
                    process.region.unlink(missing_ok=True)
            self._note_processes()
            log.warning("model_back", models=models, after_s=round(time.monotonic() - started, 2))

    def _lose(self, models: Iterable[str]) -> None:
        """End the requests that need these models; from now on the service is not ready."""
        self.ready = False
        for model in models:
            self._client.abandon(model)

    async def _reload(self, model: str) -> None:
        """Unload first: Triton ignores a load of a model that it believes to be loaded."""
        await self._client.unload(model, RELOAD_TIMEOUT_S)
        self._client.abandon(model)  # requests that came in between
        await self._client.load(model, RELOAD_TIMEOUT_S)

    async def _restart(self) -> None:
        """Restart the server, again and again until a start succeeds."""
        self._hangs = False
        attempt = 0
        started = time.monotonic()
        while True:
            self._lose(self._names)
            await self._kill()
            await asyncio.sleep(RESTART_PAUSE_S[min(attempt, len(RESTART_PAUSE_S) - 1)])
            attempt += 1
            try:
                await self._start()
            except StartFailed as exc:
                log.warning("triton_not_restarted", attempt=attempt, error=str(exc))
            except Exception:  # of our own: a server that is half started must not stay
                log.exception("triton_not_restarted", attempt=attempt)
            else:
                log.warning("triton_back", after_s=round(time.monotonic() - started, 2))
                return

    async def _start_despite_crashes(self) -> None:
        """Start, again after a crash up to START_ATTEMPTS times. Raises StartFailed."""
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                await self._start()
            except Crashed as exc:
                if attempt == START_ATTEMPTS:
                    raise
                log.warning("triton_crashed_at_start", attempt=attempt, error=str(exc))
                await self._kill()
            else:
                return

    async def _start(self) -> None:
        """Start once. Raises StartFailed with the end of Triton's log."""
        if self._installation is None:
            raise RuntimeError("enter the context first")
        try:
            with self._log.opened() as output:
                # In the loop's own thread, which lives as long as the service; a fork takes a millisecond.
                environment = {**self._installation.environment(), VARIABLE: self._precision}
                self._server.start(self._command(), environment, output)
        except OSError as exc:
            raise StartFailed(f"Triton cannot be started ({exc})") from exc
        coming_up = asyncio.ensure_future(self._come_up())
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not coming_up.done():
                    await asyncio.wait([coming_up], timeout=WATCH_INTERVAL_S)
                    self._check_start()
                await coming_up
        except TimeoutError as exc:
            raise StartFailed(
                f"Triton was not ready within {self._start_timeout_s:g} s, {self._log.last_words()}"
            ) from exc
        except GlimpseError as exc:
            raise StartFailed(f"{exc.message}, {self._log.last_words()}") from exc
        finally:
            coming_up.cancel()
            await asyncio.gather(coming_up, return_exceptions=True)
        self._note_processes()

    async def _come_up(self) -> None:
        """Return when every model has answered."""
        while not await self._client.ready():
            with contextlib.suppress(OSError):  # tried again
                self._server.close_regions()
            await asyncio.sleep(0.05)
        await self._probe_all(self._start_timeout_s)

    def _check_start(self) -> None:
        """Raises Crashed or StartFailed if Triton has ended, Crashed if a model's process stands still.

        Triton waits for a process that stands still, and so does a probe.
        """
        if (status := self._server.exit_status) is not None:
            kind = Crashed if status < 0 else StartFailed
            raise kind(f"Triton ended while starting, {self._log.last_words()}")
        with contextlib.suppress(OSError):  # asked again
            self._watch(self._server.models())
        if stopped := self._stopped():
            raise Crashed(
                f"while Triton started, something stopped the processes of these models by SIGSTOP: "
                f"{', '.join(sorted(stopped))}. Start the service again"
            )

    def _command(self) -> list[str]:
        if self._installation is None:
            raise RuntimeError("enter the context first")
        region = region_bytes(shutil.disk_usage(SHARED_MEMORY).free, len(self._names))
        return [
            str(self._installation.server),
            f"--model-repository={self.repository}",
            f"--backend-directory={self.access.folder}",
            "--disable-auto-complete-config",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in self._called or ["*"]),
            f"--backend-config=python,shm-region-prefix-name={self._server.shared_memory_prefix}",
            f"--backend-config=python,shm-default-byte-size={region}",
            *self.access.options(),
            "--allow-gpu-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            f"--exit-timeout-secs={self._exit_timeout_s}",
        ]

    async def _probe_all(self, timeout_s: float, fresh_s: float = 0.0) -> None:
        for model in self._called or (*self._card.called, "vqa"):  # together they infer every model
            await self._client.probe(model, self._card, timeout_s, fresh_s)

    def _note_processes(self) -> None:
        """Remember the process of each model and close its memory to other users, now that all are up."""
        self.ready = True
        self._client.unhealthy()  # said of processes that are gone
        try:
            self._server.close_regions()
            self._watch(self._server.models())
        except OSError as exc:
            log.warning("model_processes_not_listed", error=str(exc))
            self._noted = False
        else:
            self._noted = True

    def _watch(self, processes: list[ModelProcess]) -> None:
        self._exits.close()
        self._stops.close()
        pids = [process.pid for process in processes]
        self._models, self._exits, self._stops = processes, Exits(pids), Stops(pids)

    async def _stop(self) -> None:
        """Give Triton time to end by itself, then kill it. Leave no process and no shared memory."""
        self.ready = False
        try:
            await self._server.stop(self._exit_timeout_s + 2)
        finally:
            self._watch([])
            if self._claim is not None:
                shutil.rmtree(self.access.folder, ignore_errors=True)
                os.close(self._claim)
                self._claim = None

    async def _kill(self) -> None:
        await self._server.kill()
        self._watch([])


class Stalls:
    """How long this process's event loop has stood still, in all, while it slept here."""

    def __init__(self) -> None:
        self.total_s = 0.0

    async def sleep(self, interval_s: float) -> None:
        """Sleep, and count how late this ends."""
        slept = time.monotonic()
        await asyncio.sleep(interval_s)
        late_s = time.monotonic() - slept - interval_s
        if late_s > interval_s:
            self.total_s += late_s

    async def noticed(self) -> None:
        """Return when a stall that has just ended is in `total_s`."""
        await asyncio.sleep(WATCH_INTERVAL_S / 10)
