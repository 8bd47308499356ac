"""Scenes are reproducible, unambiguous and balanced, and have no held-out pairs."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from build_engines.scenes.held_out import DIRECTORY, SPLITS, held_out_scenes
from build_engines.scenes.questions import ANSWERS, DESCRIBE, TYPES, Question, ask
from build_engines.scenes.render import crops, overview, render
from build_engines.scenes.world import CHARACTERS, HELD_OUT, NONE, SMALL_PRINT, World, sample_scene


def test_scenes_follow_from_their_seed() -> None:
    def draw() -> tuple[list[object], np.ndarray]:
        rng = np.random.default_rng(5)
        things = sample_scene(rng, World())
        return [things, ask(rng, things, "relation")], render(things, rng).pixels

    (said, pixels), (said_again, pixels_again) = draw(), draw()
    assert said == said_again
    assert np.array_equal(pixels, pixels_again)


@pytest.mark.parametrize("world", [World(), World(unnamed_share=0.5), World(lattice_jitter=2.0), SMALL_PRINT])
def test_training_worlds_never_show_a_held_out_pair(world: World) -> None:
    rng = np.random.default_rng(6)
    shown = {(t.colour, t.shape) for _ in range(2000) for t in sample_scene(rng, world)}
    assert not shown & set(HELD_OUT)
    assert len({pair for pair in shown if pair[0] != NONE}) == 45


def test_objects_do_not_overlap_and_stay_inside() -> None:
    rng = np.random.default_rng(7)
    for _ in range(200):
        things = sample_scene(rng, World())
        assert 2 <= len(things) <= 7
        for i, one in enumerate(things):
            assert one.diameter / 2 <= min(one.x, one.y, 224 - one.x, 224 - one.y)
            for other in things[:i]:
                assert np.hypot(one.x - other.x, one.y - other.y) > (one.diameter + other.diameter) / 2


@pytest.mark.parametrize("kind", TYPES)
def test_answers_are_known_words_and_depend_on_named_objects(kind: str) -> None:
    rng = np.random.default_rng(8)
    answers: Counter[str] = Counter()
    for _ in range(600):
        things = sample_scene(rng, World())
        question = ask(rng, things, kind)
        if question is None:
            continue
        assert question.answer in ANSWERS
        assert set(question.asked) <= set(range(len(things)))
        assert question.text == question.text.lower()
        answers[question.answer] += 1
    assert answers.total() > 300
    assert answers.most_common(1)[0][1] < 0.56 * answers.total()


def test_a_relation_can_be_checked_from_the_objects() -> None:
    rng = np.random.default_rng(9)
    checked = 0
    while checked < 200:
        things = sample_scene(rng, World())
        question = ask(rng, things, "relation")
        if question is None or question.answer not in ("left", "right", "above", "below"):
            continue
        first, second = (things[i] for i in question.asked)
        truth = {
            "left": first.x < second.x,
            "right": first.x > second.x,
            "above": first.y < second.y,
            "below": first.y > second.y,
        }
        assert truth[question.answer]
        checked += 1


def test_a_description_names_every_object_from_left_to_right() -> None:
    rng = np.random.default_rng(10)
    things = sample_scene(rng, World())
    question = ask(rng, things, DESCRIBE)
    assert isinstance(question, Question)
    assert question.answer.count("a ") == len(things)
    assert [things[i].x for i in question.asked] == sorted(thing.x for thing in things)


def test_coverage_says_where_an_object_is() -> None:
    rng = np.random.default_rng(11)
    things = sample_scene(rng, World())
    coverage = render(things, rng).coverage
    assert coverage.shape == (len(things), 16, 16)
    for thing, share in zip(things, coverage, strict=True):
        rows, columns = np.nonzero(share > 0.05)
        assert rows.min() <= thing.y / 14 <= rows.max() + 1
        assert columns.min() <= thing.x / 14 <= columns.max() + 1


def test_small_print_is_too_small_for_the_overview_and_legible_in_the_crops() -> None:
    """At 224, characters are less than a patch (14 pixels) high; at 448 at least the smallest training height."""
    rng = np.random.default_rng(12)
    sizes: Counter[int] = Counter()
    for _ in range(200):
        things = sample_scene(rng, SMALL_PRINT)
        for thing in things:
            if thing.character == NONE:
                assert thing.character_height == 0
                continue
            assert thing.character_height < 14
            assert 2 * thing.character_height >= 21
            sizes[thing.size] += 1
    assert sizes[0] > 0.5 * sizes.total()


def test_a_question_about_small_print_is_answered_by_what_is_written() -> None:
    rng = np.random.default_rng(13)
    asked = 0
    while asked < 100:
        things = sample_scene(rng, SMALL_PRINT)
        question = ask(rng, things, "read")
        if question is None:
            continue
        (index,) = question.asked
        assert question.answer == CHARACTERS[things[index].character]
        asked += 1


def test_the_closer_view_shows_the_same_scene() -> None:
    """The overview at 448 equals the scene at 224 except for noise; the quarters make up the view."""
    things = sample_scene(np.random.default_rng(14), World())
    near, far = (render(things, np.random.default_rng(15), scale) for scale in (2, 1))
    assert near.pixels.shape == (448, 448, 3)
    assert near.coverage.shape == far.coverage.shape
    assert np.abs(near.coverage - far.coverage).max() < 0.2
    quarters = crops(near.pixels)
    assert np.array_equal(quarters[1], near.pixels[:224, 224:])
    assert np.array_equal(quarters[2], near.pixels[224:, :224])
    middle = [(round(t.x), round(t.y)) for t in things if t.shape != 5]
    for x, y in middle:
        difference = overview(near.pixels)[y, x].astype(float) - far.pixels[y, x]
        assert np.abs(difference).mean() < 60


def test_committed_scenes_are_the_generators() -> None:
    """The first scene of each split matches except for WebP losses; its questions match exactly."""
    rows = [json.loads(line) for line in (DIRECTORY / "questions.jsonl").read_text().splitlines()]
    for split in SPLITS:
        scene = next(held_out_scenes(split, 1))
        asked = [(row["question"], row["answer"], row["type"]) for row in rows if row["image"] == scene.name]
        assert asked == [(q.text, q.answer, q.type) for q in scene.questions]
        shown = np.asarray(Image.open(DIRECTORY / scene.name).convert("RGB"), np.float32)
        assert np.abs(shown - scene.pixels).mean() < 6


def test_committed_scenes_are_enough() -> None:
    rows = [json.loads(line) for line in (DIRECTORY / "questions.jsonl").read_text().splitlines()]
    number = Counter((row["split"], row["type"]) for row in rows)
    assert all(number["new", kind] >= 200 for kind in TYPES)
    assert all(number["held_out_pairs", kind] >= 50 for kind in TYPES)
    assert number["small_print", "read"] >= 200
    files = {path.name: path.stat().st_size for path in DIRECTORY.iterdir()}
    assert {row["image"] for row in rows} == {name for name in files if name.endswith(".webp")}
    assert sum(files.values()) <= 10 * 2**20
