"""`glimpse triton`, and the probes of `glimpse health` and `glimpse canary`, as processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from service.core.card import ModelCard
from service.settings import SettingsError
from service.triton import TritonClient
from service.triton_alone import called
from tests.support.servers import Gateway, eventually, free_ports


def glimpse(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "glimpse"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **variables})


@contextmanager
def alone(folder: Path, pool: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A `glimpse triton` with this pool and its gRPC address, from its first moment."""
    port, metrics_port = free_ports(2)
    command = [str(Path(sys.executable).parent / "glimpse"), "triton", "--host", "0.0.0.0", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--metrics-port", str(metrics_port), "--pool", pool],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "GLIMPSE_LOG_DIR": "-", "GLIMPSE_TRITON_EXIT_TIMEOUT_S": "12"},
        )  # fmt: skip
    try:
        yield f"127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


def running(*options: str) -> list[str]:
    """The command lines of all processes that have these options."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            lines.append(path.read_bytes().decode(errors="replace").split("\0"))
    return [" ".join(words) for words in lines if {*options} <= {*words}]


def test_a_pool_has_the_models_that_a_gateway_calls_there(card: ModelCard) -> None:
    assert called("both", card) is None
    assert called("llm", card) == ["llm"]
    assert called("vision", card) == ["see", "attend", "attend_448", "attend_clip"]
    with pytest.raises(SettingsError, match="'all' is not a pool"):
        called("all", card)


@pytest.mark.servers
@pytest.mark.slow
async def test_a_triton_alone_serves_its_pool_until_it_is_told_to_stop(tmp_path: Path, card: ModelCard) -> None:
    with alone(tmp_path, "llm") as (address, process):
        log = tmp_path / "log"
        eventually(lambda: "triton_ready" in log.read_text() or process.poll() is not None, 90, "triton ready")
        assert process.poll() is None, log.read_text()
        assert "Started GRPCInferenceService" in log.read_text()  # Triton's own lines go to stderr too
        assert len(running(f"--grpc-port={address.rpartition(':')[2]}", "--exit-timeout-secs=12")) == 1
        assert glimpse("health", "--triton", address).returncode == 0
        told = glimpse("canary", "--triton", address, "--pool", "llm")
        assert (told.returncode, told.stdout.partition(" in ")[0]) == (0, "answered")
        assert glimpse("canary", "--triton", address).returncode == 1  # it has no vision models
        async with TritonClient(address, address) as client:
            await client.probe("llm", card)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_triton_that_starts_is_told_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    with alone(tmp_path, "both") as (_, process):
        log = tmp_path / "log"
        eventually(log.read_text, 90, "the first line of Triton")
        process.send_signal(number)
        assert process.wait(20) == 0
        assert "triton_ready" not in log.read_text()
        assert "Traceback" not in log.read_text()


def test_a_gateway_is_asked_with_commands(gateway: Gateway) -> None:
    assert glimpse("health", "--url", gateway.url).returncode == 0
    assert glimpse("health", "--live", "--url", gateway.url).returncode == 0
    told = glimpse("canary", "--url", gateway.url)
    assert (told.returncode, " answered in " in told.stdout) == (0, True), told.stderr


def test_a_probe_says_in_one_line_why_it_failed() -> None:
    (port,) = free_ports(1)
    for arguments in (("health", "--url"), ("canary", "--url")):
        told = glimpse(*arguments, f"http://127.0.0.1:{port}")
        assert (told.returncode, told.stderr.count("\n")) == (1, 1)
        assert "nothing answers at" in told.stderr
    told = glimpse("health", "--triton", f"127.0.0.1:{port}")
    assert (told.returncode, "does not answer" in told.stderr) == (1, True)
