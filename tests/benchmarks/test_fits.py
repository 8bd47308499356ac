"""Pages for measuring fits are what they say, and the report counts right."""

from io import BytesIO
from itertools import combinations
from math import hypot

import numpy as np
import pytest
from PIL import Image

from benchmarks.fits import bar, in_padding, interval, summary
from benchmarks.pages import KINDS, SIZE_WORDS, SIZES, pages
from build_engines.scenes.questions import LEAST_OFFSET
from service.core.viewport import FAR_FROM_SQUARE


@pytest.mark.parametrize("size", SIZES)
def test_a_page_shows_its_objects_apart_and_asks_about_them(size):
    width, height = SIZES[size]
    for page in pages(size, 3, np.random.default_rng(1)):
        with Image.open(BytesIO(page.png)) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert pixels.shape == (height, width, 3)
        for thing in page.things:
            radius = thing.diameter / 2
            assert radius <= thing.x <= width - radius
            assert radius <= thing.y <= height - radius
            inside = pixels[round(thing.y - radius) : round(thing.y + radius), round(thing.x - radius) :][
                :, : int(radius)
            ]
            assert (np.abs(inside - np.round(255 * np.array(thing.rgb))).max(2) < 40).any()
        for one, other in combinations(page.things, 2):
            assert hypot(one.x - other.x, one.y - other.y) > (one.diameter + other.diameter) / 2
        assert {question.type for question in page.questions} <= set(KINDS)
        assert not any(SIZE_WORDS.search(question.text) for question in page.questions)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_asked_to_stand_apart_does_so_in_the_smallest_view(size):
    scale = 224 / max(SIZES[size])
    relations = 0
    for page in pages(size, 12, np.random.default_rng(2)):
        for question in page.questions:
            if question.type == "relation":
                one, other = (page.things[index] for index in question.asked)
                is_across = "left" in question.text or "right" in question.text
                offset = one.x - other.x if is_across else one.y - other.y
                assert abs(offset) * scale >= LEAST_OFFSET
                relations += 1
    assert relations >= 6


def test_questions_about_one_page_count_as_one_draw():
    right = np.random.default_rng(4).random(50) < 0.7
    alone, together = interval(right, np.arange(50)), interval(np.repeat(right, 6), np.repeat(np.arange(50), 6))
    assert together == alone | {"of": 300}
    every = interval(np.ones(300, bool), np.repeat(np.arange(50), 6))
    assert every == {"value": 1.0, "low": 0.929, "high": 1.0, "of": 300}  # Wilson's of 50 questions


def test_sizes_stand_on_both_sides_of_what_auto_tiles():
    shares = [max(size) / min(size) for size in SIZES.values()]
    assert min(shares) < FAR_FROM_SQUARE < max(shares)


def test_refined_cells_in_padding_are_counted_by_their_centres():
    levels = np.zeros((8, 8), int)
    levels[3, [0, 3, 4]] = [1, 2, 1]  # of a page of 300x900: the first is padding, the others are the page
    padded = {"area": [-1, 0, 2, 1], "levels": levels.tolist()}
    assert in_padding([padded]) == pytest.approx(1 / 3)
    assert in_padding([padded, {"area": [0, 0, 1, 1], "levels": levels.tolist()}]) == pytest.approx(1 / 6)
    assert in_padding([{"area": [0, 0, 1, 1], "levels": np.zeros((8, 8), int).tolist()}]) == 0


@pytest.mark.parametrize(
    ("tiles", "tokens", "met"), [(0.5, 32.0, True), (0.48, 32.0, False), (0.5, 64.0, True), (0.5, 65.0, False)]
)
def test_the_bar_is_of_points_and_of_tokens(tiles, tokens, met):
    def read(value: float, spent: float) -> dict:
        return {"accuracy": {"read": {"value": value, "of": 40}}, "visual_tokens": spent}

    page = {"squash": read(0.09, 32.0), "pad": read(0.1, 32.0), "tiles": read(tiles, tokens)}
    assert bar({"tall": page, "wide": page})["met"] is met


def test_a_few_pages_without_a_question_of_some_kind_are_measured_too():
    seen = {"levels": np.zeros((8, 8), int).tolist(), "area": [0, 0, 1, 1]}
    said = {"vision": {"visual_tokens": 32, "vision_tokens": 96, "fit": "squash"}, "relevance": [seen]}
    found = summary(["count"], [0], [True], [said])
    assert sorted(found["accuracy"]) == ["all", "count"]
    size = dict.fromkeys(("squash", "pad", "tiles"), found)
    assert bar({"tall": size, "wide": size})["reading"] == {"squash": 0.0, "pad": 0.0, "tiles": 0.0}
