"""Clips are reproducible, the same story at every number of frames, and every answer can be seen in the frames."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import av
import numpy as np
import pytest
from tokenizers import Tokenizer

from build_engines.scenes.clips import (
    CLIP_KINDS,
    EVENTS,
    FEWEST,
    LEAST_PAUSE,
    MOST,
    Story,
    ask_clip,
    ask_story,
    draw_clip,
    draw_story,
    shoot,
)
from build_engines.scenes.held_out_clips import COMMITTED, DIRECTORY, FRAMES, held_out_clips
from build_engines.scenes.world import (
    COLOUR_NAMES,
    HELD_OUT,
    HELD_OUT_PAIRS,
    SHAPES,
    SMALL_PRINT,
    WIDE,
    Thing,
    World,
)
from service.core.vision import QUESTION_TOKENS
from tests.support.paths import PROJECT

Scene = Sequence[Thing | None]


def stories(seed: int, number: int, world: World = World()) -> list[Story]:  # noqa: B008 - frozen
    rng = np.random.default_rng(seed)
    return [draw_story(rng, world) for _ in range(number)]


class Watched:
    """What can be seen in a clip's frames alone, without its events."""

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes
        self.tracks = list(zip(*scenes, strict=True))
        self.changes = {
            index: change for index, track in enumerate(self.tracks) if (change := self._change(track)) is not None
        }

    @staticmethod
    def _change(track: Sequence[Thing | None]) -> tuple[str, int, int] | None:
        """What happened to one object, the last frame before it, and the first after it."""
        first, last = track[0], track[-1]
        if track.count(first) == len(track):
            return None
        before = next(frame for frame, thing in enumerate(track) if thing != first) - 1
        after = max(frame for frame, thing in enumerate(track) if thing != last) + 1
        if first is None or last is None:
            return "appeared" if first is None else "vanished", before, after
        return "recoloured" if first.colour != last.colour else "moved", before, after

    def of(self, kind: str) -> list[int]:
        return [index for index, change in self.changes.items() if change[0] == kind]

    def thing(self, index: int) -> Thing:
        return next(thing for thing in self.tracks[index] if thing)

    def named(self, words: str) -> int:
        """The only object that a name fits in any frame."""
        found = [i for i, track in enumerate(self.tracks) if any(thing and fits(words, thing) for thing in track)]
        assert len(found) == 1, (words, found)
        return found[0]


def fits(words: str, thing: Thing) -> bool:
    return set(words.split()) - {"object"} <= {COLOUR_NAMES[thing.colour], SHAPES[thing.shape]}


KINDS = {
    "moved": ("move", "moved"),
    "appeared": ("appear", "appeared", "come", "came"),
    "vanished": ("vanish", "vanished", "disappear", "disappeared"),
    "recoloured": ("change colour", "changed colour"),
}
KIND_OF = {verb: kind for kind, verbs in KINDS.items() for verb in verbs}
VERB = "|".join(sorted(KIND_OF, key=len, reverse=True))


def answer_number(watched: Watched, verb: str) -> str:
    return str(len(watched.of(KIND_OF[verb])))


def answer_count(watched: Watched, name: str, end: str) -> str:
    scene = watched.scenes[0 if end == "start" else -1]
    return str(sum(thing is not None and fits(name, thing) for thing in scene))


def answer_what(watched: Watched, verb: str) -> str:
    (index,) = watched.of(KIND_OF[verb])
    thing = watched.thing(index)
    shape = SHAPES[thing.shape]
    return shape if KIND_OF[verb] == "recoloured" else f"{COLOUR_NAMES[thing.colour]} {shape}"


def answer_way(watched: Watched, name: str) -> str:
    (index,) = watched.of("moved") if name == "object" else (watched.named(name),)
    first, last = watched.tracks[index][0], watched.tracks[index][-1]
    assert first
    assert last
    assert watched.changes[index][0] == "moved"
    dx, dy = last.x - first.x, last.y - first.y
    assert max(abs(dx), abs(dy)) > 3 * min(abs(dx), abs(dy))
    return ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("up" if dy < 0 else "down")


