"""A background loop outlives its own faults, and tells of them once."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from service.system.watch import Watch


def test_a_fault_is_told_once_however_often_it_comes_in_a_row_and_again_after_a_good_round():
    watch = Watch("keys")
    with capture_logs() as lines:
        for fault in (OSError("a"), OSError("a"), OSError("b"), None, OSError("b")):
            with watch.surviving():
                if fault is not None:
                    raise fault
    assert [(line["event"], line["watch"], line["log_level"]) for line in lines] == [
        ("watch_failed", "keys", "error")
    ] * 3


def test_a_loop_that_is_cancelled_ends():
    with pytest.raises(asyncio.CancelledError), Watch("keys").surviving():
        raise asyncio.CancelledError
