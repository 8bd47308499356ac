"""Start, find and end the processes of one Triton and its models, and free the shared memory between them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.triton_server.access import SHARED_MEMORY

# Each model process has a region of shared memory. Triton's default of 1 MiB grows with the requests in flight. A
# process that writes while its region grows can write past the end: this killed two processes in a 40-minute soak test.
REGION_BYTES = 32 << 20
LEAST_REGION_BYTES = 1 << 20
REGIONS_SHARE = 0.25  # of the free shared memory: a region takes all of its bytes at once

# Runs in the child before tritonserver takes its place: when the process that started it dies, even by SIGKILL, the
# kernel tells Triton to stop. The last line covers the case that the parent died before the first line ran.
GUARD = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.getppid() == int(sys.argv[1]) and os.execv(sys.argv[2], sys.argv[2:])"
)

KILLED_WITHIN_S = 10.0  # after SIGKILL
STOPPED = b"T"  # by SIGSTOP, in /proc/PID/stat
STUB = "triton_python_backend_stub"  # the program of a model's process
WHOLE = 4  # least parts of its command line: itself, the model, the region, and nothing after the last zero
DEAD = ("Z", "X")  # of /proc/PID/stat; Triton never collects its dead model processes
GONE = (FileNotFoundError, ProcessLookupError)  # what tells of a death; any other OSError tells nothing


def region_bytes(free: int, models: int) -> int:
    """Choose the size of each model's region from the free shared memory. Docker gives a container 64 MiB."""
    pages = int(REGIONS_SHARE * free) // models // mmap.PAGESIZE
    return min(max(pages * mmap.PAGESIZE, LEAST_REGION_BYTES), REGION_BYTES)


@dataclass(frozen=True, slots=True)
class ModelProcess:
    """The stub of one instance of a python model, and the shared memory between Triton and it."""

    model: str
    pid: int
    region: Path


class Proc:
    """What /proc tells of this user's processes."""

    def pids(self) -> list[int]:
        """Raises OSError if it cannot be asked."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(*GONE):
                    if entry.stat().st_uid == os.geteuid():
                        found.append(int(entry.name))
        return found

    def read(self, pid: int, name: str) -> str:
        """Raises OSError: one of GONE if there is no such process, another if it cannot be asked."""
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")

    def group(self, pid: int) -> int | None:
        """The process's group; None if there is no such process, or if it has ended and waits to be collected.

        Raises OSError if it cannot be asked.
        """
        try:
            state, _parent, group, *_ = self.read(pid, "stat").rpartition(")")[2].split()
        except GONE:
            return None
        return None if state in DEAD else int(group)

    def is_gone(self, pid: int) -> bool:
        """Whether no thread of it is left, so that its ports are free. Raises OSError if it cannot be asked.

        The first thread of a killed process, whose state is the process's, may be dead while others still end.
        """
        try:
            threads = [path.name for path in Path(f"/proc/{pid}/task").iterdir()]
        except GONE:
            return True
        for thread in threads:
            with contextlib.suppress(*GONE):
                if self.read(pid, f"task/{thread}/stat").rpartition(")")[2].split()[0] not in DEAD:
                    return False
        return True


class Exits:
    """Which of some processes may have ended: one system call for all of them, where /proc takes three for each."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._unknown: set[int] = set()  # the kernel gave no descriptor: these may have ended at any time
        self._pids: dict[int, int] = {}  # by descriptor
        self._poll = select.poll()
        for pid in pids:
            try:
                descriptor = os.pidfd_open(pid)
            except OSError:
                self._unknown.add(pid)
            else:
                self._pids[descriptor] = pid
                self._poll.register(descriptor, select.POLLIN)

    def suspects(self) -> set[int]:
        """The processes to ask /proc about."""
        return self._unknown | {self._pids[descriptor] for descriptor, _ in self._poll.poll(0)}

    def close(self) -> None:
        for descriptor in self._pids:
            os.close(descriptor)
        self._pids, self._poll = {}, select.poll()


class Stops:
    """Which of some processes stand still, by SIGSTOP: one system call for each, because their files stay open."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._pids = tuple(pids)
        self._files: dict[int, int] = {}  # descriptor by process

    def stopped(self) -> set[int]:
        """Those that stand still now. One that cannot be asked about does not."""
        return {pid for pid in self._pids if self._state(pid) == STOPPED}

    def _state(self, pid: int) -> bytes:
        """The state of the process's first thread, as in /proc/PID/stat; empty if it cannot be asked for."""
        try:
            if pid not in self._files:
                self._files[pid] = os.open(f"/proc/{pid}/task/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._files[pid], 512, 0).rpartition(b")")[2].split(None, 1)[0]
        except OSError:
            return b""

    def close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._pids, self._files = (), {}