def answer_colour(watched: Watched, name: str, end: str) -> str:
    index = watched.named(name)
    assert watched.changes[index][0] == "recoloured"
    thing = watched.tracks[index][0 if end in ("before", "at the start") else -1]
    assert thing
    return COLOUR_NAMES[thing.colour]


def answer_order(watched: Watched, name: str, verb: str, said: str, other_name: str, other_verb: str) -> str:
    (kind, begins, ends), (other_kind, other_begins, other_ends) = (
        watched.changes[watched.named(each)] for each in (name, other_name)
    )
    assert (kind, other_kind) == (KIND_OF[verb], KIND_OF[other_verb])
    assert (ends <= other_begins) != (other_ends <= begins)  # a frame between them shows which was first
    return "yes" if (ends <= other_begins) == (said == "before") else "no"


def answer_happened(watched: Watched, name: str, verb: str) -> str:
    busy = watched.of(KIND_OF[verb])
    found = bool(busy) if name == "anything" else watched.named(name.removeprefix("the ")) in busy
    return "yes" if found else "no"


ANSWERED = {
    rf"how many objects ({VERB})\?": answer_number,
    r"how many (.+?)(?:(?<=cross)es|s) are there at the (start|end)\?": answer_count,
    rf"(?:what|which object|which shape) ({VERB})\?": answer_what,
    r"which way did the (.+) (?:move|go)\?": answer_way,
    r"what colour (?:was|is) the (.+) (before|after|at the start|at the end)\?": answer_colour,
    rf"did the (.+) ({VERB}) (before|after) the (.+) ({VERB})\?": answer_order,
    rf"did (anything|the .+) ({VERB})\?": answer_happened,
}


def seen_answer(watched: Watched, text: str) -> str:
    """Answer a question from the frames alone."""
    told, answer = next((told, answer) for form, answer in ANSWERED.items() if (told := re.fullmatch(form, text)))
    return answer(watched, *told.groups())


@pytest.mark.parametrize("world", [World(), WIDE], ids=["plain", "wide"])
@pytest.mark.parametrize("kind", CLIP_KINDS)
def test_every_answer_can_be_seen_in_the_frames(world: World, kind: str) -> None:
    """The answer follows from 4, 8, 16 or 32 frames, and from 4 of 32, without knowing when anything happened."""
    rng, asked = np.random.default_rng(3), 0
    for story in stories(4, 250, world):
        question = ask_story(rng, story, kind)
        if question is None:
            continue
        asked += 1
        assert question.type == kind
        assert question.asked
        assert set(question.asked) <= set(range(len(story.things)))
        every = [story.scene(float(time)) for time in np.linspace(0, 1, 32)]
        shown = [[story.scene(float(time)) for time in np.linspace(0, 1, frames)] for frames in (4, 8, 16, 32)]
        shown += [[every[round(place)] for place in np.linspace(0, 31, frames)] for frames in (4, 8, 16)]
        assert {seen_answer(Watched(scenes), question.text) for scenes in shown} == {question.answer}, question
    assert asked >= 25


def test_a_story_has_one_to_three_events_of_different_objects() -> None:
    kinds: Counter[str] = Counter()
    for story in stories(5, 400):
        assert FEWEST <= len(story.things) <= MOST
        assert 1 <= len(story.events) <= min(3, len(story.things) - 1)
        assert len({event.index for event in story.events}) == len(story.events)
        assert [event.start for event in story.events] == sorted(event.start for event in story.events)
        assert all(0 < event.start <= event.end < 1 for event in story.events)
        kinds.update(event.kind for event in story.events)
    assert min(kinds[kind] for kind in EVENTS) > 0.15 * kinds.total()


