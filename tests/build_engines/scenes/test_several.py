"""Groups of images are reproducible, hard, and every answer follows from the objects that they show."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from build_engines.scenes.held_out_several import COMMITTED, DIRECTORY, held_out_groups
from build_engines.scenes.several import (
    FEWEST,
    MOST,
    ORDINALS,
    SEVERAL_KINDS,
    ask_groups,
    ask_several,
    draw_groups,
    draw_several,
)
from build_engines.scenes.world import COLOUR_NAMES, HELD_OUT, HELD_OUT_PAIRS, SHAPES, WIDE, Thing, World
from service.core.vision import QUESTION_TOKENS
from tests.support.paths import PROJECT

Scenes = Sequence[Sequence[Thing]]


def groups(seed: int, number: int, images: int, world: World = World()) -> list[list[list[Thing]]]:  # noqa: B008
    rng = np.random.default_rng(seed)
    return [draw_groups(rng, world, images) for _ in range(number)]


def word_pairs(things: Sequence[Thing]) -> set[str]:
    return {f"{COLOUR_NAMES[thing.colour]} {SHAPES[thing.shape]}" for thing in things}


def counts(scenes: Scenes, name: str) -> list[int]:
    words = set(name.split()) - {"object"}
    return [sum(words <= {COLOUR_NAMES[t.colour], SHAPES[t.shape]} for t in things) for things in scenes]


def answer_more(scenes: Scenes, said: str, name: str) -> str:
    found = counts(scenes, name)
    assert said == ("more" if len(scenes) == 2 else "the most")
    assert found.count(max(found)) == 1
    return ORDINALS[found.index(max(found))]


def answer_which(scenes: Scenes, article: str, name: str) -> str:
    found = counts(scenes, name)
    (place,) = (place for place, count in enumerate(found) if count)
    assert article != "the" or found[place] == 1
    return ORDINALS[place]


def answer_both(scenes: Scenes, article: str, name: str, which: str) -> str:
    found = counts(scenes, name)
    assert which == ("both" if len(scenes) == 2 else "all")
    assert any(found)
    assert article != "the" or max(found) == 1
    return "yes" if all(found) else "no"


def answer_same(scenes: Scenes, which: str, name: str) -> str:
    assert which == ("both" if len(scenes) == 2 else "all")
    return "yes" if len(set(counts(scenes, name))) == 1 else "no"


def answer_images(scenes: Scenes, name: str) -> str:
    return str(len([count for count in counts(scenes, name) if count]))


def answer_together(scenes: Scenes, name: str, which: str) -> str:
    assert which == ("both" if len(scenes) == 2 else "all")
    return str(sum(counts(scenes, name)))


def answer_only(scenes: Scenes, one: str, other: str) -> str:
    (found,) = word_pairs(scenes[ORDINALS.index(one)]) - word_pairs(scenes[ORDINALS.index(other)])
    return found


PLURAL = r"(.+?)(?:(?<=cross)es|s)"
ANSWERED = {
    rf"which image has (more|the most) {PLURAL}\?": answer_more,
    r"(?:which image has|in which image is) (the|an?) (.+)\?": answer_which,
    r"is (?:there )?(the|an?) (.+) in (both|all) images\?": answer_both,
    rf"do (both|all) images have the same number of {PLURAL}\?": answer_same,
    r"how many images (?:have|show) an? (.+)\?": answer_images,
    rf"how many {PLURAL} are there in (both|all) images(?: together)?\?": answer_together,
    r"what is in the (\w+) image but not in the (\w+)\?": answer_only,
}


def seen_answer(scenes: Scenes, text: str) -> str:
    """Answer a question from the objects' words."""
    told, answer = next((told, answer) for form, answer in ANSWERED.items() if (told := re.fullmatch(form, text)))
    return answer(scenes, *told.groups())


@pytest.mark.parametrize("images", [2, 3, 4])
@pytest.mark.parametrize("kind", SEVERAL_KINDS)
def test_every_answer_follows_from_the_objects(kind: str, images: int) -> None:
    rng, asked = np.random.default_rng(3), 0
    for scenes in groups(4, 200, images):
        question = ask_groups(rng, scenes, kind)
        if question is None:
            continue
        asked += 1
        assert question.type == kind
        assert set(question.asked) <= set(range(sum(map(len, scenes))))
        assert seen_answer(scenes, question.text) == question.answer, question
    assert asked >= 50


def test_the_objects_asked_about_are_counted_over_all_images() -> None:
    rng = np.random.default_rng(5)
    for scenes in groups(6, 100, 3):
        joined = [thing for things in scenes for thing in things]
        question = ask_groups(rng, scenes, "together")
        if question and question.answer != "0":
            assert len(question.asked) == int(question.answer)
        question = ask_groups(rng, scenes, "only")
        if question:
            (found,) = {f"{COLOUR_NAMES[joined[i].colour]} {SHAPES[joined[i].shape]}" for i in question.asked}
            assert found == question.answer


