import pytest

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
    assert store.put(image, now=0) == 100
    assert store.put(image, now=50) == 150
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
