"""What takes long is made once, and whole or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.once import Once


def test_all_who_ask_at_once_get_what_the_first_makes(tmp_path: Path) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "made").write_text(str(len(calls)))

    with ThreadPoolExecutor(4) as threads:  # each has a lock file of its own, as processes have
        found = set(threads.map(lambda _: Once(tmp_path).made("thing", make), range(8)))
    assert len(calls) == 1
    assert [(each / "made").read_text() for each in found] == ["1"]
    assert Once(tmp_path).made("other", make) not in found


def test_what_failed_is_made_by_the_next(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    def make(folder: Path) -> None:
        (folder / "whole").touch()

    with pytest.raises(RuntimeError):
        Once(tmp_path).made("thing", fail)
    assert [path.name for path in Once(tmp_path).made("thing", make).iterdir()] == ["whole"]
