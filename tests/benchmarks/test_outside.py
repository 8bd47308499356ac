"""The other renderer draws what is asked about, the same for every checkpoint; accuracy is told by kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.other_renderer import FONTS, KINDS, OTHER_FONTS, SMALL_KINDS, SMALL_PRINT_FONTS, pictured, sampled
from benchmarks.outside import (
    Rights,
    against_low,
    as_auto,
    by_type,
    differences,
    draw,
    has_more_pixels,
    joined,
    main,
)
from build_engines.scenes.questions import LEAST_OFFSET, Question
from build_engines.scenes.wide import FONT_FILES
from build_engines.scenes.world import NONE
from build_engines.train.evaluation import Answers, Asked, Exam

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [*KINDS, *list(SMALL_KINDS)[:3]])
def test_a_kind_draws_the_same_pictures_every_time(name: str) -> None:
    first, again = draw(name, 1), draw(name, 1)
    assert first.questions == again.questions
    assert first.questions[0]
    assert np.array_equal(np.asarray(first.pictures[0]), np.asarray(again.pictures[0]))
    kind = (KINDS | SMALL_KINDS)[name]
    width, height = first.pictures[0].size
    assert (width, height) == ((max(kind.size),) * 2 if kind.padded else kind.size)


def test_objects_have_their_colours_at_their_places() -> None:
    kind = KINDS["640x360"]
    rng = np.random.default_rng(3)
    unit = (640 * 360) ** 0.5 / 224
    checked = 0
    while checked < 20:
        things = sampled(rng, kind)
        pixels = np.asarray(pictured(rng, kind, things), float)
        for thing in things:
            if thing.character == NONE and thing.shape != 5:
                shown = pixels[round(thing.y * unit), round(thing.x * unit)]
                assert np.abs(shown - np.array(thing.rgb) * 255).max() < 12
                checked += 1


def test_training_never_sees_three_of_the_five_fonts() -> None:
    assert not set(OTHER_FONTS) & set(FONT_FILES)
    assert set(SMALL_PRINT_FONTS) - set(OTHER_FONTS) <= set(FONT_FILES)
    assert all((FONTS / font).exists() for font in SMALL_PRINT_FONTS if font.endswith(".ttf"))


def test_small_print_is_asked_only_for_what_is_written() -> None:
    shown = draw("cmtt10 flat 448", 4)
    assert {question.type for each in shown.questions for question in each} == {"read"}
    assert draw("one object", 1).questions[0][-1].answer == "1"


def test_accuracy_is_told_by_detail_and_type() -> None:
    low, high = np.array([1, 0, 1, 0], bool), np.array([1, 1, 1, 0], bool)
    found = Rights(
        {"low": low, "auto": low, "high": high}, np.array(["read", "read", "size", "size"]), np.array([0, 0, 1, 1])
    )
    both = joined([found, found])
    assert both.scenes.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    told = by_type(both)
    assert told["low"]["all"]["accuracy"] == 0.5
    assert told["high"]["read"] == {"n": 4, "accuracy": 1.0, "interval": [0.3424, 1.0]}  # of two pictures
    assert against_low(both)["high"]["difference"] == 0.25
    assert against_low(both)["auto"] == {"difference": 0.0, "interval": [0.0, 0.0]}


def answers(right: list[bool], particularize: list[float]) -> Answers:
    """Of one question about each of as many pictures."""
    number = len(right)
    asked = [Asked(scene, Question("what?", "red", "colour", (0,))) for scene in range(number)]
    tensions = np.array(particularize)[:, None] * [1.0, 0.0, 0.0]
    counts = (np.zeros(number, int) for _ in range(3))
    return Answers(Exam(None, asked), np.array(right), *counts, np.zeros((number, 64)), tensions, tensions)  # type: ignore[arg-type]


def test_auto_looks_closer_as_the_service_does() -> None:
    """At a picture that has more pixels than the first view, if the allocator asks for it."""
    low, high = answers([False] * 4, [0.9, 0.9, 0.1, 0.1]), answers([True] * 4, [0.0] * 4)
    larger = np.array([True, False, True, False])
    assert as_auto(low, high, 0.5, larger).tolist() == [True, False, False, False]
    sharp = {name for name in KINDS if has_more_pixels(draw(name, 1)).all()}
    assert set(KINDS) - sharp == {"blur 2.5", "blur 1.2", "noise", "JPEG 15", "JPEG 40", "112 pixels"}


def test_differences_are_told_over_all_kinds_too() -> None:
    def of(right: list[bool]) -> Rights:
        detail = dict.fromkeys(("low", "auto", "high"), np.array(right))
        return Rights(detail, np.array(["read", "size"]), np.array([0, 1]))

    one, other = ({"white": of(white), "black": of([True, True])} for white in ([True, True], [True, False]))
    told = differences(one, other)
    assert told["white"]["low"]["difference"] == 0.5
    assert told["kinds"]["low"]["difference"] == 0.25
    assert told["kinds"]["low"]["interval"] == [0.0, 0.75]
    assert set(told) == {"kinds", "white", "black"}


def test_objects_of_a_padded_picture_stand_apart_in_what_is_seen() -> None:
    shown = draw("300x900 padded", 12)
    scale = 224 / (224 * (900 / 300) ** 0.5)  # from places in a picture of area 224 * 224
    for things, questions in zip(shown.things, shown.questions, strict=True):
        for question in questions:
            if question.type == "relation":
                one, other = (things[index] for index in question.asked)
                is_across = "left" in question.text or "right" in question.text
                assert abs(one.x - other.x if is_across else one.y - other.y) * scale >= LEAST_OFFSET


@pytest.mark.slow
def test_the_reference_model_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "outside.json"
    chosen = ["plain grey", "STIXGeneralBol outlined 448"]
    assert main([f"one={ROOT / 'reference'}", "--scenes", "2", "--kinds", *chosen, "--out", str(out)]) == 0
    one = json.loads(out.read_text())["checkpoints"]["one"]
    assert one["all"]["kinds"]["low"]["all"]["accuracy"] > 0.7
    small = one["by_kind"][chosen[1]]
    assert small["high"]["read"]["accuracy"] > small["low"]["read"]["accuracy"]
