"""Start two gateways, two Tritons and one Redis, find their processes, and start again what was killed.

    gateway a   with its own, embedded Triton; its log is a file on a small disk
    gateway b   in front of a Triton that runs apart, through a proxy; its log is a pipe
    Redis       behind another proxy, shared by both

The apart Triton is supervised by a process of its own, with the code that supervises an embedded one.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import http.client
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.bench.models import PROJECT, REFERENCE
from benchmarks.bench.processes import DECODER, Process, family
from benchmarks.faults import isolation
from benchmarks.faults.proxy import Proxy
from benchmarks.ports import free_ports, is_free

START_S = 240.0
STOP_S = 30.0  # a gateway's notice and grace, and the end of its Triton
SHARED_MEMORY_BYTES = 512 << 20
LOG_DISK_BYTES = 64 << 20
PIPE_BYTES = 4096
READ_BYTES = 1 << 16
MODELS = ("vision_encoder", "relevance_allocator", "relevance_allocator_448", "qformer", "llm", "prepare", "compose",
          "finish")  # fmt: skip
SETTINGS = {
    "ELASTIC_FIDELITY": "false",  # a busy machine must not change what is answered
    "VISUAL_CACHE_BYTES": "0",  # every question is attended to
    "STOP_NOTICE_S": "0.5",
}


class Part:
    """A process that the campaign starts, ends and starts again, as a process manager would."""

    def __init__(
        self, name: str, argv: Sequence[str], environment: Mapping[str, str], log: Path, *, piped: bool
    ) -> None:
        """A piped part writes into a pipe that the campaign reads on into `log`."""
        self.name = name
        self.reads = asyncio.Event()  # cleared: the pipe's reader stands still
        self.reads.set()
        self._argv = argv
        self._environment = environment
        self._log = log
        self._piped = piped
        self._process: subprocess.Popen[bytes] | None = None
        self._reading: asyncio.Task[None] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                cwd=PROJECT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._piped else log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if self._process.stdout is not None:
            fcntl.fcntl(self._process.stdout, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            self._reading = asyncio.create_task(self._read(self._process.stdout.fileno(), self._process))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self, within_s: float) -> int | None:
        """Wait for the end -> the exit status, or None if it does not come in time."""
        assert self._process is not None
        deadline = time.monotonic() + within_s
        while self._process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        return self._process.poll()

    async def kill(self) -> None:
        if self.is_running:
            self.signal(signal.SIGKILL)
            await self.ended(STOP_S)

    async def _read(self, descriptor: int, process: subprocess.Popen[bytes]) -> None:
        """Copy the pipe to the log until its last writer has closed it."""
        loop = asyncio.get_running_loop()
        os.set_blocking(descriptor, False)
        assert process.stdout is not None
        with process.stdout, self._log.open("ab") as log:
            while True:
                await self.reads.wait()
                ready = asyncio.Event()
                loop.add_reader(descriptor, ready.set)
                try:
                    await ready.wait()
                finally:
                    loop.remove_reader(descriptor)
                if not (data := os.read(descriptor, READ_BYTES)):
                    return
                log.write(data)
                log.flush()


@dataclass(slots=True)
class Gateway:
    name: str
    port: int
    part: Part
    triton: Part  # the root of its Triton's processes: itself if embedded
    starts: list[float] = field(default_factory=list)  # monotonic times

    def start(self) -> None:
        self.part.start()
        self.starts.append(time.monotonic())

    def get(self, path: str, timeout_s: float = 2.0) -> tuple[int, str]:
        """Return status and body; status 0 if nobody answers. Blocks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except (OSError, http.client.HTTPException):
            return 0, ""
        finally:
            connection.close()

    @property
    def is_embedded(self) -> bool:
        return self.triton is self.part


