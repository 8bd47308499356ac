import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.core.errors import NotFound
from service.media.store import Image, ImageStore
from service.settings import IMAGE_ENTRY_BYTES
from tests.support.pictures import encoded, picture


def test_an_image_is_named_by_its_bytes():
    image = Image.of(b"x")
    assert image.id == f"img_{image.digest[:32]}"
    assert Image.of(b"y").id != image.id


def test_the_store_forgets_the_least_recently_used_first():
    store = ImageStore(max_bytes=3 * (10 + IMAGE_ENTRY_BYTES), ttl_s=100)
    a, b, c = (Image.of(letter * 10) for letter in (b"a", b"b", b"c"))
    for image in (a, b, c):
        store.put(image, now=0)
    store.get(a.id, now=1)
    store.put(Image.of(b"d" * 10), now=2)
    assert store.get(a.id, now=3) is a
    assert store.nbytes == store.max_bytes
    with pytest.raises(NotFound, match="POST /v1/images"):
        store.get(b.id, now=3)


def test_the_store_forgets_when_the_time_is_over_and_a_second_upload_renews_it():
    store = ImageStore(max_bytes=10_000, ttl_s=100)
    image = Image.of(b"a")
    store.put(image, now=0)
    assert store.get(image.id, now=99) is image
    store.put(image, now=50)
    assert store.get(image.id, now=149) is image
    with pytest.raises(NotFound, match="is not in memory"):
        store.get(image.id, now=150)
    assert (len(store), store.nbytes) == (0, 0)


def test_the_store_is_bounded_for_tiny_images_and_lets_expired_ones_go():
    store = ImageStore(max_bytes=100_000, ttl_s=100)
    for number in range(1000):
        store.put(Image.of(b"%d" % number), now=0)
    assert len(store) < 100
    store.put(Image.of(b"later"), now=100)
    assert (len(store), store.nbytes) == (1, 5 + IMAGE_ENTRY_BYTES)


@pytest.mark.parametrize(("size", "larger"), [((224, 224), False), ((225, 10), True), ((10, 225), True)])
def test_an_image_tells_whether_it_has_more_pixels_than_are_seen(size, larger):
    assert Image.of(encoded(picture(*size), "PNG")).larger_than(224) is larger
    assert Image.of(b"\xff\xd8").larger_than(224)  # may be


def image(name: str, nbytes: int = 100) -> Image:
    return Image.of(name.encode().ljust(nbytes))


def kept(store: ImageStore, names: list[str], now: float = 0) -> list[str]:
    found = []
    for name in names:
        with contextlib.suppress(NotFound):
            store.get(image(name).id, now)
            found.append(name)
    return found


def small_store(entries: int) -> ImageStore:
    return ImageStore(entries * (100 + IMAGE_ENTRY_BYTES), ttl_s=100)


def test_one_tenants_images_push_out_its_own_first() -> None:
    store = small_store(6)
    for name in ("a1", "a2"):
        store.put(image(name), 0, "a")
    for number in range(20):
        store.put(image(f"b{number}"), 0, "b")
    assert kept(store, ["a1", "a2"]) == ["a1", "a2"]
    assert kept(store, [f"b{number}" for number in range(20)]) == ["b16", "b17", "b18", "b19"]
    assert store.nbytes == store.max_bytes


def test_a_tenant_may_hold_all_until_another_comes() -> None:
    store = small_store(4)
    for number in range(4):
        store.put(image(f"a{number}"), 0, "a")
    store.get(image("a0").id, 0)
    store.put(image("b"), 0, "b")
    assert kept(store, ["a0", "a1", "a2", "a3", "b"]) == ["a0", "a2", "a3", "b"]


def test_one_large_image_counts_as_many_small_ones() -> None:
    store = ImageStore(10_000, ttl_s=100)
    store.put(image("small"), 0, "a")
    store.put(image("large", 7000), 0, "b")
    store.put(image("larger", 7000), 0, "b")
    assert kept(store, ["small"]) == ["small"]
    assert len(store) == 2


def test_an_image_of_two_tenants_stays_while_one_of_them_keeps_it() -> None:
    store = small_store(4)
    store.put(image("both"), 0, "a")
    store.put(image("both"), 50, "b")
    for number in range(20):
        store.put(image(f"a{number}"), 50, "a")
    assert kept(store, ["both"], 140) == ["both"]
    assert kept(store, ["both"], 150) == []


def test_expired_images_go_first_whoever_sent_them() -> None:
    store = small_store(3)
    store.put(image("old"), 0, "a")
    store.put(image("b1"), 99, "b")
    store.put(image("b2"), 99, "b")
    store.put(image("b3"), 100, "b")
    assert kept(store, ["old", "b1", "b2", "b3"], 101) == ["b1", "b2", "b3"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.integers(0, 40)), max_size=80))
def test_the_bytes_are_those_of_the_kept_images_and_within_the_limit(steps: list[tuple[str, int, int]]) -> None:
    store, now = small_store(5), 0
    for tenant, number, later in steps:
        now += later
        store.put(image(str(number)), now, tenant)
        assert store.get(image(str(number)).id, now) is not None
        assert store.nbytes <= store.max_bytes
        assert len(store) * (100 + IMAGE_ENTRY_BYTES) <= store.nbytes
    for tenant in "abc":
        store.put(image("last"), now + 1000, tenant)
    assert (len(store), store.nbytes) == (1, 3 * (100 + IMAGE_ENTRY_BYTES))
