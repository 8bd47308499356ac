"""Starts what a repository's profile needs, for as long as it is looked at."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from service.core import ModelCard
from service.embedded import EmbeddedTriton, Ports
from service.triton import TritonClient

READY_S = 600


class CannotServe(Exception):
    """What this machine lacks."""


def container(image: str, repository: Path, models: Sequence[str], ports: Ports, mount: str = "/models") -> list[str]:
    """The command line of one Triton of NVIDIA's with the named models, their steps with them. Pure."""
    return [
        "docker", "run", "--rm", "--gpus", "all", "--ipc", "host", "--ulimit", "memlock=-1",
        "--publish", f"127.0.0.1:{ports.grpc}:8001", "--publish", f"127.0.0.1:{ports.metrics}:8002",
        "--volume", f"{repository.absolute()}:{mount}:ro", image,
        "tritonserver", f"--model-repository={mount}", "--disable-auto-complete-config",
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in models),
    ]  # fmt: skip


def containers(
    repository: Path, card: ModelCard, images: tuple[str, str], ports: tuple[Ports, Ports]
) -> list[list[str]]:
    """The vision server and the LLM server. Pure."""
    vision, llm = images
    called = [model for model in card.called if model != "llm"]
    return [container(vision, repository, called, ports[0]), container(llm, repository, ["llm"], ports[1])]


@asynccontextmanager
async def serving(
    repository: Path, card: ModelCard, images: tuple[str, str] | None, ports: tuple[Ports, Ports], log: Path
) -> AsyncIterator[tuple[str, str, str]]:
    """The vision and the LLM server's addresses and the metrics URL: of containers, or of the bundled Triton.

    Raises CannotServe, or StartFailed of the bundled one."""
    vision, llm = (f"127.0.0.1:{each.grpc}" for each in ports)
    metrics = f"http://127.0.0.1:{ports[0].metrics}/metrics"
    if images is None:
        async with (
            TritonClient(vision, vision) as client,
            EmbeddedTriton(repository, client=client, card=card, log_path=log, ports=ports[0]),
        ):
            yield vision, vision, metrics
        return
    if shutil.which("docker") is None:
        raise CannotServe("plans are served by containers, and there is no docker")
    with running(containers(repository, card, images, ports), log) as started:
        async with TritonClient(vision, llm) as client:
            await until_ready(client, started, log)
        yield vision, llm, metrics


@contextmanager
def running(lines: Sequence[Sequence[str]], log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Programs that end with the block."""
    with log.open("wb") as out:
        started = [subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT) for line in lines]
        try:
            yield started
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait()


async def until_ready(client: TritonClient, started: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    """Raises CannotServe where a server ends, or is not ready in READY_S."""
    for _ in range(READY_S):
        if await client.ready(timeout_s=1.0):
            return
        if any(process.poll() is not None for process in started):
            raise CannotServe(f"a server ended while starting: {log} has its words")
        await asyncio.sleep(1.0)
    raise CannotServe(f"the servers are not ready after {READY_S} s: {log} has their words")
