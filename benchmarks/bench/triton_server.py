"""Serve with the bundled Triton alone: the system `triton`.

    python -m benchmarks.bench.triton_server REPOSITORY LOG GRPC METRICS

The last two arguments are ports. It prints `ready` once every model has inferred; SIGTERM stops it.
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


async def serve(repository: Path, log_path: Path, access: Access) -> None:
    card = ModelCard.from_json((repository / "card.json").read_text())
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with (
        TritonClient(access.url, access.url, access.metadata) as client,
        EmbeddedTriton(repository, client=client, card=card, log_path=log_path, access=access, start_timeout_s=180),
    ):
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await stopped.wait()


def main() -> None:
    repository, log_path, *ports = sys.argv[1:]
    asyncio.run(serve(Path(repository), Path(log_path), Access.choose(Ports(*map(int, ports)))))


if __name__ == "__main__":
    main()
