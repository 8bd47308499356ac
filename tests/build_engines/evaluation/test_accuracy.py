"""How accuracy is measured, and that the committed model answers a sample of the questions."""

from __future__ import annotations

import httpx
import pytest

from build_engines.evaluation.accuracy import Outcome, Row, as_markdown, ask_all, rows, summarise, wilson
from tests.support.paths import SCENES
from tests.support.servers import Gateway


def outcome(kind: str, answer: str, said: str, tokens: int = 100) -> Outcome:
    return Outcome(Row("a.webp", "?", answer, kind, "new"), said, tokens)


@pytest.mark.parametrize(
    ("right", "of", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_interval(right, of, low, high):
    """The last case is Newcombe's example (1998, Statistics in Medicine 17:857)."""
    assert wilson(right, of) == pytest.approx((low, high), abs=1e-4)


def test_answers_match_but_for_case_and_space():
    assert outcome("colour", "red", " Red ").right
    assert not outcome("colour", "red", "dark red").right


def test_summary_by_type_and_descriptions_apart():
    table = summarise(
        [outcome("colour", "red", "red", 64), outcome("count", "2", "3", 128), outcome("describe", "a b", "a", 256)]
    )
    assert table["new"]["colour"]["accuracy"] == 1.0
    assert table["new"]["count"]["accuracy"] == 0.0
    assert table["new"]["all"] | {"low": 0, "high": 0} == {
        "n": 2, "accuracy": 0.5, "low": 0, "high": 0, "vision_tokens": 96.0
    }  # fmt: skip
    assert as_markdown(table).splitlines()[-1].startswith("| new | all | 2 | 0.500 |")


def test_committed_questions_cover_every_type_and_split():
    asked = rows(SCENES)
    for split in ("new", "held_out_pairs"):
        kinds = [row.type for row in asked if row.split == split]
        assert {"colour", "shape", "count", "exist", "relation", "size", "read"} <= set(kinds)
        assert min(kinds.count(kind) for kind in set(kinds)) >= 50
    assert all((SCENES / row.image).is_file() for row in asked)


def test_the_served_model_answers_the_committed_questions(gateway: Gateway):
    """Ask every 12th question, to find a broken export or a stale repository. `glimpse eval` asks all."""
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        outcomes = list(ask_all(client, SCENES, rows(SCENES)[::12], {}, clients=4))
    right = sum(outcome.right for outcome in outcomes)
    assert len(outcomes) > 150
    assert right / len(outcomes) >= 0.8, [(o.row.question, o.row.answer, o.answer) for o in outcomes if not o.right]
