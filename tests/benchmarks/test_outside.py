"""The other renderer draws what is asked about, the same for every checkpoint; accuracy is told by kind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.other_renderer import FONTS, KINDS, OTHER_FONTS, SMALL_KINDS, SMALL_PRINT_FONTS, pictured, sampled
from benchmarks.outside import Rights, against_low, by_type, draw, joined, main
from build_engines.scenes.wide import FONT_FILES
from build_engines.scenes.world import NONE

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
    assert told["high"]["read"] == {"n": 4, "accuracy": 1.0, "interval": [0.5101, 1.0]}
    assert against_low(both)["high"]["difference"] == 0.25
    assert against_low(both)["auto"] == {"difference": 0.0, "interval": [0.0, 0.0]}


@pytest.mark.slow
def test_the_reference_model_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "outside.json"
    chosen = ["plain grey", "STIXGeneralBol outlined 448"]
    assert main([f"one={ROOT / 'reference'}", "--scenes", "2", "--kinds", *chosen, "--out", str(out)]) == 0
    one = json.loads(out.read_text())["checkpoints"]["one"]
    assert one["all"]["kinds"]["low"]["all"]["accuracy"] > 0.7
    small = one["by_kind"][chosen[1]]
    assert small["high"]["read"]["accuracy"] > small["low"]["read"]["accuracy"]
