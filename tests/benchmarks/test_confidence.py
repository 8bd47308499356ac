"""The benchmark's figures, on answers whose figures are known."""

from __future__ import annotations

import pytest

from benchmarks.confidence import Said, Table, calibration_error, errors_gone, found_auroc, pictures
from build_engines.calibration.asking import Task


def said(confidence: float, right: bool, found: float | None = None, there: bool | None = None, image: int = 0) -> Said:
    return Said(Task(image, "new", "?", "a", there), right, confidence, found, 1.0)


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    table = Table([said(0.9, True)] * 8 + [said(0.9, False)] * 2 + [said(0.3, False)] * 10)
    assert calibration_error(table) == pytest.approx(0.5 * 0.1 + 0.5 * 0.3)
    assert calibration_error(Table([said(1.0, True)] * 3)) == 0


def test_the_errors_that_are_gone_are_those_of_the_least_confident_tenth():
    sure_errors = [said(0.9, False)]
    assert errors_gone(Table([said(0.8, True)] * 17 + sure_errors + [said(0.1, False)] * 2)) == pytest.approx(2 / 3)
    assert errors_gone(Table([said(0.8, True)] * 10)) == 1.0  # none is left


def test_found_is_judged_on_questions_that_name_something():
    named = [said(0.5, True, 0.9, True), said(0.5, True, 0.2, False), said(0.5, True, 0.6, True)]
    assert found_auroc(Table([*named, said(0.5, True), said(0.5, True, 0.1, None)])) == 1.0
    assert found_auroc(Table([*named, said(0.5, True, 0.7, False)])) == pytest.approx(0.75)


def test_an_interval_draws_images_and_holds_the_value():
    table = Table([said(0.7, index % 10 < 7, image=index // 4) for index in range(400)])
    found = table.resampled(lambda drawn: float(drawn.right.mean()))
    assert found["low"] < found["value"] == 0.7 < found["high"]


def test_every_image_has_a_number_of_its_own():
    files: dict[int, set[bytes]] = {}
    for picture in pictures(2):
        for task in picture.tasks:
            files.setdefault(task.image, set()).add(picture.data)
    assert len(files) == 7  # two of each of three splits, and one of another renderer
    assert {len(each) for each in files.values()} == {1}
