"""The figures of the field's metrics for short answers.

Those of official.json are what the scripts of the datasets gave for the same answers, run once by hand: VQAv2's, as the
package salesforce-lavis 1.0.2 has it (`lavis/common/vqa_tools/vqa_eval.py`), and TextVQA's answer processor, as the
package lmms-eval 0.7.3 has it, with the mean over nine of ten people. In percent.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from build_engines.evaluation.metrics import answer_text
from build_engines.evaluation.metrics.short_answers import (
    anls,
    consensus,
    edit_distance,
    exact_match,
    textvqa_accuracy,
    vqa_accuracy,
)

OFFICIAL = json.loads((Path(__file__).parent / "official.json").read_text())["answers"]


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda case: case["said"] or "nothing")
def test_consensus_is_that_of_the_official_scripts(case: dict) -> None:
    assert 100 * vqa_accuracy(case["said"], case["answers"]) == pytest.approx(case["vqav2"], abs=0.01)
    assert 100 * textvqa_accuracy(case["said"], case["answers"]) == pytest.approx(case["textvqa"], abs=0.01)


def test_peoples_answers_lose_their_punctuation_and_nothing_else() -> None:
    """As in the official script: without the marks of `brown / white`, two spaces are left."""
    for told, accuracy in (("brown/white", 1.0), ("brown / white", 0.0), ("Brown white", 0.0), ("brown white\n", 1.0)):
        assert vqa_accuracy("brown white", [told] * 9 + ["tan"]) == pytest.approx(accuracy)


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_consensus_of_ten_people(same: int, accuracy: float) -> None:
    """By hand: with 2 of 10 who say the same, 2 choices leave out one of them (1/3), 8 choices do not (2/3)."""
    assert consensus("x", ["x"] * same + [str(other) for other in range(10 - same)]) == pytest.approx(accuracy)


def test_one_person_alone_decides() -> None:
    assert (consensus("x", ["x"]), consensus("y", ["x"])) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Two dogs.", "2 dogs"),
        ("dont  know", "don't know"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("3.50", "3.50"),
        ("u.s.", "us"),
        ("black/white", "black white"),
        ("red, blue", "red blue"),
        ("none", "0"),
        ("well", "well"),
    ],
)
def test_answers_are_compared_as_vqav2_describes(text: str, plain: str) -> None:
    """From visualqa.org/evaluation, by hand."""
    assert answer_text.vqa(text) == plain


def test_textvqa_parts_the_possessive() -> None:
    assert answer_text.textvqa("McDonald's, Inc?") == "mcdonald 's inc"


@pytest.mark.parametrize(
    ("said", "answers", "similarity"),
    [
        ("ITC Limited", ["itc limited"], 1.0),
        ("itc", ["itc limited"], 0.0),  # 8 of 11 characters differ
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("1998", ["1989", "1999"], 0.75),
        ("ab", ["ac"], 0.5),  # the threshold itself counts
        ("", ["x"], 0.0),
    ],
)
def test_anls(said: str, answers: list[str], similarity: float) -> None:
    """By equation 1 of Biten et al. 2019, by hand."""
    assert anls(said, answers) == pytest.approx(similarity)


def test_edit_distance() -> None:
    """Levenshtein's textbook pairs."""
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("flaw", "lawn"))] == [3, 3, 2]


def test_exact_match_forgives_case_space_and_a_full_stop() -> None:
    assert exact_match(" Red. ", ["red"]) == exact_match("two", ["2", "Two"]) == 1.0
    assert exact_match("dark red", ["red"]) == 0.0
