"""A start removes what a killed gateway left, and nothing that has an owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.triton_server.access import Access, Ports
from service.triton_server.installation import StartFailed
from service.triton_server.leftovers import claim, clean_up
from service.triton_server.processes import SHARED_MEMORY, Proc
from tests.support.paths import PROJECT
from tests.support.servers import StartGateway, eventually, free_ports

# Claims a folder, makes a region of shared memory and starts a program that names it, as a gateway does; then waits.
GATEWAY = """
import subprocess, sys
from pathlib import Path
from service.triton_server.access import Access
from service.triton_server.leftovers import claim
from dataclasses import replace
access = Access.choose()
access = replace(access, folder=Path(sys.argv[1]) / access.folder.name)
held = claim(access.folder)
Path("/dev/shm", access.region_prefix + "region").write_bytes(b"pixels")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", access.region_prefix + "region"])
print(access.folder, child.pid, flush=True)
sys.stdin.read()
"""


@contextmanager
def gateway(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """Its process, its folder, and its Triton's process."""
    with subprocess.Popen(
        [sys.executable, "-c", GATEWAY, str(parent)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        folder, child = process.stdout.readline().split()
        # The kernel lets its parent go on before the new program's arguments can be read.
        eventually(lambda: Path(folder).name in Proc().read(int(child), "cmdline"), 10, "the child has its arguments")
        try:
            yield process, Path(folder), int(child)
        finally:
            process.kill()
            if Proc().group(int(child)) is not None:
                os.kill(int(child), signal.SIGKILL)
            for region in regions(Path(folder)):
                region.unlink()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def regions(folder: Path) -> list[Path]:
    return list(SHARED_MEMORY.glob(f"{folder.name}-*"))


async def test_what_a_killed_gateway_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    with gateway(tmp_path) as (dead, left, orphan), gateway(tmp_path) as (_, owned, child):
        dead.kill()
        dead.wait()
        await clean_up([tmp_path], Proc())
        assert not left.exists()
        assert not regions(left)
        assert Proc().group(orphan) is None
        assert owned.exists()
        assert regions(owned)
        assert Proc().group(child) is not None


async def test_a_stopped_triton_of_a_killed_gateway_goes_too(tmp_path: Path) -> None:
    with gateway(tmp_path) as (dead, left, orphan):
        os.kill(orphan, signal.SIGSTOP)
        dead.kill()
        dead.wait()
        await clean_up([tmp_path / "no such folder", tmp_path], Proc())
        assert Proc().group(orphan) is None
        assert not left.exists()


async def test_other_folders_stay(tmp_path: Path) -> None:
    name = Access.choose().folder.name
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    for other in ("glimpse-1-short", f"new-{name}", f"{name}.old"):
        (tmp_path / other).mkdir()
    open_to_all = tmp_path / Access.choose().folder.name
    open_to_all.mkdir()
    open_to_all.chmod(0o777)  # not of our making
    before = names(tmp_path)
    await clean_up([tmp_path], Proc())
    assert names(tmp_path) == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match=r"no temporary folder can be made in /proc .*TMPDIR"):
        claim(Path("/proc/glimpse-1-0123456789abcdef"))
    folder = tmp_path / "glimpse-1-0123456789abcdef"
    held = claim(folder)
    assert folder.stat().st_mode & 0o077 == 0
    os.close(held)


ENDED_BUT_FOR_A_THREAD = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_of_which_a_thread_is_left_is_not_gone() -> None:
    """Such a thread holds the process's ports."""
    proc, child = Proc(), subprocess.Popen([sys.executable, "-c", ENDED_BUT_FOR_A_THREAD])
    try:
        eventually(lambda: proc.group(child.pid) is None, 20, "the first thread has ended")
        assert not proc.is_gone(child.pid)
    finally:
        child.kill()
    eventually(lambda: proc.is_gone(child.pid), 20, "all of it has ended")
    child.wait()
    assert proc.is_gone(child.pid)


def test_the_first_start_after_a_kill_succeeds_although_triton_is_still_there(start_gateway: StartGateway) -> None:
    """Its Triton is stopped, so that it cannot end by itself and holds its port."""
    ports = {"GLIMPSE_TRITON_METRICS_PORT": str(free_ports(1)[0])}
    with start_gateway(ports) as first:
        (server,) = (
            int(child)
            for task in Path(f"/proc/{first.process.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
            if "tritonserver" in Path(f"/proc/{child}/cmdline").read_text()
        )
        prefix = f"glimpse-{first.process.pid}-"
        assert list(Access.choose(Ports()).folder.parent.glob(f"{prefix}*"))
        os.kill(server, signal.SIGSTOP)
        first.process.kill()
        first.process.wait()
        assert list(SHARED_MEMORY.glob(f"{prefix}*"))
        with start_gateway(ports) as second:
            assert second.status("/health/ready") == 200
            assert "leftovers_removed" in second.log()
            assert not list(SHARED_MEMORY.glob(f"{prefix}*"))
        assert not list(Access.choose(Ports()).folder.parent.glob(f"{prefix}*"))
