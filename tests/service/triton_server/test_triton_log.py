"""A log that cannot be written is one line, and no reason to end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from service.triton_server import triton_log
from service.triton_server.triton_log import STDERR, TritonLog


def a_file_for_a_folder(folder: Path) -> Path:
    (folder / "logs").write_text("a file")
    return folder / "logs" / "triton.log"


def a_folder_for_the_file(folder: Path) -> Path:
    (folder / "triton.log").mkdir()
    return folder / "triton.log"


def no_such_place(_: Path) -> Path:
    return Path("/proc/nowhere/triton.log")


def a_fifo_that_nobody_reads(folder: Path) -> Path:
    os.mkfifo(folder / "triton.log")
    return folder / "triton.log"


def a_loop_of_links(folder: Path) -> Path:
    (folder / "triton.log").symlink_to(folder / "triton.log")
    return folder / "triton.log"


def a_name_that_is_too_long(folder: Path) -> Path:
    return folder / ("l" * 300) / "triton.log"


@pytest.mark.parametrize(
    "place",
    [
        a_file_for_a_folder,
        a_folder_for_the_file,
        no_such_place,
        a_fifo_that_nobody_reads,
        a_loop_of_links,
        a_name_that_is_too_long,
    ],
)
def test_what_cannot_be_written_is_told_once_and_stderr_takes_its_place(place, tmp_path: Path) -> None:
    written = TritonLog(place(tmp_path))
    with capture_logs() as lines:
        for _ in range(3):
            with written.opened() as output:
                assert output == STDERR
            assert "stderr" in written.last_words()
    (line,) = lines
    assert line["path"] == str(written.path)
    assert "GLIMPSE_LOG_DIR" in line["remedy"]


def test_a_log_that_is_mended_is_written_again_and_its_next_fault_told(tmp_path: Path) -> None:
    path = a_file_for_a_folder(tmp_path)
    written = TritonLog(path)
    with capture_logs() as lines:
        for _ in range(2):
            with written.opened() as output:
                assert output == STDERR
            path.parent.unlink()
            with written.opened() as output:
                os.write(output, b"error: no weights\nI a line\n")
            assert written.last_words().endswith("its last errors:\n  error: no weights")
            path.unlink()
            path.parent.rmdir()
            path.parent.write_text("a file")
    assert len(lines) == 2


def test_only_this_starts_words_are_told(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "triton.log"
    for word in ("first", "second"):
        written = TritonLog(path)
        with written.opened() as output:
            os.write(output, f"error: {word}\n".encode())
    assert "first" not in written.last_words()
    assert "second" in written.last_words()
    path.unlink()
    assert "cannot be read" in written.last_words()


def test_a_long_log_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_log, "LOG_BYTES", 3)
    path = tmp_path / "triton.log"
    path.write_text("long")
    with TritonLog(path).opened() as output:
        os.write(output, b"new")
    assert path.read_text() == "new"
    assert (tmp_path / "triton.previous.log").read_text() == "long"


def test_stderr_may_be_the_log() -> None:
    written = TritonLog(None)
    with capture_logs() as lines, written.opened() as output:
        assert output == STDERR
    assert "stderr" in written.last_words()
    assert lines == []