class World:
    """Everything that runs. Enter it to start, leave it to stop."""

    def __init__(self, rng: random.Random) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="faults-", dir="/tmp"))  # short: a socket's path is limited
        self.is_isolated = isolation.is_inside()
        redis_port, self.redis_proxy_port, grpc, proxied, *others = free_ports(10)
        self._ports = [redis_port, self.redis_proxy_port, grpc, proxied, *others]
        self.redis_port = redis_port
        self.redis_proxy = Proxy(self.redis_proxy_port, redis_port, rng)
        self.triton_proxy = Proxy(proxied, grpc, rng)
        (self.folder / "tmp").mkdir()
        self.shared_memory = {name: self.folder / f"shm_{name}" for name in "ab"}
        self.log_disk = self.folder / "logs_a"
        self._make_disks()
        redis_command = ["redis-server", "--port", str(redis_port), "--bind", "127.0.0.1", "--save", ""]
        self.redis = self._part("redis", redis_command, self.folder)
        triton = self._own_memory(
            "b", [sys.executable, "-m", "benchmarks.bench.triton_server", str(REFERENCE.repository),
                  str(self.folder / "triton_b.log"), str(grpc), str(others[0]), "supervised"]
        )  # fmt: skip
        self.triton = self._part("triton_b", triton, self.folder)
        apart = dict.fromkeys(("VISION_URL", "LLM_URL"), f"127.0.0.1:{proxied}") | {"GRPC_PORT": str(others[4])}
        service = [sys.executable, "-m", "service"]
        embedded = {"TRITON_METRICS_PORT": str(others[1]), "GRPC_PORT": str(others[5])}
        part_a = self._part("gateway_a", self._own_memory("a", service), self.log_disk, others[2], embedded)
        part_b = self._part("gateway_b", service, self.folder, others[3], apart, piped=True)
        self.gateways = {
            "a": Gateway("a", others[2], part_a, part_a),
            "b": Gateway("b", others[3], part_b, self.triton),
        }

    def _part(
        self,
        name: str,
        argv: Sequence[str],
        logs: Path,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
        *,
        piped: bool = False,
    ) -> Part:
        told = {
            "HTTP_PORT": str(port),
            "MODEL_REPOSITORY": str(REFERENCE.repository),
            "REDIS_URL": f"redis://127.0.0.1:{self.redis_proxy_port}/0",
            "LOG_DIR": str(logs),
            **SETTINGS,
            **(settings or {}),
        }
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GLIMPSE_")}
        environment["TMPDIR"] = str(self.folder / "tmp")
        environment |= {f"GLIMPSE_{key}": value for key, value in told.items()} if port else {}
        return Part(name, argv, environment, logs / f"{name}.log", piped=piped)

    def _make_disks(self) -> None:
        if self.is_isolated:
            for folder in self.shared_memory.values():
                isolation.mount_small(folder, SHARED_MEMORY_BYTES)
            isolation.mount_small(self.log_disk, LOG_DISK_BYTES)
        else:
            self.log_disk.mkdir()

    def _own_memory(self, name: str, argv: Sequence[str]) -> list[str]:
        return isolation.with_shared_memory(self.shared_memory[name], argv) if self.is_isolated else list(argv)

    async def __aenter__(self) -> World:
        await self.redis_proxy.start()
        await self.triton_proxy.start()
        self.redis.start()
        self.triton.start()
        for gateway in self.gateways.values():
            gateway.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for gateway in self.gateways.values():
            await gateway.part.kill()
        for part in (self.triton, self.redis):
            await part.kill()
        await self.redis_proxy.close()
        await self.triton_proxy.close()
        if not self.leftovers():
            shutil.rmtree(self.folder, ignore_errors=True)

    def keep_logs(self, folder: Path) -> None:
        """Copy the logs of all parts to a folder, and drop what an earlier run left there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for log in (*self.folder.glob("*.log"), *self.log_disk.glob("*.log")):
            shutil.copy(log, folder)

    async def stop(self) -> list[str]:
        """Stop every part as an operator would -> what is left over."""
        parts = [*(gateway.part for gateway in self.gateways.values()), self.triton, self.redis]
        for part in parts:
            part.signal(signal.SIGTERM)
        found = []
        for part in parts:
            if (status := await part.ended(STOP_S)) != 0:
                found.append(f"{part.name} ended with status {status}")
        await self.redis_proxy.close()
        await self.triton_proxy.close()
        return found + self.leftovers()

    def leftovers(self) -> list[str]:
        """Return the processes, regions, folders, sockets and ports that are still there."""
        found = [f"process {pid}: {line}" for pid, line in self._processes()]
        folders = [self.folder / "tmp", *(self.shared_memory.values() if self.is_isolated else ())]
        found += [str(path) for folder in folders if folder.exists() for path in folder.rglob("*")]
        return found + [f"port {port}" for port in self._ports if not is_free(port)]

    def _processes(self) -> list[tuple[int, str]]:
        """The living processes that the parts have started: they have the world's folder in their environment."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in (path / "environ").read_bytes():
                    line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append((int(path.name), line[:200]))
        return found

    # The processes of a gateway and of its Triton.
    def of_triton(self, name: str) -> list[Process]:
        """Return tritonserver and the processes of its models."""
        roles = {"triton", *MODELS}
        return [process for process in family(self.gateways[name].triton.pid) if process.role in roles]

    def triton_pid(self, name: str) -> int | None:
        return next((process.pid for process in self.of_triton(name) if process.role == "triton"), None)

    def decoders(self, name: str) -> list[int]:
        return [process.pid for process in family(self.gateways[name].part.pid) if process.role == DECODER]
