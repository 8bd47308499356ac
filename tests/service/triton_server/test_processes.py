"""The processes of the embedded Triton, and the shared memory between them."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from service.triton_server import processes
from service.triton_server.access import SHARED_MEMORY
from service.triton_server.processes import Exits, ModelProcess, Proc, ServerProcess, Stops, region_bytes
from tests.support.servers import eventually


def test_regions_take_a_quarter_of_the_shared_memory_at_most() -> None:
    assert region_bytes(free=8 << 30, models=12) == 32 << 20
    assert region_bytes(free=512 << 20, models=16) == 8 << 20
    assert region_bytes(free=16 << 20, models=12) == 1 << 20  # Triton's own, which grows


class Failing(Proc):
    """Cannot be asked, for this reason."""

    def __init__(self, code: int) -> None:
        self.code = code

    def read(self, pid: int, name: str) -> str:
        raise OSError(self.code, os.strerror(self.code))


class Telling(Proc):
    def __init__(self, text: str) -> None:
        self.text = text

    def read(self, pid: int, name: str) -> str:
        return self.text


def lost(proc: Proc) -> bool:
    """Whether a process of a running server counts as dead, as this reader tells of it."""
    server = ServerProcess("glimpse-test-none-", proc)
    server.start(["/bin/sleep", "60"], dict(os.environ), subprocess.DEVNULL)
    assert server.pid is not None
    try:
        return server.has_lost(ModelProcess("llm", server.pid, Path("/dev/shm/none")))
    finally:
        asyncio.run(server.kill())


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.ENOMEM, errno.EIO, errno.EINTR])
def test_a_question_that_could_not_be_asked_is_no_death(code: int) -> None:
    with pytest.raises(OSError, match=re.escape(os.strerror(code))):
        lost(Failing(code))


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESRCH])
def test_a_process_that_is_not_there_is_dead(code: int) -> None:
    assert lost(Failing(code))


def test_a_process_is_alive_until_it_ends_or_its_number_is_anothers() -> None:
    assert not lost(Proc())
    assert lost(Telling("1 (a) b) Z 1 1 1"))
    assert lost(Telling("1 (triton_python_b) S 1 1 1"))  # of another group


def test_what_a_server_makes_is_for_its_user_alone(tmp_path: Path) -> None:
    server = ServerProcess("glimpse-test-none-", Proc())
    server.start(["/bin/mkdir", str(tmp_path / "made")], dict(os.environ), subprocess.DEVNULL)
    eventually(lambda: server.exit_status == 0, 10, "made")
    assert (tmp_path / "made").stat().st_mode & 0o077 == 0


MODEL = """trap 'touch ended; exit' TERM
touch begun
while :; do sleep 0.05; done
"""
SERVER = """./triton_python_backend_stub llm/1/model.py region &
trap 'kill $!' TERM
while :; do sleep 0.05; done
"""


def test_a_server_without_models_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one tells its model to end, and would never end itself."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "triton_python_backend_stub").symlink_to("/bin/sh")
    (tmp_path / "llm" / "1").mkdir(parents=True)
    (tmp_path / "llm" / "1" / "model.py").write_text(MODEL)
    server = ServerProcess("glimpse-test-none-", Proc())
    server.start(["/bin/sh", "-c", SERVER], dict(os.environ), subprocess.DEVNULL)
    eventually(Path("begun").exists, 20, "the model runs")
    (model,) = server.models()
    asyncio.run(asyncio.wait_for(server.stop(120), 60))
    assert Path("ended").exists()
    assert server.has_lost(model)
    assert server.exit_status == -signal.SIGKILL


class Partly(Proc):
    """Tells only so much of a command line."""

    def __init__(self, told: str) -> None:
        self.told = told

    def read(self, pid: int, name: str) -> str:
        return self.told if name == "cmdline" else super().read(pid, name)


STUB = "/tmp/python/triton_python_backend_stub\0/models/llm/1/model.py\0glimpse-1-region\0001048576\0"


@pytest.mark.parametrize(
    "length", [0, 9, *(STUB.index(end) + len(end) for end in ("_stub", "stub\0", "/1/", "py\0", "reg"))]
)
def test_a_model_whose_command_line_is_not_whole_cannot_be_told(length: int) -> None:
    """The kernel tells so now and then, of a process that begins or ends. It is asked again, as after any OSError."""
    server = ServerProcess("glimpse-test-none-", Partly(STUB))
    server.start(["/bin/sleep", "60"], dict(os.environ), subprocess.DEVNULL)
    try:
        (model,) = server.models()
        assert (model.model, model.region.name) == ("llm", "glimpse-1-region")
        server._proc = Partly(STUB[:length])
        with pytest.raises(BlockingIOError, match="only part of its command line"):
            server.models()
    finally:
        asyncio.run(server.kill())


class Held:
    """The process of a server that the kernel holds back."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self.asked = 0

    def poll(self) -> None:
        self.asked += 1


async def test_a_killed_server_that_does_not_end_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "KILLED_WITHIN_S", 0.05)
    region = SHARED_MEMORY / "glimpse-test-held-1"
    region.touch()
    server = ServerProcess("glimpse-test-held-", Proc())
    server.start(["/bin/sleep", "60"], dict(os.environ), subprocess.DEVNULL)
    process = server._process
    assert process is not None
    held = Held(process)
    monkeypatch.setattr(server, "_process", held)
    await server.kill()
    assert held.asked > 2  # other tasks had their turns meanwhile
    assert not region.exists()
    assert process.wait() == -signal.SIGKILL


def test_one_call_tells_who_may_have_ended() -> None:
    living, ending = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    exits = Exits((living.pid, ending.pid))
    try:
        assert exits.suspects() == set()
        ending.kill()
        ending.wait()
        assert exits.suspects() == {ending.pid}
        gone = Exits((living.pid, ending.pid))  # the kernel gives no descriptor of a process that is not there
        assert gone.suspects() == {ending.pid}
        gone.close()
    finally:
        exits.close()
        for process in (living, ending):
            process.kill()
            process.wait()
    assert exits.suspects() == set()


def test_who_stands_still_is_told_also_of_one_that_is_asked_about_again() -> None:
    stopped, runs, ended = (subprocess.Popen(["sleep", "60"]) for _ in range(3))
    stops = Stops((stopped.pid, runs.pid, ended.pid))
    before = len(os.listdir("/proc/self/fd"))
    try:
        assert stops.stopped() == set()
        for signals, found in (
            (signal.SIGSTOP, {stopped.pid}),
            (signal.SIGCONT, set()),
            (signal.SIGSTOP, {stopped.pid}),
        ):
            stopped.send_signal(signals)
            eventually(lambda found=found: stops.stopped() == found, 5, "the kernel tells it")
        ended.kill()
        ended.wait()
        assert stops.stopped() == {stopped.pid}
        assert len(os.listdir("/proc/self/fd")) == before + 3
        assert Stops((ended.pid,)).stopped() == set()
    finally:
        stops.close()
        for process in (stopped, runs, ended):
            process.kill()
            process.wait()
    assert stops.stopped() == set()
    assert len(os.listdir("/proc/self/fd")) == before
