"""What every transport finds out about its caller."""

from __future__ import annotations

import asyncio

import pytest

from service.core.errors import Cancelled, DeadlineExceeded, InvalidRequest
from service.edges.caller import READING_S, present, tenant_in, trace_id_in


@pytest.mark.parametrize("word", ["", "acme-1", "A.b_c:d", "x" * 64])
def test_a_tenant_is_a_plain_word_or_none(word):
    assert tenant_in(word) == word


@pytest.mark.parametrize("word", ["two words", "x" * 65, "é", "a\n"])
def test_another_tenant_is_refused(word):
    with pytest.raises(InvalidRequest) as caught:
        tenant_in(word)
    assert (caught.value.param, caught.value.code) == ("x-tenant-id", "invalid_tenant")


def test_the_first_plain_word_is_the_request_id():
    assert trace_id_in(["two words", "first", "second"]) == "first"
    made = {trace_id_in(words) for words in ([], [""], ["x" * 129])}
    assert {len(trace_id) for trace_id in made} == {32}
    assert len(made) == 3


async def test_a_block_ends_when_its_caller_is_gone():
    gone = asyncio.Event()

    async def leave() -> None:
        await gone.wait()

    asyncio.get_running_loop().call_soon(gone.set)
    with pytest.raises(Cancelled, match="went away"):
        async with present(leave, 60):
            await asyncio.Event().wait()


async def test_a_block_that_lasts_too_long_is_no_caller_that_has_gone():
    with pytest.raises(DeadlineExceeded, match="timeout_s=-1"):
        async with present(asyncio.Event().wait, -READING_S):
            await asyncio.Event().wait()


async def test_a_timeout_of_the_blocks_own_stays_what_it_is():
    with pytest.raises(TimeoutError, match="of its own"):
        async with present(asyncio.Event().wait, 60):
            raise TimeoutError("of its own")


async def test_a_block_that_ends_before_its_caller_leaves_nothing_behind():
    before = asyncio.all_tasks()
    async with present(asyncio.Event().wait, 60):
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before
