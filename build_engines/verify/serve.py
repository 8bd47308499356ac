"""Start the servers that a repository's profile needs, while it is checked."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from build_engines.convert.manifest import NAME
from build_engines.convert.plans import load, version_of_runtime
from build_engines.verify.files import Wrong
from build_engines.verify.report import Report
from service.core.card import ModelCard
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton

READY_S = 600


class CannotServe(Exception):
    """Serving is not possible here. The message says what is missing."""


@dataclass(frozen=True)
class Images:
    """Images of the vision and LLM servers of a repository with plans, and their mount path."""

    vision: str
    llm: str
    mount: str

    @classmethod
    def of(cls, repository: Path) -> Self | None:
        """Read the manifest. None for a repository that the bundled Triton serves."""
        path = repository / NAME
        told = json.loads(path.read_text()) if path.exists() else {}
        return cls(**told["images"]) if told.get("profile") == "tensorrt" else None


def in_container(image: str, repository: Path, mount: str, *more: str) -> list[str]:
    """The command line of a container with the repository, up to its program. Pure."""
    return ["docker", "run", "--rm", "--gpus", "all", "--ipc", "host", "--ulimit", "memlock=-1", *more,
            "--volume", f"{repository.absolute()}:{mount}:ro", image]  # fmt: skip


def containers(repository: Path, card: ModelCard, images: Images, ports: tuple[Ports, Ports]) -> list[list[str]]:
    """Command lines of the vision and LLM servers, with the called models and their steps. Pure."""
    called = [model for model in card.called if model != "llm"]
    servers = ((images.vision, called, ports[0]), (images.llm, ["llm"], ports[1]))
    return [
        [
            *in_container(
                image, repository, images.mount,
                "--publish", f"127.0.0.1:{own.grpc}:8001", "--publish", f"127.0.0.1:{own.metrics}:8002",
            ),
            "tritonserver", f"--model-repository={images.mount}", "--disable-auto-complete-config",
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in models),
        ]
        for image, models, own in servers
    ]  # fmt: skip


def check_loads(repository: Path, images: Images, tensorrt: str, report: Report) -> None:
    """Check that every plan loads in its serving image, on the manifest's exact TensorRT version."""
    for plan in sorted(repository.glob("*/1/model.plan")):
        place = f"{images.mount}/{plan.relative_to(repository)}"
        with report.check(f"plan {plan.parts[-3]} loads"):
            line = [*in_container(images.vision, repository, images.mount), *load(place)]
            done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                raise Wrong(" ".join(done.stdout.splitlines()[-3:]))
            if (running := version_of_runtime(done.stdout)) != tensorrt:
                raise Wrong(f"{images.vision} has TensorRT {running}, the manifest says {tensorrt}")


@asynccontextmanager
async def serving(
    repository: Path, card: ModelCard, images: Images | None, ports: tuple[Ports, Ports], log: Path
) -> AsyncIterator[tuple[str, str, str]]:
    """Serve in containers or the bundled Triton, and yield the addresses.

    They are the vision server's, the LLM server's and the metrics URL. Raises CannotServe, or StartFailed for the
    bundled Triton.
    """
    metrics = f"http://127.0.0.1:{ports[0].metrics}/metrics"
    if images is None:
        access = Access.choose(Ports(metrics=ports[0].metrics))
        async with (
            TritonClient(access.url, access.url) as client,
            EmbeddedTriton(repository, client=client, card=card, log_path=log, access=access),
        ):
            yield access.url, access.url, metrics
        return
    vision, llm = (f"127.0.0.1:{each.grpc}" for each in ports)
    if shutil.which("docker") is None:
        raise CannotServe("plans need docker, which is missing: install it, or use --vision-url of a running server")
    async with started(containers(repository, card, images, ports), (vision, llm), log):
        yield vision, llm, metrics


@asynccontextmanager
async def started(lines: Sequence[Sequence[str]], urls: Sequence[str], log: Path) -> AsyncIterator[None]:
    """Start the servers one after the other, and stop them at the end of the block.

    TensorRT-LLM takes most of the memory that is free when it starts, so the vision server must have its own by then.
    Raises CannotServe.
    """
    with ExitStack() as stack:
        out = stack.enter_context(log.open("wb"))
        for line, url in zip(lines, urls, strict=True):
            process = stack.enter_context(running(line, out))
            async with TritonClient(url, url) as client:
                await until_ready(client, process, log)
        yield


@contextmanager
def running(line: Sequence[str], out: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program, and stop it at the end of the block."""
    process = subprocess.Popen(line, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


async def until_ready(client: TritonClient, process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises CannotServe if the server exits or is not ready in READY_S."""
    for _ in range(READY_S):
        if await client.ready(timeout_s=1.0):
            return
        if process.poll() is not None:
            raise CannotServe(f"a server exited while starting: see {log}")
        await asyncio.sleep(1.0)
    raise CannotServe(f"a server is not ready after {READY_S} s: see {log}")