def free_regions(prefix: str) -> None:
    """Raises OSError."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


class ServerProcess:
    """Run tritonserver and its model processes: one process group, one prefix of regions in shared memory."""

    def __init__(self, shared_memory_prefix: str, proc: Proc) -> None:
        self.shared_memory_prefix = shared_memory_prefix
        self._proc = proc
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Return the process id of the last start; None before the first."""
        return self._process.pid if self._process else None

    @property
    def exit_status(self) -> int | None:
        """Return the exit status: None while Triton runs, negative after a signal."""
        return self._process.poll() if self._process else None

    def start(self, command: Sequence[str], environment: Mapping[str, str], output: int) -> None:
        """Start in a thread that lives as long as the service: Triton gets SIGTERM when that thread ends.

        `output` is a file descriptor. Raises OSError if no process can be made.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", GUARD, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            umask=0o077,  # of its socket, its shared memory and its temporary files
        )

    def models(self) -> list[ModelProcess]:
        """The living model processes. Raises OSError if they cannot be asked for."""
        found = []
        for pid in self._group():
            program, *arguments = self._arguments(pid)
            if program.endswith(STUB):  # its arguments: MODEL/1/model.py, the region, ...
                script, region, *_ = arguments
                found.append(ModelProcess(Path(script).parent.parent.name, pid, SHARED_MEMORY / region))
        return found

    def close_regions(self) -> None:
        """Take the shared memory from other users: Triton sets its mode itself, to 0644, whatever the umask.

        Raises OSError.
        """
        for name in os.listdir(SHARED_MEMORY):
            if name.startswith(self.shared_memory_prefix):
                with contextlib.suppress(FileNotFoundError):  # Triton has just removed it
                    os.chmod(f"{SHARED_MEMORY}/{name}", 0o600)

    def has_lost(self, model: ModelProcess) -> bool:
        """Whether the model's process has ended. Raises OSError if that cannot be asked, which is no sign of death."""
        group = self._proc.group(model.pid)
        return group is None or self._process is None or group != self._process.pid

    def end_model(self, model: ModelProcess) -> None:
        """Kill the model's process, if it lives. Raises OSError if that cannot be asked."""
        if not self.has_lost(model):
            with contextlib.suppress(ProcessLookupError):
                os.kill(model.pid, signal.SIGKILL)

    async def stop(self, timeout_s: float) -> None:
        """Send SIGTERM, wait up to `timeout_s` until no model is left, then kill what is left.

        Triton ends its requests, then its models. It looks for models that are left only once a second.
        """
        try:
            if self._process and self.exit_status is None:
                self._process.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + timeout_s
                while self._has_models() and time.monotonic() < deadline:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        finally:
            await self.kill()

    async def kill(self) -> None:
        """Kill what is left of the server and its models, and free their shared memory.

        Regions that cannot be removed now are left to the next call, or to the next start. A server that the kernel
        holds back (state D, as with a GPU that hangs) is waited for KILLED_WITHIN_S only.
        """
        try:
            if self._process:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                deadline = time.monotonic() + KILLED_WITHIN_S
                while self.exit_status is None and time.monotonic() < deadline:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            with contextlib.suppress(OSError):
                free_regions(self.shared_memory_prefix)

    def _has_models(self) -> bool:
        """Whether the server runs and has a model process, or cannot be asked for them."""
        if self.exit_status is not None:
            return False
        try:
            return bool(self.models())
        except OSError:
            return True

    def _group(self) -> Iterator[int]:
        """The living processes of the server's group. Raises OSError if they cannot be asked for."""
        for pid in self._proc.pids():
            if self._process and self._proc.group(pid) == self._process.pid:
                yield pid

    def _arguments(self, pid: int) -> list[str]:
        """The parts of a process's command line, each without the zero that ends it; one empty part if it is gone.

        Raises OSError if they cannot be asked for. The kernel may also tell only the beginning of them, or nothing, of
        a process that begins or ends.
        """
        try:
            told = self._proc.read(pid, "cmdline")
        except GONE:
            return [""]
        parts = told.split("\0")
        if len(parts) < (WHOLE if parts[0].endswith(STUB) else 2):
            raise BlockingIOError(errno.EAGAIN, f"process {pid} tells only part of its command line")
        return parts[:-1]
