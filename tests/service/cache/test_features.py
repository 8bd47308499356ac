import asyncio
import math

import numpy as np
import pytest

from service.cache.features import FeatureCache, SharedTier
from service.cache.keys import FeatureKey
from service.core.errors import Unavailable
from service.core.vision import Int8Rows, VisionFeatures
from service.telemetry.metrics import Metrics
from tests.support.samples import sample


def key(name: str) -> FeatureKey:
    return FeatureKey("encoder", 224, name)


def features(value: float = 0.0) -> VisionFeatures:
    """20 bytes."""
    return VisionFeatures(*(np.full(n, value, np.float32) for n in (2, 1, 1, 1)))


def lookups(metrics: Metrics) -> dict[str, float]:
    every = ("hit", "miss", "shared")
    name = "glimpse_feature_cache_lookups_total"
    return {r: sample(metrics, name, {"tier": "memory", "result": r}) or 0 for r in every}


async def done(brought: VisionFeatures) -> asyncio.Task[VisionFeatures]:
    """Return an encode that has ended."""
    encode: asyncio.Task[VisionFeatures] = asyncio.create_task(asyncio.sleep(0, brought))
    await encode
    return encode


class Asker:
    """Requests for images; an encode lasts until `release` is set."""

    def __init__(self, max_bytes: int = 1000, shared: SharedTier | None = None) -> None:
        self.metrics = Metrics()
        self.cache = FeatureCache(max_bytes, self.metrics, shared)
        self.release = asyncio.Event()
        self.encodes = 0
        self.encoding = asyncio.Event()

    async def ask(self, name: str, error: Exception | None = None, *, patient: bool = False) -> VisionFeatures:
        async with self.cache.find(key(name), patient=patient) as found:
            if found.features is not None:
                return found.features
            self.encodes += 1
            self.encoding.set()
            await self.release.wait()
            if error is not None:
                raise error
            brought = features(self.encodes)
            found.expect(await done(brought))
            return brought


async def turn() -> None:
    """Lets every task that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_second_request_hits():
    asker = Asker()
    asker.release.set()
    first = await asker.ask("a")
    assert await asker.ask("a") is first
    assert asker.encodes == 1
    assert lookups(asker.metrics) == {"hit": 1, "miss": 1, "shared": 0}


async def test_concurrent_requests_for_one_image_share_one_encode():
    asker = Asker()
    tasks = [asyncio.create_task(asker.ask("a")) for _ in range(20)]
    await turn()
    asker.release.set()
    brought = await asyncio.gather(*tasks)
    assert asker.encodes == 1
    assert all(one is brought[0] for one in brought)
    assert lookups(asker.metrics) == {"hit": 0, "miss": 1, "shared": 19}


async def test_other_images_do_not_wait():
    asker = Asker()
    waiting = asyncio.create_task(asker.ask("a"))
    await turn()
    async with asyncio.timeout(5), asker.cache.find(key("b")) as found:
        assert found.features is None
    asker.release.set()
    await waiting


async def test_only_the_patient_wait_for_the_patient():
    asker = Asker()
    async with asker.cache.find(key("a"), patient=True) as patient, asyncio.timeout(5):
        assert patient.features is None
        second = asyncio.create_task(asker.ask("a", patient=True))
        await turn()
        assert asker.encodes == 0
        first = asyncio.create_task(asker.ask("a"))
        await turn()
        assert asker.encodes == 1
        third = asyncio.create_task(asker.ask("a", patient=True))
        asker.release.set()
        assert await first is await third
        assert await second is await first  # though the patient leader has not encoded
        assert patient.features is None
    assert await asker.ask("a", patient=True) is await first
    assert asker.encodes == 1


async def test_a_cancelled_leader_hands_over_and_nobody_hangs():
    asker = Asker()
    leader, *others = [asyncio.create_task(asker.ask("a")) for _ in range(5)]
    await turn()
    leader.cancel()
    await turn()
    assert asker.encodes == 2  # one of the others leads now
    asker.release.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*others)
    assert asker.encodes == 2
    assert leader.cancelled()


async def test_what_a_leader_expects_is_kept_although_it_leaves():
    asker = Asker()
    release = asyncio.Event()

    async def encode() -> VisionFeatures:
        await release.wait()
        return features(7)

    async with asker.cache.find(key("a")) as found:
        found.expect(asyncio.create_task(encode()))
    waiting = asyncio.create_task(asker.ask("a"))
    await turn()
    assert asker.encodes == 0
    release.set()
    async with asyncio.timeout(5):
        assert (await waiting).features[0] == 7
    assert len(asker.cache) == 1


@pytest.mark.parametrize("end", ["fails", "is cancelled"])
async def test_what_a_leader_expects_in_vain_is_led_again(end):
    asker = Asker()
    asker.release.set()

    async def encode() -> VisionFeatures:
        raise asyncio.CancelledError if end == "is cancelled" else Unavailable("no")

    async with asker.cache.find(key("a")) as found:
        found.expect(asyncio.create_task(encode()))
    async with asyncio.timeout(5):
        await asker.ask("a")
    assert asker.encodes == 1


async def test_a_failed_leader_fails_for_itself_only():
    asker = Asker()
    leader = asyncio.create_task(asker.ask("a", Unavailable("gone")))
    await turn()
    other = asyncio.create_task(asker.ask("a"))
    await turn()
    asker.release.set()
    with pytest.raises(Unavailable):
        await leader
    assert await other is await asker.ask("a")


async def test_a_cancelled_waiter_leaves_the_flight_alone():
    asker = Asker()
    leader, waiter, other = [asyncio.create_task(asker.ask("a")) for _ in range(3)]
    await turn()
    waiter.cancel()
    await turn()
    asker.release.set()
    assert await leader is await other
    assert asker.encodes == 1


async def test_the_least_recently_used_goes_first_and_bytes_stay_in_bounds():
    asker = Asker(max_bytes=60)
    asker.release.set()
    for name in "abc":
        await asker.ask(name)
    await asker.ask("a")
    await asker.ask("d")  # pushes b out
    assert asker.cache.nbytes == 60
    assert len(asker.cache) == 3
    assert asker.encodes == 4
    await asker.ask("a")
    assert asker.encodes == 4
    await asker.ask("b")
    assert asker.encodes == 5
    memory = {"tier": "memory"}
    assert sample(asker.metrics, "glimpse_feature_cache_evictions_total", memory) == 2
    assert sample(asker.metrics, "glimpse_feature_cache_bytes", memory) == 60


async def test_features_larger_than_the_cache_still_reach_those_who_wait():
    asker = Asker(max_bytes=10)
    tasks = [asyncio.create_task(asker.ask("a")) for _ in range(3)]
    await turn()
    asker.release.set()
    await asyncio.gather(*tasks)
    assert asker.encodes == 1
    assert len(asker.cache) == asker.cache.nbytes == 0


async def test_another_encoder_or_view_is_another_key():
    asker = Asker()
    asker.release.set()
    await asker.ask("a")
    for other in (FeatureKey("other", 224, "a"), FeatureKey("encoder", 448, "a")):
        async with asker.cache.find(other) as found:
            assert found.features is None


async def test_int8_is_kept_under_a_key_of_its_own_and_takes_a_quarter():
    shared = FakeShared()
    shared.gate.set()
    cache = FeatureCache(10**6, Metrics(), shared, as_int8=True)
    rows = np.random.default_rng(0).standard_normal((257, 160), np.float32)
    seen = VisionFeatures(rows, *(np.zeros(256, np.float32) for _ in range(3)))
    async with cache.find(key("a")) as found:
        found.expect(await done(seen))
    async with cache.find(key("a")) as found:
        assert isinstance(found.features.features, Int8Rows)
        assert found.features.features.dense() == pytest.approx(rows, abs=0.05)
        assert found.features.nbytes == cache.nbytes < 0.3 * seen.nbytes
    assert [each.fingerprint for each in shared.asked] == ["encoder.int8"] * 2  # find, put
    assert isinstance(shared.brought.features, Int8Rows)


class FakeShared:
    """Looks for as long as `gate` is closed; tells what it was told."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.there: dict[FeatureKey, VisionFeatures] = {}
        self.told: list[str] = []
        self.asked: list[FeatureKey] = []  # for or of
        self.patience_s: list[float] = []
        self.brought: VisionFeatures | None = None

    async def find(self, key: FeatureKey, patience_s: float) -> VisionFeatures | None:
        self.asked.append(key)
        self.patience_s.append(patience_s)
        self.told.append("find")
        await self.gate.wait()
        return self.there.get(key)

    def put(self, key: FeatureKey, vision: VisionFeatures) -> None:
        self.asked.append(key)
        self.brought = vision
        self.told.append("put")

    def give_up(self, key: FeatureKey) -> None:
        self.told.append("give_up")


