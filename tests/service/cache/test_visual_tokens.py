"""What a question got to see is found again by exactly what it was made from."""

from dataclasses import replace

import numpy as np

from service.cache.visual_tokens import ENTRY_BYTES, VisualCache, clip_embedding_key, embedding_key, visual_key
from service.core.request import Budget
from service.core.vision import Frame, Relevance, Seen, SeenClip
from service.telemetry.metrics import Metrics
from tests.support.calibrations import calibrated
from tests.support.fakes import CARD
from tests.support.samples import sample

BUDGET = Budget((64, 128), (32, 64))
ASKED = {"card": CARD, "digest": "d", "question": "q", "budget": BUDGET, "detail": "low"}
OTHERS = [
    {},
    {"card": replace(CARD, visual_fingerprint="w")},
    {"digest": "e"},
    {"question": "r"},
    {"detail": "high"},
    {"budget": Budget((65, 128), (32, 64))},
    {"budget": Budget((64, 129), (32, 64))},
    {"budget": Budget((64, 128), (64, 64))},
    {"budget": Budget((64, 128), (32, 96))},
    {"digest": "d\0low"},
    {"question": "q\0q"},
]


def seen(rows: int = 32, **changes: object) -> Seen:
    relevance = Relevance(
        np.zeros((16, 16), np.float32), np.zeros((3, 16, 16), np.float32), np.zeros((8, 8), np.int32),
        np.zeros(3, np.float32),
    )  # fmt: skip
    return replace(Seen(np.zeros((rows, 4), np.float32), relevance, BUDGET), **changes)


def counted(metrics: Metrics, name: str, **labels: str) -> float | None:
    return sample(metrics, f"glimpse_visual_cache_{name}", labels)


def test_every_part_tells_two_keys_apart():
    assert len({visual_key(**ASKED | other) for other in OTHERS}) == len(OTHERS)


def test_the_same_is_named_the_same_and_the_weights_that_made_it_count():
    assert visual_key(**ASKED) == visual_key(**ASKED)
    assert visual_key(**ASKED) == visual_key(**ASKED | {"card": replace(CARD, fingerprint="g", name="other")})
    assert visual_key(**ASKED) == b"v\0 tokenizer.json \0d\0low\x0064\x00128\x0032\x0064\0q"


def test_what_is_kept_for_one_variant_is_not_anothers_that_reads_or_judges_otherwise():
    read = replace(CARD, question_tokenizer="qformer.json")
    cards = [
        CARD,
        replace(CARD, confidence=calibrated(4)),
        replace(CARD, confidence=replace(calibrated(4), centre=np.ones(12, np.float32))),
        read,
        replace(read, prompt_template="Q: {question}"),
        replace(read, question_alone=True),
    ]
    assert len({visual_key(**ASKED | {"card": card}) for card in cards}) == len(cards)
    for unread in (CARD, replace(read, question_alone=True)):
        other = replace(unread, prompt_template="Q: {question}")
        assert visual_key(**ASKED | {"card": other}) == visual_key(**ASKED | {"card": unread})
    again = replace(CARD, confidence=calibrated(4))
    assert visual_key(**ASKED | {"card": again}) == visual_key(**ASKED | {"card": cards[1]})


def test_visual_tokens_are_named_by_what_they_were_made_with_and_whether_it_was_rounded():
    exact = embedding_key(CARD, "d", "q", seen())
    assert exact == visual_key(CARD, "d", "q", BUDGET, "low")
    assert embedding_key(CARD, "d", "q", seen(detail="high")) == visual_key(CARD, "d", "q", BUDGET, "high")
    assert embedding_key(CARD, "d", "q", seen(rounded=(0,))) == b"int8 0\0" + exact


def test_rounding_some_views_or_frames_and_rounding_others_make_different_visual_tokens():
    some = [(), (0,), (1,), (0, 1), (11,)]
    assert len({embedding_key(CARD, "d", "q", seen(detail="high", rounded=each)) for each in some}) == len(some)
    clip = SeenClip(np.zeros((64, 4), np.float32), (), BUDGET)
    frames = [Frame(index, None, index / 11, f"{index}") for index in range(12)]
    keys = {clip_embedding_key(CARD, frames, "q", replace(clip, rounded=each)) for each in some}
    assert len(keys) == len(some)


def test_the_first_key_that_has_something_gives_it_and_one_lookup_is_counted():
    metrics = Metrics()
    cache = VisualCache(1 << 20, metrics)
    first, second = seen(), seen()
    assert cache.get(b"a", b"b") is None
    cache.keep(b"b", second)
    assert cache.get(b"a", b"b") is second
    cache.keep(b"a", first)
    assert cache.get(b"a", b"b") is first
    assert (counted(metrics, "lookups_total", result="hit"), counted(metrics, "lookups_total", result="miss")) == (2, 1)
    assert len(cache) == 2


def test_asking_whether_something_is_held_is_neither_counted_nor_a_use():
    metrics = Metrics()
    nbytes = seen().nbytes + 1 + ENTRY_BYTES
    cache = VisualCache(2 * nbytes, metrics)
    cache.keep(b"a", seen())
    cache.keep(b"b", seen())
    assert cache.holds(b"a")
    assert cache.holds(b"x", b"b")
    assert not cache.holds(b"x")
    assert not cache.holds()
    cache.keep(b"c", seen())
    assert [cache.holds(key) for key in (b"a", b"b", b"c")] == [False, True, True]
    assert counted(metrics, "lookups_total", result="hit") == 0


def test_an_entry_counts_its_arrays_its_key_and_its_objects():
    metrics = Metrics()
    cache = VisualCache(1 << 20, metrics)
    cache.keep(b"key", seen(rows=64))
    arrays = 4 * (64 * 4 + 256 + 3 * 256 + 64 + 3)
    assert counted(metrics, "bytes") == arrays + 3 + 2048
    assert len(VisualCache(0, metrics)) == 0
