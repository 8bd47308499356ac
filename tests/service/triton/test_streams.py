"""A stream's reader waits no longer than its limits, whoever is slow."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from service.triton.streams import Silent, Stream


class Call:
    """A call whose responses come when they are put."""

    def __init__(self) -> None:
        self.responses: asyncio.Queue[object] = asyncio.Queue()

    async def read(self) -> object:
        return await self.responses.get()


async def ended(stream: Stream, call: Call) -> None:
    stream.close()
    call.responses.put_nowait(grpc.aio.EOF)
    await stream.reader


async def test_the_first_response_may_take_until_the_deadline():
    stream = Stream(call := Call(), timeout_s=5.0, stall_timeout_s=0.02)
    asyncio.get_running_loop().call_later(0.1, call.responses.put_nowait, "first")
    assert await stream.read() == "first"
    await ended(stream, call)


async def test_each_later_response_has_the_time_of_a_stall_of_its_own():
    stream = Stream(call := Call(), timeout_s=5.0, stall_timeout_s=0.1)
    for number in range(5):
        asyncio.get_running_loop().call_later(0.05, call.responses.put_nowait, number)
        assert await stream.read() == number
    began = asyncio.get_running_loop().time()
    with pytest.raises(Silent):
        await stream.read()
    assert asyncio.get_running_loop().time() - began >= 0.1
    await ended(stream, call)


async def test_the_deadline_is_of_all_responses_together():
    stream = Stream(call := Call(), timeout_s=0.12, stall_timeout_s=5.0)
    for number in range(2):
        asyncio.get_running_loop().call_later(0.05, call.responses.put_nowait, number)
        assert await stream.read() == number
    with pytest.raises(TimeoutError) as caught:
        await stream.read()
    assert not isinstance(caught.value, Silent)
    await ended(stream, call)


async def test_a_reader_that_comes_late_finds_what_has_come():
    stream = Stream(call := Call(), timeout_s=5.0, stall_timeout_s=0.02)
    for number in range(3):
        call.responses.put_nowait(number)
    assert await stream.read() == 0
    await asyncio.sleep(0.1)  # the reader does something else: that is no silence
    assert [await stream.read(), await stream.read()] == [1, 2]
    with pytest.raises(Silent):
        await stream.read()
    await ended(stream, call)


async def test_a_reader_that_leaves_does_not_end_the_call():
    stream = Stream(call := Call(), timeout_s=5.0, stall_timeout_s=5.0)
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    call.responses.put_nowait("late")
    assert await stream.read() == "late"
    assert not stream.is_over
    await ended(stream, call)
    assert await stream.read() is grpc.aio.EOF
