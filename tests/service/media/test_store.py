import random
import re
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.media.store import ID, MOST_DELETED, MOST_NAMES, Image, ImageStore, Kept, address_of
from service.settings import IMAGE_ENTRY_BYTES
from tests.support.pictures import encoded, picture


def image(name: str, nbytes: int = 100) -> Image:
    """An image whose id is its name."""
    data = name.encode().ljust(nbytes)
    return Image(data, Image.of(data).digest, name)


def small_store(entries: int) -> ImageStore:
    return ImageStore(entries * (100 + IMAGE_ENTRY_BYTES), ttl_s=100)


def held(store: ImageStore, name: str, tenant: str = "") -> Kept:
    """Look at an image that is there, as a request does."""
    found = store.get(name, 0, tenant)
    assert found is not None
    store.hold(found)
    return found


def kept(store: ImageStore, names: list[str], now: float = 0, tenant: str = "") -> list[str]:
    return [name for name in names if store.get(name, now, tenant) is not None]


def test_an_id_is_random_and_bound_to_tenant_and_content():
    store = ImageStore(1000, 100)
    names = {store.name(digest, tenant) for digest in ("d", "e") for tenant in ("a", "b")}
    assert len(names) == 4
    assert all(ID.fullmatch(name) for name in names)
    assert store.name("d", "a") in names
    assert ImageStore(1000, 100).name("d", "a") not in names


def test_ids_that_are_remembered_are_bounded():
    store = ImageStore(1000, 100)
    first, second = store.name("0", ""), store.name("1", "")
    store.name("0", "")
    for number in range(2, MOST_NAMES + 1):
        store.name(str(number), "")
    assert store.name("0", "") == first
    assert store.name("1", "") != second


def test_only_the_tenant_that_sent_an_image_reads_it():
    store = small_store(9)
    one = image("one")
    store.put(one, 0, "a")
    assert store.get("one", 0, "a").image is one
    assert store.get("one", 0, "b") is None
    assert store.get("one", 0) is None
    assert address_of("a", "one") != address_of("b", "one")
    assert re.fullmatch("[0-9a-f]{40}", address_of("a", "one"))


def test_the_store_forgets_the_least_recently_used_first():
    store = small_store(3)
    for name in "abc":
        store.put(image(name), 0)
    assert kept(store, ["a"], 1) == ["a"]
    store.put(image("d"), 2)
    assert kept(store, ["a", "b", "c", "d"], 3) == ["a", "c", "d"]
    assert store.nbytes == store.max_bytes


def test_the_store_forgets_when_the_time_is_over_and_a_second_upload_renews_it():
    store = small_store(9)
    store.put(image("a"), 0)
    assert kept(store, ["a"], 99) == ["a"]
    store.put(image("a"), 50)
    assert kept(store, ["a"], 149) == ["a"]
    assert kept(store, ["a"], 150) == []
    assert (len(store), store.nbytes) == (0, 0)
    store.put(image("a"), 150, ttl_s=5)
    assert (kept(store, ["a"], 154), kept(store, ["a"], 155)) == (["a"], [])


def test_a_deleted_image_is_gone_and_so_is_its_id():
    store = small_store(9)
    name = store.name(image("a").digest, "t")
    store.put(Image(image("a").data, image("a").digest, name), 0, "t")
    assert not store.forget(address_of("other", name))
    assert store.forget(address_of("t", name))
    assert not store.forget(address_of("t", name))
    assert (store.get(name, 0, "t"), len(store), store.nbytes) == (None, 0, 0)
    assert store.name(image("a").digest, "t") != name


def test_the_store_is_bounded_for_tiny_images_and_lets_expired_ones_go():
    store = ImageStore(max_bytes=100_000, ttl_s=100)
    for number in range(1000):
        store.put(image(str(number), 3), 0)
    assert len(store) < 100
    store.put(image("later", 5), 100)
    assert (len(store), store.nbytes) == (1, 5 + IMAGE_ENTRY_BYTES)


