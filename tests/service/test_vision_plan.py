"""Which step comes next, for everything that it depends on."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.core.prompt import Question
from service.core.request import Budget
from service.core.viewport import fitting
from service.core.vision import CloserFeatures, Relevance, Seen, VisionFeatures
from service.media.store import Image
from service.vision_stage.plan import (
    Attend,
    ChooseTile,
    Done,
    Encode,
    EncodeCloser,
    Look,
    Recall,
    See,
    Situation,
    next_step,
)
from tests.support.fakes import png

THRESHOLD = 0.625  # a float32 too
SMALL, LARGE = Image.of(png(size=(224, 224))), Image.of(png(size=(225, 224)))
QUESTION = Question(np.zeros(32, np.int32), np.zeros(32, np.int32))
VISION = VisionFeatures(*(np.zeros(1, np.float32) for _ in range(4)))
TILES = fitting(300, 900, "tiles", (0, 0, 0)).tiles
CLOSER = CloserFeatures(np.zeros(1, np.float32))


def seen(particularize: float = THRESHOLD, detail: str = "low") -> Seen:
    relevance = Relevance(
        np.zeros((16, 16), np.float32),
        np.zeros((3, 16, 16), np.float32),
        np.zeros((8, 8), np.int32),
        np.array([particularize, 0, 0], np.float32),
    )
    return Seen(np.zeros((32, 4), np.float32), relevance, Budget(), detail)


def look(image: Image = LARGE, **known: object) -> Look:
    return Look(0, image, QUESTION, **known)


# What is possible: the fidelity level allows it, the visual cache holds it, or the request's minimum needs it.
DENIED = {"allows_closer": False, "holds_closer": False, "needs_closer": False}
ALLOWED, HELD, NEEDED = ({**DENIED, f"{why}_closer": True} for why in ("allows", "holds", "needs"))


def situation(asks: str, possible: dict[str, bool], *, offers: bool = True) -> Situation:
    return Situation(asks=asks, offers_closer=offers, closer_view_at=THRESHOLD, **possible)


LOW, HIGH = Recall("low"), Recall("high")
DENIAL = Done(is_denied=True)
KNOWN = {"is_recalled": True, "vision": VISION}

# Looks with detail low, and the columns of the table below.
LOOKS = {
    "new": look(),
    "missed": look(is_recalled=True),
    "found": look(**KNOWN),
    "seen, calm": look(**KNOWN, seen=seen(THRESHOLD - 0.125)),
    "seen, small": look(SMALL, **KNOWN, seen=seen()),
    "seen, striking": look(**KNOWN, seen=seen()),
    "recalled, striking": look(is_recalled=True, seen=seen()),
    "fell back": look(**KNOWN, seen=seen(), low=seen()),
}
NEVER = [LOW, See(), Attend(), Done(), Done(), Done(), Done(), Done()]
TABLE = [
    ("low", DENIED, NEVER),
    ("low", ALLOWED, NEVER),
    ("low", HELD, NEVER),
    ("low", NEEDED, [HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, DENIAL]),
    ("auto", DENIED, [LOW, See(), Attend(), Done(), Done(), DENIAL, DENIAL, DENIAL]),
    ("auto", ALLOWED, [LOW, See(), Attend(), Done(), Done(), HIGH, HIGH, DENIAL]),
    ("auto", HELD, [LOW, See(), Attend(), Done(), Done(), HIGH, HIGH, DENIAL]),
    ("auto", NEEDED, [HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, DENIAL]),
    ("high", DENIED, [LOW, See(), Attend(), DENIAL, DENIAL, DENIAL, DENIAL, DENIAL]),
    ("high", ALLOWED, [HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, DENIAL]),
    ("high", HELD, [HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, DENIAL]),
    ("high", NEEDED, [HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, HIGH, DENIAL]),
]
ROWS = [
    pytest.param(asks, possible, known, step, id=f"{asks}-{[*possible.values()]}-{name}")
    for asks, possible, steps in TABLE
    for (name, known), step in zip(LOOKS.items(), steps, strict=True)
]


@pytest.mark.parametrize(("asks", "possible", "known", "step"), ROWS)
def test_a_look_with_detail_low(asks, possible, known, step):
    before = replace(known)
    assert next_step(known, situation(asks, possible)) == step
    assert known == before


@pytest.mark.parametrize("possible", [DENIED, ALLOWED, HELD])
@pytest.mark.parametrize(("name", "step"), [*zip(LOOKS, NEVER, strict=True)])
def test_auto_with_a_model_without_a_closer_view_is_low(possible, name, step):
    assert next_step(LOOKS[name], situation("auto", possible, offers=False)) == step


@pytest.mark.parametrize("low", [None, seen()])
@pytest.mark.parametrize(
    ("known", "step"),
    [
        ({}, Encode),
        ({"vision": VISION}, EncodeCloser),
        ({"closer": CLOSER}, Encode),
        ({"vision": VISION, "closer": CLOSER}, Attend()),
        ({"seen": seen(detail="high")}, Done()),
        ({"vision": VISION, "closer": CLOSER, "seen": seen(detail="high")}, Done()),
    ],
)
def test_a_closer_look_goes_on_whatever_the_situation_is_by_now(low, known, step):
    if step in (Encode, EncodeCloser):
        step = step(is_optional=low is not None)
    closer = look(detail="high", is_recalled=True, low=low, **known)
    for asks, possible, offers in product(("low", "high", "auto"), (DENIED, ALLOWED, HELD, NEEDED), (False, True)):
        assert next_step(closer, situation(asks, possible, offers=offers)) == step


def test_a_closer_look_keeps_what_was_seen_before_and_can_fall_back_to_it():
    closer, low, high = look(**KNOWN, seen=seen()), seen(), seen(detail="high")
    closer.recall("low", low)
    assert (closer.detail, closer.seen, closer.low) == ("low", low, None)
    closer.recall("high", high)
    assert (closer.detail, closer.seen, closer.low) == ("high", high, low)
    closer.fall_back()
    assert (closer.detail, closer.seen, closer.low) == ("low", low, low)


@settings(deadline=None)
@given(st.data())
def test_every_look_ends_whatever_its_steps_bring(data):
    """Fidelity and the visual cache may change between any two decisions, and after Done too while others go on."""
    tiles = data.draw(st.sampled_from([(), TILES]))
    closer_look = look(data.draw(st.sampled_from([SMALL, LARGE])), tiles=tiles)
    asks = data.draw(st.sampled_from(["low", "high", "auto"]))
    fixed = {"needs_closer": data.draw(st.booleans()), "offers": data.draw(st.booleans())}

    def decide() -> None:
        now = {"allows_closer": data.draw(st.booleans()), "holds_closer": data.draw(st.booleans())}
        possible = {**now, "needs_closer": fixed["needs_closer"]}
        closer_look.step = next_step(closer_look, situation(asks, possible, offers=fixed["offers"]))

    def sight(detail: str) -> Seen:
        return seen(data.draw(st.sampled_from([0.0, THRESHOLD, 1.0])), detail)

    steps = []
    decide()
    for _ in range(2):  # the stage asks once more when the request holds LLM capacity
        while not closer_look.is_done:
            steps.append(closer_look.step)
            assert len(steps) <= (12 if tiles else 6)
            missing = closer_look.overview is not None and data.draw(st.booleans())  # no room for the tile
            match closer_look.step:
                case Recall(detail):
                    closer_look.recall(detail, sight(detail) if data.draw(st.booleans()) else None)
                case ChooseTile():
                    assert closer_look.detail == "low"
                    closer_look.choose(data.draw(st.sampled_from([None, *TILES])), data.draw(st.booleans()))
                case See() | Encode() | EncodeCloser() if missing:
                    closer_look.fall_back()
                case See():
                    closer_look.vision = VISION
                    closer_look.seen = sight("low") if data.draw(st.booleans()) else None
                case Encode(True) | EncodeCloser(True) if data.draw(st.booleans()):
                    closer_look.fall_back()
                case Encode():
                    closer_look.vision = VISION
                case EncodeCloser():
                    closer_look.closer = CLOSER
                case Attend():
                    assert closer_look.vision is not None
                    assert (closer_look.closer is not None) == (closer_look.detail == "high")
                    closer_look.seen = sight(closer_look.detail)
            decide()
        assert closer_look.seen is not None
        assert closer_look.seen.detail == closer_look.detail
        decide()
    for once in (LOW, HIGH, See(), Encode(False), Encode(True), EncodeCloser(False), EncodeCloser(True)):
        assert steps.count(once) <= (2 if tiles else 1)
    assert steps.count(ChooseTile()) == bool(tiles)
    assert steps.count(Attend()) <= (3 if tiles else 2)


def test_without_room_a_look_at_a_tile_falls_back_to_what_it_has():
    overview, low = seen(0.1), seen(0.9)
    tiled = look(**KNOWN, tiles=TILES, seen=overview)
    assert next_step(tiled, situation("high", ALLOWED)) == ChooseTile()
    tiled.choose(TILES[1], True)
    assert (tiled.viewport, tiled.overview, tiled.seen, tiled.vision) == (TILES[1], overview, None, None)
    again = replace(tiled)
    tiled.fall_back()
    assert (tiled.viewport, tiled.seen, tiled.is_tile_denied) == (None, overview, True)
    assert isinstance(next_step(tiled, situation("high", ALLOWED)), Done)
    again.recall("low", low)
    again.recall("high", None)
    again.fall_back()
    assert (again.viewport, again.seen, again.detail, again.is_tile_denied) == (TILES[1], low, "low", False)