def test_answers_are_balanced() -> None:
    rng = np.random.default_rng(7)
    for images in (2, 3, 4):
        drawn = groups(8, 700, images)
        answers = {kind: Counter(q.answer for s in drawn if (q := ask_groups(rng, s, kind))) for kind in SEVERAL_KINDS}
        for kind in ("both", "same"):
            assert 0.36 <= answers[kind]["yes"] / answers[kind].total() <= 0.6
        for kind in ("more", "which"):
            assert max(answers[kind].values()) / answers[kind].total() < 1.25 / images
        assert max(answers["images"].values()) < 0.45 * answers["images"].total()
        assert max(answers["together"].values()) < 0.36 * answers["together"].total()


def test_most_groups_are_edits_of_one_scene() -> None:
    """Pairs that share all but one or two objects, at the old places or at new ones."""
    shared = [len(word_pairs(one) & word_pairs(other)) / len(word_pairs(one) | word_pairs(other))
              for one, other in groups(9, 400, 2)]  # fmt: skip
    alike = [share for share in shared if share >= 0.3]
    assert 0.5 < len(alike) / len(shared) < 0.85
    assert 0.05 < sum(share == 1 for share in shared) / len(shared) < 0.35


@pytest.mark.parametrize("world", [World(), WIDE], ids=["plain", "wide"])
def test_a_held_out_pair_is_neither_shown_nor_named(world: World) -> None:
    rng, named = np.random.default_rng(10), [f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS]
    for images in (2, 3, 4):
        for scenes in groups(11, 200, images, world):
            assert not {(thing.colour, thing.shape) for things in scenes for thing in things} & set(HELD_OUT)
            for kind in SEVERAL_KINDS:
                question = ask_groups(rng, scenes, kind)
                assert question is None or not any(pair in question.text + question.answer for pair in named)


@pytest.mark.parametrize("world", [World(), WIDE], ids=["plain", "wide"])
def test_groups_follow_from_their_seed_and_show_their_objects(world: World) -> None:
    for seed in range(6):
        one, again = (draw_several(np.random.default_rng(seed), world, 3) for _ in range(2))
        assert len(one) == 3
        for scene, same in zip(one, again, strict=True):
            assert scene.things == same.things
            assert np.array_equal(scene.pixels, same.pixels)
            assert scene.pixels.shape == (224, 224, 3)
            assert FEWEST <= len(scene.things) <= MOST
            for thing, share in zip(scene.things, scene.coverage, strict=True):
                rows, columns = np.nonzero(share > 0.05)
                assert rows.min() <= thing.y / 14 <= rows.max() + 1
                assert columns.min() <= thing.x / 14 <= columns.max() + 1
        for kind in SEVERAL_KINDS:
            generators = [np.random.default_rng(seed) for _ in range(2)]
            asked = ask_several(generators[0], one, kind)
            assert asked == ask_groups(generators[1], [scene.things for scene in one], kind)


def test_objects_of_an_image_do_not_overlap() -> None:
    for scenes in groups(12, 150, 4):
        for things in scenes:
            for place, one in enumerate(things):
                assert one.diameter / 2 <= min(one.x, one.y, 224 - one.x, 224 - one.y)
                for other in things[:place]:
                    assert np.hypot(one.x - other.x, one.y - other.y) > (one.diameter + other.diameter) / 2


@pytest.mark.parametrize("images", [1, 5])
def test_a_group_has_two_to_four_images(images: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 4 images, not {images}"):
        draw_several(np.random.default_rng(13), World(), images)


def test_the_allocator_reads_every_word_of_a_question() -> None:
    tokenizer = Tokenizer.from_file(str(PROJECT / "reference" / "tokenizer.json"))
    rng = np.random.default_rng(14)
    asked = [q for scenes in groups(15, 200, 4) for kind in SEVERAL_KINDS if (q := ask_groups(rng, scenes, kind))]
    assert max(len(tokenizer.encode(question.text).ids) for question in asked) <= QUESTION_TOKENS


def test_committed_groups_are_the_generators() -> None:
    """The first images differ by WebP's losses; all questions are the same."""
    rows = [json.loads(line) for line in (DIRECTORY / "questions.jsonl").read_text().splitlines()]
    asked = []
    for place, group in enumerate(held_out_groups()):
        asked += [(group.names, q.text, q.answer, q.type) for q in group.questions]
        if place < 3:
            for name, scene in zip(group.names, group.scenes, strict=True):
                shown = np.asarray(Image.open(DIRECTORY / name).convert("RGB"), np.float32)
                assert np.abs(shown - scene.pixels).mean() < 7
    assert asked == [(row["images"], row["question"], row["answer"], row["type"]) for row in rows]


def test_committed_groups_are_enough_and_small() -> None:
    rows = [json.loads(line) for line in (DIRECTORY / "questions.jsonl").read_text().splitlines()]
    kinds = Counter(row["type"] for row in rows)
    assert set(kinds) == set(SEVERAL_KINDS)
    assert min(kinds.values()) >= 30
    assert len({tuple(row["images"]) for row in rows}) == COMMITTED
    assert {len(row["images"]) for row in rows} == {2, 3, 4}
    for kind in ("both", "same"):
        yes = sum(row["answer"] == "yes" for row in rows if row["type"] == kind)
        assert abs(2 * yes - kinds[kind]) <= 4
    files = {path.name: path.stat().st_size for path in DIRECTORY.iterdir()}
    assert {name for row in rows for name in row["images"]} == {name for name in files if name.endswith(".webp")}
    assert sum(files.values()) <= 1_500_000