@pytest.mark.parametrize(("size", "larger"), [((224, 224), False), ((225, 10), True), ((10, 225), True)])
def test_an_image_tells_whether_it_has_more_pixels_than_are_seen(size, larger):
    assert Image.of(encoded(picture(*size), "PNG")).larger_than(224) is larger
    assert Image.of(b"\xff\xd8").larger_than(224)  # may be


def test_one_tenants_images_push_out_its_own_first() -> None:
    store = small_store(6)
    for name in ("a1", "a2"):
        store.put(image(name), 0, "a")
    for number in range(20):
        store.put(image(f"b{number}"), 0, "b")
    assert kept(store, ["a1", "a2"], tenant="a") == ["a1", "a2"]
    assert kept(store, [f"b{number}" for number in range(20)], tenant="b") == ["b16", "b17", "b18", "b19"]
    assert store.nbytes == store.max_bytes


def test_a_tenant_may_hold_all_until_another_comes() -> None:
    store = small_store(4)
    for number in range(4):
        store.put(image(f"a{number}"), 0, "a")
    assert kept(store, ["a0"], tenant="a") == ["a0"]
    store.put(image("b"), 0, "b")
    assert kept(store, ["a0", "a1", "a2", "a3"], tenant="a") == ["a0", "a2", "a3"]
    assert kept(store, ["b"], tenant="b") == ["b"]


def test_one_large_image_counts_as_many_small_ones() -> None:
    store = ImageStore(10_000, ttl_s=100)
    store.put(image("small"), 0, "a")
    store.put(image("large", 7000), 0, "b")
    store.put(image("larger", 7000), 0, "b")
    assert kept(store, ["small"], tenant="a") == ["small"]
    assert len(store) == 2


def test_an_image_of_two_tenants_counts_for_each() -> None:
    store = small_store(4)
    store.put(image("both"), 0, "a")
    store.put(image("both"), 50, "b")
    assert len(store) == 2
    for number in range(20):
        store.put(image(f"a{number}"), 50, "a")
    assert kept(store, ["both"], 140, "b") == ["both"]
    assert kept(store, ["both"], 140, "a") == []
    assert kept(store, ["both"], 150, "b") == []


def test_expired_images_go_first_whoever_sent_them() -> None:
    store = small_store(3)
    store.put(image("old"), 0, "a")
    for name in ("b1", "b2"):
        store.put(image(name), 99, "b")
    store.put(image("b3"), 100, "b")
    assert kept(store, ["old"], 101, "a") == []
    assert kept(store, ["b1", "b2", "b3"], 101, "b") == ["b1", "b2", "b3"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 40)), max_size=80))
def test_the_bytes_are_those_of_the_kept_images_and_within_the_limit(steps: list[tuple[str, int, int]]) -> None:
    store, now = small_store(5), 0
    for tenant, number, later in steps:
        now += later
        store.put(image(str(number)), now, tenant)
        assert store.get(str(number), now, tenant) is not None
        assert store.nbytes <= store.max_bytes
        assert len(store) * (100 + IMAGE_ENTRY_BYTES) == store.nbytes
    for tenant in "abc":
        store.put(image("last"), now + 1000, tenant)
    assert (len(store), store.nbytes) == (3, 3 * (100 + IMAGE_ENTRY_BYTES))


def test_the_tenant_with_the_most_bytes_always_loses_the_image() -> None:
    store, drawn, owner = small_store(40), random.Random(3), dict[str, str]()
    for number in range(2000):
        name, tenant = f"i{number}", drawn.choice("abcdefgh")
        if owner and drawn.random() < 0.2:
            gone = drawn.choice(list(owner))
            store.forget(address_of(owner.pop(gone), gone))
        before = Counter(owner.values()) + Counter([tenant])
        store.put(image(name), 0, tenant)
        owner[name] = tenant
        lost = [each for each in owner if store.get(each, 0, owner[each]) is None]
        assert [before[owner.pop(each)] for each in lost] == [max(before.values())] * (sum(before.values()) > 40)


