from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from structlog.testing import capture_logs

from service.edges.http.application import http_api
from tests.support.fakes import CLOSER, House, png
from tests.support.servers import eventually, free_ports


@contextmanager
def serving(house: House) -> Iterator[SimpleNamespace]:
    """The HTTP edge on a real port, in front of stand-ins for the models."""
    (port,) = free_ports(1)
    config = uvicorn.Config(http_api(house.edge), host="127.0.0.1", port=port, log_config=None, lifespan="off")
    server, loop = uvicorn.Server(config), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=[server.serve()])
    thread.start()
    eventually(lambda: server.started, 10, "server started")
    with capture_logs():  # the command's own output is tested
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", house=house, loop=loop)
    server.should_exit = True
    thread.join(10)
    loop.close()
    house.reader.close()


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    with serving(House(CLOSER)) as server:
        yield server


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    path.write_bytes(png())
    return str(path)
