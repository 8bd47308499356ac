"""The limit of open files is raised as far as connections need, and told if it is too low."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # it starts a Python that imports the HTTP edge

# The soft limit, the hard limit, the connections wanted; then the connections, files and held files that there can be,
# and whether it is told that these are few.
CASES = [
    (1024, 8192, 4096, 4096, 4352, 3840, False),
    (8192, 8192, 4096, 4096, 8192, 3840, False),
    (1024, 1024, 4096, 768, 1024, 0, True),
    (256, 2000, 4096, 1744, 2000, 0, True),
    (300, 300, 4096, 150, 300, 0, True),
    (1024, 4352, 4096, 4096, 4352, 0, False),
    (1024, 4351, 4096, 4095, 4351, 0, True),
    (1024, 16384, 4096, 4096, 4352, 8192, False),
]
# Limits that were lowered cannot be raised again, so each case has a process. They import once.
PROGRAM = """
import json, os, resource, sys
from service.edges.http.protocol import most_connections, most_held
for soft, hard, wanted in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        print("end", flush=True)
        continue
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    most = most_connections(wanted)
    print(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0], most_held(most), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def said() -> dict[tuple[int, ...], list[str]]:
    """The lines that each case writes."""
    asked = [case[:3] for case in CASES]
    program = [sys.executable, "-c", PROGRAM, json.dumps(asked)]
    done = subprocess.run(program, capture_output=True, text=True, check=True, timeout=60)
    return {case: part.splitlines() for case, part in zip(asked, done.stdout.split("end\n"), strict=False)}


@pytest.mark.parametrize(("soft", "hard", "wanted", "most", "files", "held", "told"), CASES)
def test_as_many_connections_as_there_can_be_files(said, soft, hard, wanted, most, files, held, told):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.fail(f"this test needs a hard limit of {hard} open files (ulimit -Hn)")
    *log, result = said[soft, hard, wanted]
    assert result == f"{most} {files} {held}"
    assert ("few_open_files" in "".join(log)) is told
