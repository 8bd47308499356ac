"""How sure an answer is: the calibration's arithmetic, and its form in the card."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.core.card import ModelCard
from service.core.confidence import (
    FOUND_SIGNALS,
    NO_SHIFTS,
    NOTHING_SHOWN,
    RIGHT_SIGNALS,
    SHOWN_SIGNALS,
    Calibration,
    Logistic,
    Shifts,
    Signals,
    Words,
    areas,
    found_signals,
    shown_signals,
    summary,
)
from service.core.request import Budget
from service.core.vision import Int8Rows, Relevance, Seen, VisionFeatures
from tests.support.calibrations import calibrated
from tests.support.fakes import CARD

WORDS = Words(frozenset({"star", "red"}), ("is there", "how many"), frozenset({"no", "0"}))
ASKED = Signals("what colour is the star?", "red", -0.1, 0.9, 0.2, 0.3, False, 0.0, 1)


def features(rows: np.ndarray) -> VisionFeatures:
    return VisionFeatures(rows, np.zeros(256), np.zeros(256), np.zeros((13, 16, 16)))


def seen(peak: float, detail: Any = "low", strangeness: float = 0.0) -> Seen:
    scores = np.zeros((3, 16, 16), np.float32)
    scores[2, 3, 4] = peak
    relevance = Relevance(scores[2], scores, np.zeros((8, 8), np.int32), np.array([peak, 0, 0], np.float32))
    return Seen(np.zeros((32, 4)), relevance, Budget(), detail, strangeness=strangeness)


def test_a_logistic_regression_gives_the_probability_of_its_log_odds():
    assert Logistic((2.0, -1.0), 0.5).of([1.0, 2.5]) == pytest.approx(0.5)
    assert Logistic((1.0,), 0.0).of([math.log(3)]) == pytest.approx(0.75)
    assert Logistic((1.0,), 0.0).of([1e9]) == 1.0
    assert Logistic((1.0,), 0.0).of([-1e9]) == pytest.approx(0.0)


def test_an_image_is_as_strange_as_its_features_are_far_from_the_centre():
    rows = np.random.default_rng(0).normal(2, 3, (257, 4)).astype(np.float32)
    told = summary(features(rows))
    np.testing.assert_allclose(told[:4], rows[0])
    np.testing.assert_allclose(told[4:8], rows[1:].mean(0), rtol=1e-5)
    np.testing.assert_allclose(told[8:], np.log(rows[1:].std(0) + 1e-3), rtol=1e-5)
    at_centre = replace(calibrated(4), centre=told, scale=np.full(12, 0.5, np.float32))
    one_away = replace(at_centre, centre=told + 0.5)
    assert at_centre.strangeness(features(rows)) == pytest.approx(math.log(1e-9), rel=1e-3)
    assert one_away.strangeness(features(rows)) == pytest.approx(0.0, abs=1e-4)
    rounded = replace(features(rows), features=Int8Rows.of(rows))
    assert one_away.strangeness(rounded) == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize(
    ("question", "names", "presence", "supposes"),
    [
        ("What colour is the STAR?", True, False, True),
        ("is there a red object?", True, True, False),
        ("how many stars are there?", False, True, False),
        ("is therefore the star red?", True, False, True),
        ("describe the image.", False, False, False),
    ],
)
def test_words_tell_what_a_question_asks(question, names, presence, supposes):
    assert WORDS.name_something(question) is names
    assert WORDS.ask_for_presence(question) is presence
    assert WORDS.suppose(question) is supposes


def test_a_denial_counts_only_if_presence_is_asked_for():
    asked = replace(ASKED, question="is there a star?", answer=" No. ")
    assert found_signals(asked, WORDS)[1:3] == (1.0, 0.0)
    assert found_signals(replace(asked, answer="yes"), WORDS)[1:3] == (0.0, 1.0)
    assert found_signals(replace(ASKED, answer="no"), WORDS)[1:3] == (0.0, 0.0)


def test_several_images_count_as_the_most_relevant_and_the_least_familiar():
    told = Signals.of("what?", "red", -0.5, [seen(0.2, strangeness=2.0), seen(0.8, "high", strangeness=1.0)])
    assert (told.peak, told.particularize) == (pytest.approx(0.8), pytest.approx(0.8))
    assert (told.closer, told.strangeness, told.log_prob) == (True, 2.0, -0.5)
    assert told.areas == 0
    both = [seen(0.95), seen(0.95)]
    assert Signals.of("what?", "red", -0.5, both).areas == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"strangeness": 9.0}, "unfamiliar_image"),
        ({"peak": 0.05}, "not_found"),
        ({"log_prob": -3.0}, "unsure"),
    ],
)
def test_each_weakness_lowers_the_confidence_and_is_its_reason(change, reason):
    calibration = calibrated(4)
    sure, unsure = calibration.confidence(ASKED), calibration.confidence(replace(ASKED, **change))
    assert sure.value > 0.8
    assert unsure.value < 0.5
    assert unsure.weakest == reason


def test_an_absent_object_is_not_found_and_a_denial_of_it_is_no_weakness():
    calibration = calibrated(4)
    absent = calibration.confidence(replace(ASKED, question="is there a star?", answer="no", peak=0.05))
    assert absent.found is not None
    assert absent.found < 0.1
    assert absent.value > 0.8
    assert calibration.confidence(replace(ASKED, question="what is it?")).found is None


@pytest.mark.parametrize("value", [-1e6, 0.0])
def test_a_probability_is_finite_whatever_the_signals_are(value):
    for peak in (0.0, 1.0):
        told = calibrated(4).confidence(replace(ASKED, log_prob=value, peak=peak, strangeness=-value))
        assert 0 <= told.value <= 1
        assert told.found is not None
        assert 0 <= told.found <= 1


@pytest.mark.parametrize(
    ("drawn", "number"),
    [
        ("....", 0),
        ("....,.#..,....", 1),
        ("##..,...#,#..#", 3),
        ("#...,.#..,..#.", 3),  # they touch at corners only
        ("####,#..#,####", 1),
        ("#..#,#..#,####", 1),
        ("...#,#...", 2),  # the end of a row is not beside the start of the next one
    ],
)
def test_areas_of_a_map_are_counted(drawn, number):
    scores = np.array([[0.95 if patch == "#" else 0.8 for patch in row] for row in drawn.split(",")])
    assert areas(scores) == number


@pytest.mark.parametrize(
    ("question", "answer", "shown", "expected"),
    [
        ("what colour is the star?", "2", 2, {}),
        ("how many objects are there?", "2", 2, {}),
        ("how many red stars?", "2", 2, {"peak_affirmed": 2.0}),
        ("how many red stars?", " 2. ", 3, {"peak_affirmed": 2.0, "less": 1.0}),
        ("how many red stars?", "2", 0, {"peak_affirmed": 2.0, "more": 1.0}),
        ("how many red stars?", "0", 1, {"peak_denied": 2.0, "denied": 1.0, "less": 1.0}),
        ("how many red stars?", "0", 0, {"peak_denied": 2.0, "denied": 1.0}),
        ("is there a red star?", "no", 1, {"peak_denied": 2.0, "denied": 1.0}),
        ("is there a red star?", "yes", 0, {"peak_affirmed": 2.0}),
        ("how many red stars?", "\u00b2", 2, {"peak_affirmed": 2.0}),  # no number that can be read
        ("how many red stars?", "9" * 5000, 2, {"peak_affirmed": 2.0}),
    ],
)
def test_an_answer_is_compared_with_what_the_map_shows(question, answer, shown, expected):
    signals = replace(ASKED, question=question, answer=answer, peak=1 / (1 + math.exp(-2)), areas=shown)
    told = dict(zip(SHOWN_SIGNALS, shown_signals(signals, WORDS), strict=True))
    assert told == pytest.approx(dict.fromkeys(SHOWN_SIGNALS, 0.0) | expected)


def test_a_map_that_shows_more_than_the_answer_says_lowers_the_confidence():
    weights = dict.fromkeys(SHOWN_SIGNALS, 0.0) | {"less": -3.0}
    calibration = replace(calibrated(4), shown=Logistic(tuple(weights.values()), 0.0))
    asked = replace(ASKED, question="how many red stars are there?", answer="1")
    agreeing, contradicted = calibration.confidence(asked), calibration.confidence(replace(asked, areas=2))
    odds = math.log(agreeing.value / (1 - agreeing.value))
    assert contradicted.value == pytest.approx(1 / (1 + math.exp(3 - odds)))
    assert contradicted.weakest == "unsure"


SHIFTS = Shifts({"many": (-1.0, 0.5), "red": (0.25, 0.0)}, {"5": (0.0, -0.5)})


def test_words_shift_how_sure_an_answer_is():
    plain, shifted = calibrated(4), replace(calibrated(4), shifts=SHIFTS)

    def change(question: str, answer: str) -> float:
        signals = replace(ASKED, question=question, answer=answer, log_prob=math.log(0.8), peak=0.9)
        before, after = (each.right.of(each.right_signals(signals), each.shifts.of(signals))
                         for each in (plain, shifted))  # fmt: skip
        value = shifted.confidence(signals).value
        assert value == pytest.approx(after)
        return math.log(after / (1 - after)) - math.log(before / (1 - before))

    odds = math.log(0.8 / 0.2)
    assert change("what colour is it?", "blue") == pytest.approx(0)
    assert change("How MANY, many are there?", "2") == pytest.approx(-1 + 0.5 * odds)
    assert change("how many red stars?", " 5. ") == pytest.approx(-1 + 0.5 * odds + 0.25 - 0.5 * odds)
    assert change("germany?", "15") == pytest.approx(0)


def test_words_that_lower_the_confidence_are_a_reason_to_be_unsure():
    unlikely = replace(calibrated(4), shifts=Shifts({"many": (-9.0, 0.0)}, {}))
    told = unlikely.confidence(replace(ASKED, question="how many stars are there?", answer="5"))
    assert told.weakest == "unsure"
    assert told.value < 0.01


def test_a_card_keeps_its_calibration():
    shown = Logistic(tuple(0.5 * place for place in range(len(SHOWN_SIGNALS))), 0.0)
    card = replace(CARD, confidence=replace(calibrated(CARD.vision_width), shifts=SHIFTS, shown=shown))
    again = ModelCard.from_json(card.to_json()).confidence
    assert again is not None
    assert (again.shifts, again.shown) == (SHIFTS, shown)


def test_a_calibration_from_before_there_were_shifts_shifts_nothing():
    told = calibrated(4).to_json()
    del told["shifts"], told["shown"]
    before = Calibration.from_json(told, 4)
    assert (before.shifts, before.shown) == (NO_SHIFTS, NOTHING_SHOWN)


def test_a_card_keeps_the_rest_of_its_calibration():
    card = replace(CARD, confidence=calibrated(CARD.vision_width))
    again = ModelCard.from_json(card.to_json())
    assert again.confidence is not None
    assert again.confidence.to_json() == calibrated(CARD.vision_width).to_json()
    assert replace(again, confidence=None) == CARD
    assert ModelCard.from_json(CARD.to_json()) == CARD


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("centre", "AAAA", "centre"),
        ("centre", "!", "base64"),
        ("scale", calibrated(4).to_json()["centre"], "scale is not above 0"),
        ("right", {"weights": [1.0], "bias": 0.0}, f"{len(RIGHT_SIGNALS)} signals"),
        ("found", {"weights": [math.nan] * len(FOUND_SIGNALS), "bias": 0.0}, "finite"),
        ("familiar", {"weights": [1.0]}, "weights and bias"),
        ("shown", {"weights": [1.0], "bias": 0.0}, f"{len(SHOWN_SIGNALS)} signals"),
        ("words", {"names": []}, "presence"),
        ("fitted_on", 5, "not a calibration"),
        ("extra", 1, "fields"),
        ("shifts", {"question": {}}, "question and answer"),
        ("shifts", {"question": {"many": [1.0]}, "answer": {}}, "two finite numbers"),
        ("shifts", {"question": {}, "answer": {"5": [1.0, math.inf]}}, "two finite numbers"),
        ("shifts", {"question": [], "answer": {}}, "not a calibration"),
    ],
)
def test_a_malformed_calibration_says_what_is_wrong(field, value, said):
    told = json.loads(replace(CARD, confidence=calibrated(4)).to_json())
    told["confidence"][field] = value
    with pytest.raises(ValueError, match=said):
        ModelCard.from_json(json.dumps(told))


def test_a_calibration_of_another_width_is_refused():
    with pytest.raises(ValueError, match="centre does not have 15 finite numbers"):
        Calibration.from_json(calibrated(4).to_json(), 5)


def test_answers_about_several_images_have_a_regression_of_their_own() -> None:
    calibration = calibrated(4, several=True)
    sure, unsure = (calibration.confidence_of_several(math.log(p), 0.0, is_clip=False) for p in (0.9, 0.4))
    clip = calibration.confidence_of_several(math.log(0.9), 0.0, is_clip=True)
    strange = calibration.confidence_of_several(math.log(0.9), 3.0, is_clip=False)
    assert sure is not None and unsure is not None and clip is not None and strange is not None  # noqa: PT018
    assert sure.value == pytest.approx(0.9)
    assert unsure.value == pytest.approx(0.4)
    assert clip.value == pytest.approx(1 / (1 + math.exp(-(math.log(9) - 1))))
    assert strange.value == pytest.approx(0.9 * strange.familiar / 0.5)
    assert (sure.found, sure.weakest, strange.weakest) == (None, "unsure", "unfamiliar_image")
    assert calibrated(4).confidence_of_several(0.0, 0.0, is_clip=True) is None


def test_a_card_without_that_regression_is_read() -> None:
    told = calibrated(4, several=True).to_json()
    assert Calibration.from_json(told, 4).several == calibrated(4, several=True).several
    del told["several"]
    assert Calibration.from_json(told, 4).several is None
    with pytest.raises(ValueError, match="4 signals has 4 finite weights"):
        Calibration.from_json(told | {"several": {"weights": [1.0], "bias": 0.0}}, 4)