def test_objects_stay_in_the_picture_and_apart() -> None:
    for story in stories(6, 150):
        for time in np.linspace(0, 1, 21):
            scene = [thing for thing in story.scene(float(time)) if thing]
            for place, one in enumerate(scene):
                assert one.diameter / 2 <= min(one.x, one.y, 224 - one.x, 224 - one.y)
                for other in scene[:place]:
                    assert np.hypot(one.x - other.x, one.y - other.y) > (one.diameter + other.diameter) / 2


@pytest.mark.parametrize("world", [World(), WIDE], ids=["plain", "wide"])
def test_a_held_out_pair_is_neither_shown_nor_named(world: World) -> None:
    rng, named = np.random.default_rng(7), [f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS]
    for story in stories(8, 600, world):
        shown = {(state.colour, state.shape) for index in range(len(story.things)) for state in story.states(index)}
        assert not shown & set(HELD_OUT)
        for kind in CLIP_KINDS:
            question = ask_story(rng, story, kind)
            assert question is None or not any(pair in question.text + question.answer for pair in named)


def test_a_world_of_held_out_pairs_shows_them() -> None:
    shown = [{(t.colour, t.shape) for t in story.things} for story in stories(9, 40, World(held_out=True))]
    assert all(pairs & set(HELD_OUT) for pairs in shown)


@pytest.mark.parametrize("world", [World(), WIDE], ids=["plain", "wide"])
def test_a_frame_follows_from_its_time_and_not_from_the_number_of_frames(world: World) -> None:
    """Frames 0, 5, 10 and 15 of 16 are those of 4; the generator goes on in the same state."""
    for seed in range(6):
        generators = [np.random.default_rng(seed) for _ in range(3)]
        few, many, again = (draw_clip(rng, world, frames) for rng, frames in zip(generators, (4, 16, 16), strict=True))
        assert few.story == many.story == again.story
        assert np.array_equal(many.pixels, again.pixels)
        assert np.array_equal(few.pixels, many.pixels[::5])
        assert np.array_equal(few.coverage, many.coverage[::5])
        assert len({rng.integers(2**60) for rng in generators}) == 1


@pytest.mark.parametrize("world", [World(), WIDE], ids=["plain", "wide"])
def test_pixels_and_coverage_show_the_objects(world: World) -> None:
    """An object that is not there covers no patch. Two frames differ most where something happened between them."""
    compared = 0
    for story in stories(10, 12, world):
        clip = shoot(story, 4)
        assert clip.pixels.shape == (4, 224, 224, 3)
        assert clip.pixels.dtype == np.uint8
        for frame in range(4):
            for thing, share in zip(clip.scene(frame), clip.coverage[frame], strict=True):
                assert (share.sum() > 0) == (thing is not None)
                if thing:
                    rows, columns = np.nonzero(share > 0.05)
                    assert rows.min() <= thing.y / 14 <= rows.max() + 1
                    assert columns.min() <= thing.x / 14 <= columns.max() + 1
        change = np.abs(clip.pixels[0].astype(float) - clip.pixels[-1]).mean(-1).reshape(16, 14, 16, 14).mean((1, 3))
        busy = clip.coverage[[0, -1]][:, [event.index for event in story.events]].max((0, 1)) > 0.5
        idle = clip.coverage.max((0, 1)) == 0
        if busy.any():  # small objects may fill no patch by half
            compared += 1
            assert change[busy].mean() > 2 * change[idle].mean()
    assert compared >= 6


def test_what_nothing_happens_to_looks_the_same_in_every_frame() -> None:
    for story in stories(11, 8):
        still = replace(story, events=())
        clip = shoot(still, 4)
        difference = np.abs(clip.pixels[0].astype(float) - clip.pixels[1:]).mean()
        assert difference < 12  # noise alone


