"""Tasks side by side: the first failure is raised itself, with its own cause."""

from __future__ import annotations

import asyncio

import pytest

from service.system.tasks import first_failure


async def test_the_first_failure_cancels_the_others_and_is_raised_with_its_cause():
    cancelled = asyncio.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def fail() -> None:
        raise ValueError("first") from KeyError("why")

    async def both() -> None:
        async with first_failure() as tasks:
            tasks.create_task(wait())
            tasks.create_task(fail())

    with pytest.raises(ValueError, match="first") as raised:
        await both()
    assert isinstance(raised.value.__cause__, KeyError)
    assert cancelled.is_set()


async def test_a_block_that_is_cancelled_raises_no_other_error():
    async def both() -> None:
        async with first_failure() as tasks:
            tasks.create_task(asyncio.Event().wait())

    task = asyncio.create_task(both())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
