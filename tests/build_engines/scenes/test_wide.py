"""Wide scenes are reproducible, show every object apart from the ground, and have no held-out pairs."""

from __future__ import annotations

import colorsys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from build_engines.scenes.questions import TYPES, ask
from build_engines.scenes.render import render
from build_engines.scenes.wide import FONT_FILES, FONTS, draw_frame, draw_ground, draw_scene, nearer
from build_engines.scenes.world import (
    COLOUR_NAMES,
    HELD_OUT,
    HELD_OUT_PAIRS,
    NONE,
    SHAPES,
    SMALL_PRINT,
    WIDE,
    WIDE_COLOURS,
    WIDE_SMALL_PRINT,
    World,
    sample_scene,
)

NEAR = replace(WIDE_SMALL_PRINT, near=True)


@pytest.mark.parametrize(("world", "scale"), [(WIDE, 1), (WIDE_SMALL_PRINT, 2), (NEAR, 1), (World(near=True), 1)])
def test_scenes_follow_from_their_seed(world: World, scale: int) -> None:
    (things, picture), (again, same) = (draw_scene(np.random.default_rng(5), world, scale) for _ in range(2))
    assert things == again
    assert np.array_equal(picture.pixels, same.pixels)
    assert picture.pixels.shape == (224 * scale, 224 * scale, 3)
    assert picture.pixels.dtype == np.uint8
    assert picture.coverage.shape == (len(things), 16, 16)


def test_a_plain_world_is_drawn_as_before() -> None:
    rng, other = (np.random.default_rng(6) for _ in range(2))
    things, picture = draw_scene(rng, World())
    assert things == sample_scene(other, World())
    assert np.array_equal(picture.pixels, render(things, other).pixels)


@pytest.mark.parametrize("world", [WIDE, WIDE_SMALL_PRINT, replace(WIDE, unnamed_share=0.5)])
def test_wide_scenes_never_show_a_held_out_pair(world: World) -> None:
    rng = np.random.default_rng(7)
    shown = {(t.colour, t.shape) for _ in range(1500) for t in sample_scene(rng, world)}
    assert not shown & set(HELD_OUT)
    assert len({pair for pair in shown if pair[0] != NONE}) == 45


def test_an_unnamed_hue_is_far_from_a_colour_held_out_for_the_shape() -> None:
    rng = np.random.default_rng(8)
    checked = 0
    for _ in range(400):
        for thing in sample_scene(rng, replace(WIDE, unnamed_share=1.0)):
            hue, saturation, _ = colorsys.rgb_to_hsv(*thing.rgb)
            for colour, shape in HELD_OUT_PAIRS:
                if SHAPES[thing.shape] == shape and saturation > 0.1:
                    hues = [centre for centre, _, _ in WIDE_COLOURS[colour]]
                    assert all(min(abs(360 * hue - h), 360 - abs(360 * hue - h)) > 19 for h in hues)
                    checked += 1
    assert checked > 100


def test_there_are_one_to_nine_objects_and_all_lie_in_the_view() -> None:
    rng = np.random.default_rng(9)
    numbers: Counter[int] = Counter()
    for _ in range(300):
        frame = draw_frame(rng)
        things = [frame.seen(thing) for thing in sample_scene(rng, WIDE, frame.extent)]
        numbers[len(things)] += 1
        for thing in things:
            half_width = thing.diameter * thing.stretch**0.5 / 2
            half_height = thing.diameter / thing.stretch**0.5 / 2
            assert half_width <= thing.x <= 224 - half_width
            assert half_height <= thing.y <= 224 - half_height
    assert set(numbers) == set(range(1, 10))
    assert numbers[1] + numbers[2] > 75


def test_coverage_says_where_an_object_is() -> None:
    rng = np.random.default_rng(10)
    for _ in range(40):
        things, picture = draw_scene(rng, WIDE)
        for thing, share in zip(things, picture.coverage, strict=True):
            rows, columns = np.nonzero(share > 0.02)
            assert rows.min() <= thing.y / 14 <= rows.max() + 1
            assert columns.min() <= thing.x / 14 <= columns.max() + 1


def test_objects_stay_apart_from_the_ground() -> None:
    """On single-coloured grounds, three of ten. The colours differ by 40 of 255 in a channel at least."""
    rng = np.random.default_rng(11)
    flat = 0
    for _ in range(120):
        things = sample_scene(rng, WIDE)
        ground = draw_ground(rng, things, 1)
        if np.ptp(ground, axis=(0, 1)).max() > 0:
            continue
        flat += 1
        for thing in things:
            assert np.abs(np.array(thing.rgb) * 255 - ground[0, 0]).max() > 40, (
                COLOUR_NAMES[thing.colour],
                ground[0, 0],
            )
    assert flat > 20


def test_the_nearer_view_shows_one_quarter_twice_as_large() -> None:
    things = sample_scene(np.random.default_rng(12), SMALL_PRINT)
    seen = nearer(np.random.default_rng(13), things)
    assert {t.size for t in seen} <= {NONE}
    widths = {round(2 * t.diameter, 6) for t in things}
    assert all(round(t.diameter, 6) in widths for t in seen)
    assert len(seen) < len(things)


@pytest.mark.parametrize("kind", TYPES)
def test_wide_scenes_give_every_type_of_question(kind: str) -> None:
    rng = np.random.default_rng(14)
    asked = [ask(rng, draw_scene(rng, WIDE)[0], kind) for _ in range(60)]
    assert sum(question is not None for question in asked) > 15


def test_every_font_is_there() -> None:
    assert all((FONTS / file).exists() for file in FONT_FILES)