def test_answers_are_balanced() -> None:
    rng, drawn = np.random.default_rng(12), stories(13, 1500)
    answers = {kind: Counter(q.answer for s in drawn if (q := ask_story(rng, s, kind))) for kind in CLIP_KINDS}
    for kind in ("order", "happened"):
        assert 0.45 <= answers[kind]["yes"] / answers[kind].total() <= 0.55
    assert all(0.18 <= answers["way"][way] / answers["way"].total() <= 0.32 for way in ("left", "right", "up", "down"))
    assert min(answers["came"][number] for number in "0123") > 0.08 * answers["came"].total()
    assert max(answers["came"].values()) < 0.45 * answers["came"].total()
    assert max(answers["count"].values()) < 0.4 * answers["count"].total()
    assert max(answers["before"].values()) < 0.25 * answers["before"].total()


def test_the_allocator_reads_every_word_of_a_question() -> None:
    tokenizer = Tokenizer.from_file(str(PROJECT / "reference" / "tokenizer.json"))
    rng = np.random.default_rng(14)
    asked = [q for story in stories(15, 300) for kind in CLIP_KINDS if (q := ask_story(rng, story, kind))]
    assert max(len(tokenizer.encode(question.text).ids) for question in asked) <= QUESTION_TOKENS


def test_what_a_clip_cannot_be_drawn_or_asked_of_is_refused() -> None:
    rng = np.random.default_rng(16)
    for world in (SMALL_PRINT, World(near=True), World(unnamed_share=0.1)):
        with pytest.raises(ValueError, match="named colours and whole pictures"):
            draw_clip(rng, world, 4)
    with pytest.raises(ValueError, match="at least 4 frames, not 3"):
        ask_clip(rng, draw_clip(rng, World(), 3), "moved")


def committed() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DIRECTORY / "questions.jsonl").read_text().splitlines()]


def test_committed_clips_are_the_generators() -> None:
    """The first clips' files differ by H.264's losses; all questions are the same."""
    asked = []
    for place, held_out in enumerate(held_out_clips()):
        asked += [(held_out.name, q.text, q.answer, q.type) for q in held_out.questions]
        if place < 3:
            with av.open(str(DIRECTORY / held_out.name)) as file:
                shown = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
            assert shown.shape == held_out.clip.pixels.shape == (FRAMES, 224, 224, 3)
            assert np.abs(shown.astype(float) - held_out.clip.pixels).mean() < 9
    assert asked == [(row["clip"], row["question"], row["answer"], row["type"]) for row in committed()]


def test_committed_clips_are_enough_and_small() -> None:
    rows = committed()
    kinds = Counter(row["type"] for row in rows)
    assert set(kinds) == set(CLIP_KINDS)
    assert min(kinds.values()) >= 15
    assert max(kinds.values()) <= 40
    assert len(rows) >= 280
    for kind in ("order", "happened"):
        yes = sum(row["answer"] == "yes" for row in rows if row["type"] == kind)
        assert abs(2 * yes - kinds[kind]) <= 1
    files = {path.name: path.stat().st_size for path in DIRECTORY.iterdir()}
    assert {row["clip"] for row in rows} == {name for name in files if name.endswith(".mp4")}
    assert len(files) == COMMITTED + 1
    assert sum(files.values()) <= 3_000_000


def test_an_order_is_asked_only_of_events_with_a_frame_between_them() -> None:
    """11 / 31, the longest gap between 4 of 32 frames, is shorter than the pause between the events."""
    places = [round(place) for place in np.linspace(0, 31, 4)]
    assert max(np.diff(places)) / 31 < LEAST_PAUSE
    rng = np.random.default_rng(17)
    questions = [(story, q) for story in stories(18, 300) if (q := ask_story(rng, story, "order"))]
    for story, question in questions:
        first, second = sorted((story.event_of(i) for i in question.asked), key=lambda event: event.start)
        assert second.start - first.end >= LEAST_PAUSE


def test_a_drawn_clip_is_asked_like_its_story() -> None:
    clip = draw_clip(np.random.default_rng(19), World(), 8)
    for kind in CLIP_KINDS:
        assert ask_clip(np.random.default_rng(20), clip, kind) == ask_story(np.random.default_rng(20), clip.story, kind)
