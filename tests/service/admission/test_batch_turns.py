import asyncio

from service.admission.batch_turns import BatchTurns
from tests.support.fakes import cancelled, turns


async def test_each_tenant_has_its_own_turns_and_all_its_batches_share_them():
    batch_turns, inside, end = BatchTurns(2), [], asyncio.Event()

    async def hold(tenant: str) -> None:
        async with batch_turns.turn(tenant):
            inside.append(tenant)
            await end.wait()

    tasks = [asyncio.create_task(hold(tenant)) for tenant in ("a", "a", "a", "b", "")]
    await turns()
    assert sorted(inside) == ["", "a", "a", "b"]
    assert len(batch_turns) == 3
    end.set()
    await asyncio.gather(*tasks)
    assert sorted(inside) == ["", "a", "a", "a", "b"]
    assert len(batch_turns) == 0


async def test_a_turn_that_is_waited_for_in_vain_is_not_lost():
    batch_turns = BatchTurns(1)

    async def wait() -> None:
        async with batch_turns.turn("a"):
            raise AssertionError("had a turn")

    async with batch_turns.turn("a"):
        waiting = asyncio.create_task(wait())
        await turns()
        await cancelled(waiting)
    assert len(batch_turns) == 0
    async with asyncio.timeout(1), batch_turns.turn("a"):
        assert len(batch_turns) == 1
