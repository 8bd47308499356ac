"""What fails once is run again, and what fails for a reason fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.again import MOST
from tests.support.paths import PROJECT

pytestmark = pytest.mark.slow

LUCK = """
import pathlib, pytest

def test_good(): pass

@pytest.fixture
def first_time():
    seen = pathlib.Path("seen")
    if not seen.exists():
        seen.touch()
        raise RuntimeError("a busy machine")

@pytest.mark.parametrize("name", ["a b::[c]"])
def test_now_and_then(name, first_time): pass
"""
BAD = "def test_bad(): assert 1 == 2\n"
MANY = f"import pytest\n@pytest.mark.parametrize('n', range({MOST} + 1))\ndef test_each(n): raise RuntimeError\n"
TWICE, LUCKY = "FAILED TWICE", "PASSED ONLY THE SECOND TIME"


def suite(folder: Path, workers: str, *arguments: str, **files: str) -> tuple[int, str]:
    """Run these files' tests -> the exit status, and what is told."""
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "tests.support.again", "-q", "-p", "xdist.plugin", "-n", workers, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


def test_the_second_time_has_the_same_markers(tmp_path: Path) -> None:
    marked = "[pytest]\nmarkers = rare\naddopts = -m 'not rare'\n"
    (tmp_path / "pytest.ini").write_text(marked)
    status, told = suite(
        tmp_path, "0", "-m", "rare", test_luck=LUCK.replace("@pytest.mark.p", "@pytest.mark.rare\n@pytest.mark.p")
    )
    assert status == 0, told
    assert f"{LUCKY} (1)" in told


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_passes_the_second_time_passes_and_is_named_last(tmp_path: Path, workers: str) -> None:
    status, told = suite(tmp_path, workers, test_luck=LUCK)
    assert status == 0, told
    assert told.rstrip().splitlines()[-1] == "  test_luck.py::test_now_and_then[a b::[c]]"
    assert f"{LUCKY} (1)" in told
    assert TWICE not in told


def test_what_fails_for_a_reason_fails(tmp_path: Path) -> None:
    status, told = suite(tmp_path, "2", test_luck=LUCK, test_bad=BAD)
    assert status == 1, told
    assert told.index(f"{LUCKY} (1)") < told.index(f"{TWICE} (1)")
    assert told.rstrip().splitlines()[-1] == "  test_bad.py::test_bad"


def test_many_failures_are_no_chance(tmp_path: Path) -> None:
    status, told = suite(tmp_path, "0", test_many=MANY, test_luck=LUCK)
    assert status == 1
    assert LUCKY not in told
    assert TWICE not in told


def test_a_file_that_cannot_be_read_is_no_chance(tmp_path: Path) -> None:
    status, told = suite(tmp_path, "2", test_luck=LUCK, test_broken="import nothing_of_this_name")
    assert status not in (0, 5), told
    assert LUCKY not in told


def test_a_suite_that_passes_runs_once(tmp_path: Path) -> None:
    status, told = suite(tmp_path, "0", test_good="def test_good(): pass")
    assert status == 0
    assert told.count("1 passed") == 1
