from hypothesis import given, settings
from hypothesis import strategies as st

from service.cache.lru import Lru
from service.telemetry.metrics import Metrics
from tests.support.samples import sample


def lru(max_bytes: int) -> tuple[Lru[str, int], Metrics]:
    metrics = Metrics()
    return Lru(max_bytes, metrics.visual_cache_bytes, metrics.visual_cache_evictions), metrics


def counted(metrics: Metrics, name: str) -> float | None:
    return sample(metrics, f"glimpse_visual_cache_{name}")


def test_the_least_recently_used_goes_first():
    kept, metrics = lru(30)
    for number, name in enumerate("abc"):
        kept.keep(name, number, 10)
    assert kept.get("a") == 0
    kept.keep("d", 3, 10)
    assert [kept.get(name) for name in "abcd"] == [0, None, 2, 3]
    assert (counted(metrics, "bytes"), counted(metrics, "evictions_total")) == (30, 1)


def test_what_is_kept_again_takes_the_place_of_what_was_there():
    kept, _ = lru(30)
    kept.keep("a", 1, 10)
    kept.keep("a", 2, 20)
    assert (kept.get("a"), kept.nbytes, len(kept)) == (2, 20, 1)


def test_what_is_larger_than_all_is_not_kept_and_pushes_nothing_out():
    kept, _ = lru(30)
    kept.keep("a", 1, 10)
    kept.keep("b", 2, 31)
    assert (kept.get("a"), kept.get("b")) == (1, None)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40))))
def test_the_bytes_are_those_of_what_is_kept_and_never_over_the_bound(steps):
    kept, metrics = lru(60)
    sizes = {}
    for name, nbytes in steps:
        kept.keep(name, nbytes, nbytes)
        sizes[name] = nbytes
        assert kept.nbytes == sum(sizes[name] for name in "abcdef" if kept.get(name) is not None) <= 60
        assert kept.get(name) == nbytes
        assert counted(metrics, "bytes") == kept.nbytes


def test_what_fills_all_is_kept_and_a_byte_more_pushes_the_oldest_out():
    kept, metrics = lru(30)
    kept.keep("a", 1, 30)
    assert kept.get("a") == 1
    kept.keep("b", 2, 1)
    assert (kept.get("a"), kept.get("b"), len(kept)) == (None, 2, 1)
    assert (counted(metrics, "bytes"), counted(metrics, "evictions_total")) == (1, 1)


def test_a_look_whether_something_is_there_is_no_use():
    kept, _ = lru(20)
    kept.keep("a", 1, 10)
    kept.keep("b", 2, 10)
    assert "a" in kept
    assert "c" not in kept
    kept.keep("c", 3, 10)
    assert [name in kept for name in "abc"] == [False, True, True]


def test_what_is_kept_again_is_used():
    kept, _ = lru(20)
    kept.keep("a", 1, 10)
    kept.keep("b", 2, 10)
    kept.keep("a", 4, 10)
    kept.keep("c", 3, 10)
    assert [kept.get(name) for name in "abc"] == [4, None, 3]