async def test_only_the_first_asks_the_shared_tier_and_all_get_what_it_has():
    shared = FakeShared()
    shared.there[key("a")] = features(7.0)
    asker = Asker(shared=shared)
    tasks = [asyncio.create_task(asker.ask("a")) for _ in range(5)]
    await turn()
    shared.gate.set()
    assert {id(found) for found in await asyncio.gather(*tasks)} == {id(shared.there[key("a")])}
    assert asker.encodes == 0
    assert shared.told == ["find"]
    assert await asker.ask("a") is shared.there[key("a")]  # from memory
    assert shared.told == ["find"]


async def test_the_flight_has_landed_while_the_caller_works_with_shared_features():
    shared = FakeShared()
    shared.gate.set()
    shared.there[key("a")] = features()
    asker = Asker(shared=shared)
    async with asker.cache.find(key("a")) as found, asyncio.timeout(5):
        assert await asker.ask("a") is found.features


async def test_whoever_leads_tells_the_shared_tier_how_it_ended():
    shared = FakeShared()
    shared.gate.set()
    asker = Asker(shared=shared)
    asker.release.set()
    with pytest.raises(Unavailable):
        await asker.ask("a", Unavailable("gone"))
    await asker.ask("a")
    assert shared.told == ["find", "give_up", "find", "put"]


async def test_one_cancelled_while_it_looks_hands_over():
    shared = FakeShared()
    asker = Asker(shared=shared)
    asker.release.set()
    leader, other = [asyncio.create_task(asker.ask("a")) for _ in range(2)]
    await turn()
    leader.cancel()
    await turn()
    assert shared.told == ["find", "find"]
    shared.gate.set()
    await other
    assert asker.encodes == 1


async def test_who_waited_for_a_leader_in_vain_has_half_of_what_is_left_for_another_gateway():
    shared = FakeShared()
    asker = Asker(shared=shared)
    leader = asyncio.create_task(asker.ask("a"))
    await turn()

    async def wait_behind() -> None:
        async with asker.cache.find(key("a"), 10.0):
            pass

    behind = asyncio.create_task(wait_behind())
    await turn()
    leader.cancel()
    shared.gate.set()
    await behind
    assert shared.patience_s[0] == math.inf
    assert 0 < shared.patience_s[1] < 5.0
