"""Run the tests, and those that failed once more, alone and in one process. Fail if one fails again.

    python -m tests.support.again -n 2 --no-loadscope-reorder

Tests of real servers have deadlines, which a machine that is busy with something else can miss. What fails for a reason
fails the second time too. The last lines name each test that passed only the second time: a fault of the test, or of
the code, that shows now and then.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

MOST = 10  # failed tests that are run again: more of them are no chance


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes-to", type=Path, help="file for the names of passed and failed tests, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes_to")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(path))


class Recorder:
    """A plugin: writes the names of passed and failed tests at the end. None is there if a file was not collected."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._passed: dict[str, None] = {}  # ordered
        self._failed: dict[str, None] = {}
        self._collected = True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._collected &= not report.failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # or its fixtures
            self._failed[report.nodeid] = None
        elif report.when == "call" and report.passed:
            self._passed[report.nodeid] = None

    def pytest_sessionfinish(self) -> None:
        if self._collected:
            self._path.write_text(json.dumps({"passed": list(self._passed), "failed": list(self._failed)}))


@dataclass(frozen=True)
class Outcomes:
    """What one run of pytest ended with."""

    status: int
    passed: frozenset[str] = frozenset()
    failed: tuple[str, ...] = ()


def run(arguments: Sequence[str], file: Path) -> Outcomes:
    """Run pytest as a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.again", "--outcomes-to", str(file), *arguments]
    status = subprocess.run(command, check=False).returncode
    if not file.exists():
        return Outcomes(status)
    told = json.loads(file.read_text())
    failed = tuple(told["failed"])
    return Outcomes(status, frozenset(told["passed"]) - set(failed), failed)


def main(arguments: Sequence[str]) -> int:
    """Return the exit status: 0 if every test passed, the first or the second time."""
    with tempfile.TemporaryDirectory() as folder:
        first = run(arguments, Path(folder) / "first")
        if first.status != pytest.ExitCode.TESTS_FAILED or not 0 < len(first.failed) <= MOST:
            return first.status
        say(f"\n{len(first.failed)} failed, and run once more, alone:\n")
        second = run([*marker(arguments), *first.failed], Path(folder) / "second")
    lucky = [name for name in first.failed if name in second.passed]
    tell("PASSED ONLY THE SECOND TIME", lucky)
    tell("FAILED TWICE", [name for name in first.failed if name not in second.passed])
    return 0 if len(lucky) == len(first.failed) else first.status


def marker(arguments: Sequence[str]) -> Sequence[str]:
    """The choice of tests by their markers, which names of tests do not replace."""
    at = arguments.index("-m") if "-m" in arguments else len(arguments)
    return arguments[at : at + 2]


def tell(title: str, names: Sequence[str]) -> None:
    if names:
        say(f"\n{f' {title} ({len(names)}) ':=^100}", *(f"  {name}" for name in names))


def say(*lines: str) -> None:
    """Write at once: pytest's processes write to the same place."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # pytest has told it
        sys.exit(pytest.ExitCode.INTERRUPTED)
