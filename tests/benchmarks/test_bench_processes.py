"""Processes are named by their command lines, and shared memory counts once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench.processes import family, proportional_bytes, role_of
from benchmarks.gateway_cpu import Spent, fit


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("python -m service", "gateway"),
        ("python -m benchmarks.bench.orders fifo", "gateway"),
        ("python -P -m service.media.worker {}", "decoder"),
        ("/opt/bin/tritonserver --model-repository x", "triton"),
        ("/opt/triton_python_backend_stub /repository/llm/1/model.py x", "llm"),
        ("python -m benchmarks.bench.naive x 1", "server"),
        ("python -c from_multiprocessing", "worker"),
    ],
)
def test_a_process_is_named_by_its_command_line(command: str, role: str):
    assert role_of([*command.split(), ""]) == role


def test_shared_pages_count_by_their_share():
    """Two processes of one program share its code, so their sum is below that of their resident memory."""
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    try:
        mine = [each for each in family(os.getpid()) if each.pid in {child.pid for child in children}]
        assert len(mine) == 2
        assert 0 < sum(map(proportional_bytes, mine)) < sum(each.rss_bytes for each in mine)
    finally:
        for child in children:
            child.communicate(b"\n")


def test_decoding_is_told_apart_from_the_gateways_own_time():
    found = fit([Spent(tokens, 5.0 + 0.1 * tokens, 2.0, 1.0) for tokens in (1.0, 6.0, 12.0)])
    assert (found["ms_a_request"], found["ms_a_token"]) == (5.0, 0.1)
    assert (found["decoder_ms_a_request"], found["triton_ms_a_request"]) == (2.0, 1.0)


def test_a_benchmark_that_is_told_to_end_ends_what_it_started(tmp_path: Path):
    program = """
import sys, time
from pathlib import Path
from benchmarks.bench.systems import process

with process(["sleep", "600"], Path(sys.argv[1])) as started:
    print(started.pid, flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as benchmark:
        pid = int(benchmark.stdout.readline())
        benchmark.terminate()
        assert benchmark.wait(20) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
