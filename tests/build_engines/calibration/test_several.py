"""How sure answers about clips and several images are: asked of the committed repository, and fitted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from build_engines.calibration.chain import Chain
from build_engines.calibration.fitting import TooFew
from build_engines.calibration.several import Answered, answered, calibration_error, fit, keeping_several, with_several
from build_engines.export import _calibration
from service.core.confidence import Logistic, several_signals
from tests.support.calibrations import calibrated
from tests.support.paths import PROJECT


def drawn(number: int = 4000) -> list[Answered]:
    """Answers that are right as often as the LLM says, those about clips less often."""
    generator = np.random.default_rng(0)
    found = []
    for place, sure in enumerate(generator.uniform(0.05, 0.98, number)):
        is_clip = bool(place % 2)
        chance = 1 / (1 + math.exp(-(math.log(sure / (1 - sure)) - is_clip)))
        found.append(Answered(place // 4, is_clip, math.log(sure), 0.0, bool(generator.random() < chance)))
    return found


def test_the_fit_finds_how_often_answers_are_right() -> None:
    answers = drawn()
    told = fit(answers)
    for sure in (0.3, 0.6, 0.9):
        for is_clip in (False, True):
            right = 1 / (1 + math.exp(-(math.log(sure / (1 - sure)) - is_clip)))
            assert told.of(several_signals(math.log(sure), is_clip=is_clip)) == pytest.approx(right, abs=0.05)
    judged = replace(calibrated(4), several=told)
    assert calibration_error(answers, judged) < 0.03
    always = Logistic((0.0, 0.0, 0.0, 0.0), 2.0)  # .88
    right = float(np.mean([each.right for each in answers]))
    assert calibration_error(answers, replace(judged, several=always)) == pytest.approx(
        abs(always.of((0.0,) * 4) - right), abs=0.005
    )


def test_the_error_is_of_what_is_told_about_unfamiliar_images_too() -> None:
    strange = [replace(each, strangeness=9.0) for each in drawn(400)]
    judged = replace(calibrated(4), several=fit(drawn()))
    right = float(np.mean([each.right for each in strange]))
    assert calibration_error(strange, judged) == pytest.approx(right, abs=0.01)  # it is sure of nothing


def test_too_few_wrong_answers_are_no_calibration() -> None:
    with pytest.raises(TooFew, match="0 of 200 answers"):
        fit([replace(each, right=False) for each in drawn(200)])


@pytest.mark.slow
def test_the_committed_models_answer_about_clips_and_groups() -> None:
    chain = Chain.load(PROJECT / "model_repository")
    assert chain.card.confidence is not None
    answers = answered(chain, chain.card.confidence, share=0.02)
    assert {each.is_clip for each in answers} == {False, True}
    assert sum(each.right for each in answers) > len(answers) / 2  # by luck about .3
    assert all(each.log_prob <= 0 for each in answers)
    assert all(chain.card.confidence.familiar.of([each.strangeness]) > 0.2 for each in answers)  # their own world


@pytest.mark.slow
def test_models_without_weights_for_clips_get_no_such_regression(tmp_path: Path) -> None:
    chain = Chain.load(PROJECT / "model_repository")
    chain.card = replace(chain.card, clip_weights=False)
    calibration = calibrated(chain.card.vision_width)
    assert with_several(calibration, chain) is calibration


@pytest.mark.slow
def test_too_few_answers_keep_what_one_images_confidence_is(capsys: pytest.CaptureFixture[str]) -> None:
    chain = Chain.load(PROJECT / "model_repository")
    calibration = calibrated(chain.card.vision_width)
    assert with_several(calibration, chain, share=0.01) is calibration
    assert "clips and several images are not calibrated: " in capsys.readouterr().out


def test_another_calibration_keeps_the_regression_of_the_same_models() -> None:
    before = replace(calibrated(4, several=True), fitted_on={"clip_weights": "b", "images": 1})
    kept = keeping_several(calibrated(4), before)
    assert kept.several == before.several
    assert kept.fitted_on["clip_weights"] == "b"
    assert kept.fitted_on["images"] == 10


def test_the_regression_is_left_out_for_other_weights() -> None:
    own = calibrated(4, several=True)
    weights = {"weights": "a", "language": "l"}
    told = replace(own, fitted_on=dict(own.fitted_on) | weights | {"clip_weights": "b"}).to_json()
    for clips, has_it in (("b", True), ("c", False)):
        found, _ = _calibration(told, 4, weights, clips)
        assert found is not None
        assert (found.several is not None) == has_it
    for other in ("weights", "language"):
        assert _calibration(told, 4, weights | {other: "other"}, "b")[0] is None
