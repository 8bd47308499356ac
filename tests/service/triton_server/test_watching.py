"""The supervisor takes nothing for a death that is none, and survives its own errors; without a Triton."""

from __future__ import annotations

import asyncio
import math
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.core.card import ModelCard
from service.core.errors import Unavailable
from service.triton_server.access import Access
from service.triton_server.processes import ModelProcess
from service.triton_server.supervision import EmbeddedTriton
from tests.support.fakes import CARD, until

TIMEOUT_S = 0.5


class Probed:
    """A client whose probes end as a test says."""

    def __init__(self, probe: Callable[[int], Awaitable[None]]) -> None:
        self.probes = 0
        self._probe = probe

    async def ready(self) -> bool:
        return True

    async def probe(self, model: str, card: ModelCard, timeout_s: float, fresh_s: float = 0.0) -> None:
        self.probes += 1
        await self._probe(self.probes)

    async def load(self, model: str, timeout_s: float) -> None: ...
    async def unload(self, model: str, timeout_s: float) -> None: ...
    def abandon(self, lost: str) -> None: ...

    def unhealthy(self) -> set[str]:
        return set()


@asynccontextmanager
async def supervised(client: Probed, folder: Path) -> AsyncIterator[EmbeddedTriton]:
    triton = EmbeddedTriton(
        folder,
        client=client,
        card=CARD,
        log_path=folder / "triton.log",
        access=Access.choose(),
        canary_interval_s=0.01,
        canary_timeout_s=TIMEOUT_S,
    )
    triton.ready = True
    supervisor = asyncio.create_task(triton.supervise())
    try:
        yield triton
        assert not supervisor.done()
    finally:
        supervisor.cancel()
        with suppress(asyncio.CancelledError):
            await supervisor


async def silent(_: int) -> None:
    await asyncio.sleep(TIMEOUT_S)
    raise Unavailable("no answer")


async def refused(_: int) -> None:
    raise Unavailable("no connection")


def standing_still(share: float) -> Callable[[int], Awaitable[None]]:
    """A probe without an answer, during which this process's loop stands still for a share of the time."""

    async def probe(_: int) -> None:
        end = time.monotonic() + TIMEOUT_S
        while time.monotonic() < end - (1 - share) * TIMEOUT_S:  # as a parser does that keeps the interpreter
            pass
        await asyncio.sleep((1 - share) * TIMEOUT_S)
        raise Unavailable("no answer")

    return probe


async def test_a_time_in_which_the_loop_stood_still_is_no_evidence(tmp_path: Path) -> None:
    client = Probed(standing_still(1.0))
    async with supervised(client, tmp_path) as triton:
        with capture_logs() as lines:
            await until(lambda: client.probes >= 5, 10)
        assert triton.ready
        assert any(line["event"] == "canary_failed_while_stalled" for line in lines)


async def test_silence_and_refusals_are_evidence(tmp_path: Path) -> None:
    for probe in (silent, refused):
        async with supervised(Probed(probe), tmp_path) as triton:
            await until(lambda triton=triton: not triton.ready, 10)


async def test_an_error_of_the_supervisors_own_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    async def broken(number: int) -> None:
        if number < 20:
            raise OSError(24, "Too many open files")

    client = Probed(broken)
    with capture_logs() as lines:
        async with supervised(client, tmp_path) as triton:
            await until(lambda: client.probes > 30)
            assert triton.ready
    assert [line["event"] for line in lines].count("watch_failed") == 1


async def test_a_model_that_is_back_is_loaded_once_though_its_process_cannot_be_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    class Loading(Probed):
        async def load(self, model: str, timeout_s: float) -> None:
            loaded.append(model)

    def unlisted() -> list[ModelProcess]:
        raise BlockingIOError(11, "a process tells only part of its command line")

    dead = subprocess.Popen(["true"])  # noqa: ASYNC220
    dead.wait()
    async with supervised(Loading(lambda _: asyncio.sleep(0)), tmp_path) as triton:
        monkeypatch.setattr(triton._server, "models", unlisted)
        with capture_logs() as lines:
            triton._watch([ModelProcess("llm", dead.pid, tmp_path / "llm")])
            await until(lambda: sum(line["event"] == "model_processes_not_listed" for line in lines) > 2)
    assert loaded == ["llm"]


