"""The log is written beside the service: a reader that stands still or a full disk costs lines, never a request."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import structlog

from service.system.output import Output, Stream
from tests.support.servers import eventually


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        for descriptor in (reader, writer):
            os.close(descriptor)


def test_lines_come_out_in_order() -> None:
    with pipe() as (reader, writer):
        output = Output()
        stream = Stream(output, writer)
        for number in range(100):
            stream.write(f"line {number}\n")
        stream.flush()
        output.close()
        assert os.read(reader, 10_000).decode() == "".join(f"line {number}\n" for number in range(100))


def test_a_reader_that_stands_still_holds_nobody_up_and_lost_lines_are_told() -> None:
    line = "x" * 999 + "\n"
    with pipe() as (reader, writer), structlog.testing.capture_logs() as told:
        output = Output(most_bytes=200_000)
        began = time.monotonic()
        for _ in range(1000):
            output.write(writer, line)
        output.close(timeout_s=0.1)
        assert time.monotonic() - began < 2
        came = 0
        while came < 200_000:
            came += len(os.read(reader, 65_536))
        eventually(lambda: told, 5, "the loss is told")
        lost = sum(each["lines"] for each in told)
        assert {each["event"] for each in told} == {"log_lines_lost"}
        output.close()
        os.set_blocking(reader, False)
        with suppress(BlockingIOError):
            came += len(os.read(reader, 1_000_000))
        assert came == (1000 - lost) * 1000


def test_a_full_disk_fails_nobody() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    with pipe() as (reader, writer), structlog.testing.capture_logs() as told:
        output = Output()
        for _ in range(3):
            output.write(full, "a line\n")
        output.write(writer, "room again\n")
        output.close()
        assert os.read(reader, 100) == b"room again\n"
        eventually(lambda: told, 5, "the loss is told")
        assert [(each["event"], each["lines"]) for each in told] == [("log_lines_lost", 3)]
    os.close(full)


def test_a_pipe_that_another_program_made_non_blocking_gets_every_line() -> None:
    line = "y" * 999 + "\n"
    with pipe() as (reader, writer):
        os.set_blocking(writer, False)
        output = Output()
        for _ in range(200):
            output.write(writer, line)
        came = 0
        while came < 200_000:
            came += len(os.read(reader, 65_536))
        assert came == 200_000


def test_a_process_without_the_stream_writes_nothing() -> None:
    assert Stream(Output(), None).write("nobody reads this") == 17


def test_text_that_is_no_unicode_is_written_escaped() -> None:
    with pipe() as (reader, writer):
        output = Output()
        output.write(writer, "\udcff\n")
        output.close()
        assert os.read(reader, 100) == b"\\udcff\n"
