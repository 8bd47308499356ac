"""Answers are scored by the dataset's metric, by type, with intervals over images."""

from __future__ import annotations

import numpy as np
import pytest

from build_engines.evaluation.intervals import LEAST_DRAWS, of_images, wilson
from build_engines.evaluation.scoring import Answered, score, telling


def answered(image: str, said: str, *right: str, kind: str = "", **record: object) -> Answered:
    return Answered(image, "?", said, right or ("yes",), {"type": (kind,)} if kind else {}, record)


@pytest.mark.parametrize(
    ("form", "metric", "value"),
    [
        ("vqav2", "VQA accuracy", 0.3),
        ("textvqa", "TextVQA accuracy", 0.3),
        ("gqa", "exact match", 1.0),
        ("jsonl", "exact match", 1.0),
        ("docvqa", "ANLS", 1.0),
    ],
)
def test_each_form_has_its_metric(form: str, metric: str, value: float) -> None:
    """One of ten people says 2."""
    scores = score(form, [answered("a", "2", "2", *["3"] * 9)])
    assert (scores.metric, scores.metrics[0].name) == (metric, metric)
    assert scores.metrics[0].figure.value == pytest.approx(value)


def test_types_are_scored_apart_the_most_frequent_first() -> None:
    told = [
        answered("a", "yes", kind="seldom"),
        answered("a", "yes", kind="often"),
        answered("b", "no", kind="often"),
    ]
    lines = score("jsonl", told).by["type"]
    assert [(line.name, line.questions, line.images, line.figure.value) for line in lines] == [
        ("often", 2, 2, 0.5),
        ("seldom", 1, 1, 1.0),
    ]


def test_the_interval_is_over_images() -> None:
    """Four answers to each of 50 images, alike for an image: as wide as for 50 answers, twice as wide as for 200."""
    together = [answered(str(image), "yes" if image % 2 else "no") for image in range(50) for _ in range(4)]
    apart = [answered(str(number), one.said) for number, one in enumerate(together)]
    wide, narrow = (score("jsonl", told).metrics[0].figure for told in (together, apart))
    low, high = wilson(25, 50)
    assert wide.high - wide.low == pytest.approx(high - low, rel=0.1)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2, rel=0.1)


def test_answers_that_are_all_right_do_not_make_it_certain() -> None:
    figure = score("jsonl", [answered(str(image), "yes") for image in range(10)]).metrics[0].figure
    assert (figure.value, figure.low, figure.high) == pytest.approx((1.0, *wilson(10, 10)))


def test_many_images_are_drawn_less_often() -> None:
    totals = np.stack([np.arange(45_000) % 2, np.ones(45_000)], 1).astype(np.float64)
    (figure,) = of_images(totals, lambda sums: sums[..., :1] / sums[..., 1:])
    assert figure.value == 0.5
    assert figure.high - figure.low == pytest.approx(2 * 1.96 * 0.5 / 45_000**0.5, rel=5 / LEAST_DRAWS**0.5)


def test_captions_have_every_metric_of_the_corpus() -> None:
    scores = score("coco-captions", [answered("a", "a red bus", "a red bus"), answered("b", "dogs", "two dogs here")])
    values = {line.name: line.figure.value for line in scores.metrics}
    assert list(values) == ["CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
    assert values["BLEU-1"] == pytest.approx(np.exp(1 - 6 / 4), rel=1e-6)  # by hand: every word is right, 2 are missing
    assert scores.each[0] > scores.each[1]


def test_wrong_answers_that_tell_most_are_of_every_type_and_one_an_image() -> None:
    told = [
        answered("a", "no", kind="often", confidence=0.5),
        answered("b", "no", kind="often", confidence=0.9),
        answered("b", "no", kind="often", confidence=0.8),
        answered("c", "no", kind="seldom", confidence=0.1),
        answered("d", "yes", kind="often", confidence=1.0),
        answered("e", "no", kind="often", confidence=0.2),
    ]
    scores = score("jsonl", told)
    assert telling(told, scores, 3) == [1, 3, 0]
    assert telling(told, scores, 9) == [1, 3, 0, 5]
