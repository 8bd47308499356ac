"""Serve with the bundled Triton alone: the system `triton`.

    python -m benchmarks.bench.triton_server REPOSITORY LOG GRPC METRICS [supervised]

GRPC and METRICS are ports. It prints `ready` once every model has inferred; SIGTERM stops it. With `supervised` it also
brings back what dies, as the gateway does with its own Triton; that costs a little CPU time.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from service.core.card import ModelCard
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton


async def serve(repository: Path, log_path: Path, access: Access, supervised: bool) -> None:
    card = ModelCard.from_json((repository / "card.json").read_text())
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with (
        TritonClient(access.url, access.url, access.metadata) as client,
        EmbeddedTriton(
            repository, client=client, card=card, log_path=log_path, access=access, start_timeout_s=180
        ) as triton,
        asyncio.TaskGroup() as tasks,
    ):
        watch = [tasks.create_task(triton.supervise())] if supervised else []
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await stopped.wait()
        for task in watch:
            task.cancel()


def main() -> None:
    repository, log_path, grpc, metrics, *supervised = sys.argv[1:]
    access = Access.choose(Ports(int(grpc), int(metrics)))
    asyncio.run(serve(Path(repository), Path(log_path), access, supervised == ["supervised"]))


if __name__ == "__main__":
    main()