def test_making_room_takes_no_time_for_each_tenant() -> None:
    def put_s(tenants: int) -> float:
        """CPU seconds of a put into a full store, in the best of some tries."""
        store = small_store(tenants)
        for number in range(tenants):
            store.put(image(str(number)), 0, str(number))
        tries = []
        for step in range(5):
            new = [(image(f"n{step}-{number}"), str(number)) for number in range(50)]
            began = time.thread_time()
            for each, tenant in new:
                store.put(each, 0, tenant)
            tries.append(time.thread_time() - began)
        return min(tries)

    assert put_s(20_000) < 15 * put_s(20)


def test_an_image_that_a_request_looks_at_makes_no_room() -> None:
    store = small_store(3)
    for name in "abc":
        store.put(image(name), 0)
    one = held(store, "a")
    for name in "de":
        assert store.put(image(name), 0)
    assert kept(store, list("abcde")) == ["a", "d", "e"]
    assert store.held_bytes == store.held_by("") == 100 + IMAGE_ENTRY_BYTES
    store.let_go(one)
    assert (store.held_bytes, store.held_by("")) == (0, 0)
    store.put(image("f"), 0)  # "a" was let go after the others were last used
    assert kept(store, list("adef")) == ["a", "e", "f"]


def test_several_requests_hold_one_image_once() -> None:
    store = small_store(2)
    store.put(image("a"), 0, "t")
    first, second = held(store, "a", "t"), held(store, "a", "t")
    assert first is second
    store.let_go(first)
    assert store.held_by("t") == store.nbytes == 100 + IMAGE_ENTRY_BYTES
    for name in "bcd":
        store.put(image(name), 0, "t")
    assert kept(store, list("abcd"), tenant="t") == ["a", "d"]
    store.let_go(second)
    assert store.held_bytes == 0


def test_there_is_no_room_if_requests_hold_everything_and_then_nothing_else_has_to_go() -> None:
    store = small_store(3)
    for name in "abc":
        store.put(image(name), 0)
    ones = [held(store, name) for name in "ab"]
    assert not store.has_room(2 * (100 + IMAGE_ENTRY_BYTES))
    assert not store.put(image("large", 200 + IMAGE_ENTRY_BYTES), 0)
    assert kept(store, list("abc")) == ["a", "b", "c"]
    ones.append(held(store, "c"))
    assert not store.has_room(1)
    assert not store.put(image("d"), 0)
    assert store.put(image("a"), 50)  # it is here: only its time begins anew
    assert kept(store, list("abc"), 120) == ["a"]
    assert store.nbytes == store.max_bytes
    for each in ones:
        store.let_go(each)
    assert store.nbytes == 100 + IMAGE_ENTRY_BYTES
    assert store.put(image("d"), 120)


@pytest.mark.parametrize("how", ["deleted", "expired"])
def test_what_is_dropped_while_a_request_looks_at_it_counts_until_the_end(how: str) -> None:
    store = small_store(2)
    store.put(image("a"), 0)
    one = held(store, "a")
    if how == "deleted":
        assert store.forget(address_of("", "a"))
    else:
        assert store.get("a", 100) is None
    assert (len(store), store.nbytes) == (0, 100 + IMAGE_ENTRY_BYTES)
    for name in "bc":
        assert store.put(image(name), 100)
    assert kept(store, list("abc"), 100) == ["c"]  # one place is not free yet
    store.let_go(one)
    assert store.put(image("d"), 100)
    assert kept(store, list("abcd"), 100) == ["c", "d"]
    assert store.nbytes == store.max_bytes


def test_an_image_that_is_sent_again_keeps_its_first_bytes() -> None:
    store, first = small_store(2), image("a")
    one = store.put(first, 0)
    assert store.put(image("a"), 1) is one
    assert one.image is first
    assert len(store) == 1