async def test_a_region_that_cannot_be_closed_now_does_not_end_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Starting(Probed):
        turns = 3

        async def ready(self) -> bool:
            self.turns -= 1
            return self.turns == 0

    def failing() -> None:
        raise OSError(24, "Too many open files")

    client = Starting(lambda _: asyncio.sleep(0))
    triton = EmbeddedTriton(tmp_path, client=client, card=CARD, log_path=None, access=Access.choose())
    monkeypatch.setattr(triton._server, "close_regions", failing)
    await triton._come_up()
    assert client.probes


class Reporting(Probed):
    """A client whose requests find once that a model's process does not report."""

    def __init__(self, *models: str) -> None:
        super().__init__(lambda _: asyncio.sleep(0))
        self.told = [set(models)]

    def unhealthy(self) -> set[str]:
        return self.told.pop() if self.told else set()


async def test_a_process_that_stands_still_is_killed_though_no_request_tells_of_it(tmp_path: Path) -> None:
    """As where other processes than the supervisor's ask."""
    stopped, runs = (subprocess.Popen(["sleep", "100"], start_new_session=True) for _ in range(2))  # noqa: ASYNC220
    try:
        stopped.send_signal(signal.SIGSTOP)
        async with supervised(Reporting(), tmp_path) as triton:
            triton._server._process = stopped  # the group's leader, in place of tritonserver
            triton._watch(
                [ModelProcess(name, each.pid, tmp_path / name) for name, each in (("llm", stopped), ("qformer", runs))]
            )
            await until(lambda: stopped.poll() is not None, 5)
        assert stopped.returncode == -signal.SIGKILL
        assert runs.poll() is None
    finally:
        for process in (stopped, runs):
            process.kill()
            process.wait()


async def test_a_process_that_stands_still_for_a_moment_goes_on(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)  # noqa: ASYNC220
    triton = EmbeddedTriton(
        tmp_path, client=Reporting(), card=CARD, log_path=tmp_path / "triton.log", access=Access.choose()
    )
    triton._watch([ModelProcess("llm", process.pid, tmp_path / "llm")])

    def look() -> set[str]:
        triton._looked_at = -math.inf
        return triton._stopped()

    async def send(number: signal.Signals) -> None:
        """The kernel tells of a stop a moment after the signal."""
        process.send_signal(number)
        stops = number == signal.SIGSTOP
        state = f"/proc/{process.pid}/stat"
        await until(lambda: (Path(state).read_text().rpartition(")")[2].split()[0] == "T") == stops, 5)

    try:
        for _ in range(2):
            await send(signal.SIGSTOP)
            assert look() == set()
            await send(signal.SIGCONT)
            assert look() == set()
        await send(signal.SIGSTOP)
        assert [look(), look()] == [set(), {"llm"}]
        assert triton._stopped() == set()  # it looks only now and then
    finally:
        process.kill()
        process.wait()


async def test_a_process_that_does_not_report_is_killed_before_it_can_continue(tmp_path: Path) -> None:
    stopped = subprocess.Popen(["sleep", "100"], start_new_session=True)  # noqa: ASYNC220
    try:
        stopped.send_signal(signal.SIGSTOP)
        async with supervised(Reporting("llm", "unknown"), tmp_path) as triton:
            triton._server._process = stopped  # the group's leader, in place of tritonserver
            triton._watch([ModelProcess("llm", stopped.pid, tmp_path / "llm")])
            await until(lambda: stopped.poll() is not None, 5)
        assert stopped.returncode == -signal.SIGKILL
    finally:
        stopped.kill()
        stopped.wait()
