"""The limit of open files is raised as far as connections need, and told if it is too low."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # together: every case starts a Python

PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from service.edges.http.protocol import most_connections, most_held
most = most_connections({wanted})
files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
print(most, files, most_held(most))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "most", "files", "held", "told"),
    [
        (1024, 8192, 4096, 4096, 4352, 3840, False),
        (8192, 8192, 4096, 4096, 8192, 3840, False),
        (1024, 1024, 4096, 768, 1024, 0, True),
        (256, 2000, 4096, 1744, 2000, 0, True),
        (300, 300, 4096, 150, 300, 0, True),
        (1024, 4352, 4096, 4096, 4352, 0, False),
        (1024, 4351, 4096, 4095, 4351, 0, True),
        (1024, 16384, 4096, 4096, 4352, 8192, False),
    ],
)
def test_as_many_connections_as_there_can_be_files(soft, hard, wanted, most, files, held, told):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.fail(f"this test needs a hard limit of {hard} open files (ulimit -Hn)")
    program = PROGRAM.format(soft=soft, hard=hard, wanted=wanted)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    *log, result = done.stdout.splitlines()
    assert result == f"{most} {files} {held}"
    assert ("few_open_files" in "".join(log)) is told