def test_a_new_image_finds_room_though_its_tenant_holds_the_most() -> None:
    store = ImageStore(4 * (100 + IMAGE_ENTRY_BYTES), 100)
    for name in "abcd":
        store.put(image(name), 0, name)
    large = image("large", 2 * (100 + IMAGE_ENTRY_BYTES) - IMAGE_ENTRY_BYTES)
    assert store.put(large, 0, "e")
    assert kept(store, ["large"], tenant="e") == ["large"]
    assert store.nbytes == store.max_bytes


def test_what_one_tenants_requests_hold_pushes_out_its_own_images_first() -> None:
    store = small_store(6)
    store.put(image("b"), 0, "b")
    for number in range(5):
        store.put(image(f"a{number}"), 0, "a")
    ones = [held(store, f"a{number}", "a") for number in range(4)]
    assert store.put(image("a5"), 0, "a")
    assert kept(store, ["a4", "a5"], tenant="a") == ["a5"]
    assert kept(store, ["b"], tenant="b") == ["b"]
    ones.append(held(store, "a5", "a"))
    assert store.put(image("c"), 0, "c")  # the tenant that has the most has none to lose
    assert kept(store, ["c"], tenant="c") == ["c"]
    assert kept(store, ["b"], tenant="b") == []
    assert len(ones) == 5


def test_an_image_whose_time_is_over_when_it_comes_is_dropped_at_the_next_look() -> None:
    store = small_store(2)
    assert store.put(image("a"), 0, ttl_s=0.0)
    assert store.get("a", 0) is None
    assert store.put(image("a"), 0, ttl_s=0.0)
    assert store.put(image("b"), 0)
    assert (len(store), store.nbytes) == (1, 100 + IMAGE_ENTRY_BYTES)


def test_what_is_on_its_way_under_an_id_that_was_deleted_is_not_kept() -> None:
    store = small_store(9)
    name = store.name("digest", "t")
    assert not store.forget(address_of("t", name))  # before it came
    assert store.put(Image(b"data", "digest", name), 0, "t") is None
    again = store.name("digest", "t")
    assert again != name
    assert store.name("digest", "t") == again
    assert store.put(Image(b"data", "digest", again), 0, "t")


def test_deleted_ids_that_are_remembered_are_bounded() -> None:
    store = small_store(9)
    for number in range(MOST_DELETED + 2):
        store.forget(address_of("", str(number)))
        store.forget(address_of("", "0"))
    assert [store.is_deleted(address_of("", str(number))) for number in (0, 1, 2, 3, MOST_DELETED)] == [
        True,
        False,
        False,
        True,
        True,
    ]


STEPS = st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 3), st.integers(0, 40))


@given(st.lists(STEPS, max_size=80))
def test_whatever_is_held_the_bytes_in_memory_stay_within_the_limit(steps: list[tuple[str, int, int, int]]) -> None:
    store, now, ones, deleted = small_store(5), 0, list[Kept](), set[tuple[str, int]]()
    size = 100 + IMAGE_ENTRY_BYTES
    for tenant, number, action, later in steps:
        now += later
        if action == 0:
            is_here, fits = store.get(str(number), now, tenant) is not None, store.held_bytes <= 4 * size
            is_kept = store.put(image(str(number)), now, tenant) is not None
            assert is_kept == ((tenant, number) not in deleted and (is_here or fits))
        elif action == 1 and (found := store.get(str(number), now, tenant)) is not None:
            store.hold(found)
            ones.append(found)
        elif action == 2:
            store.forget(address_of(tenant, str(number)))
            deleted.add((tenant, number))
        elif ones:
            store.let_go(ones.pop(number % len(ones)))
        apart = {id(each) for each in ones if each.dropped}
        assert store.nbytes == (len(store) + len(apart)) * size <= store.max_bytes
        assert store.held_bytes == len({id(each) for each in ones}) * size
        assert store.held_bytes == sum(store.held_by(each) for each in "abc")
    for each in ones:
        store.let_go(each)
    assert store.held_bytes == 0
    names = [f"last{number}" for number in range(5)]
    for name in names:
        assert store.put(image(name), now + 1000, "a")
    assert kept(store, names, now + 1000, "a") == names
