"""How accuracy is measured, and that the committed model answers a sample of the questions."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from build_engines.evaluation.accuracy import (
    CLIPS,
    FOLDERS,
    FRAMES,
    SEVERAL,
    Outcome,
    Row,
    as_markdown,
    ask_all,
    compare_frames,
    evaluate,
    folder_of,
    rows,
    summarise,
)
from build_engines.evaluation.intervals import wilson
from tests.support.paths import SCENES
from tests.support.servers import Gateway


def outcome(kind: str, answer: str, said: str, tokens: int = 100) -> Outcome:
    return Outcome(Row("a.webp", "?", answer, kind, "new"), said, tokens)


def test_numbers_of_frames_stand_in_their_order_behind_other_splits_names():
    outcomes = [replace(outcome("all", "1", "1"), row=Row("a", "?", "1", "count", split)) for split in SPLITS]
    lines = as_markdown(summarise(outcomes)).splitlines()[2:]
    assert list(dict.fromkeys(line.split(" | ")[0] for line in lines)) == [f"| {split}" for split in SPLITS]


SPLITS = ["new", "clips, 4 frames", "clips, 8 frames", "clips, 16 frames", "clips, 32 frames"]


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
        "n": 2, "accuracy": 0.5, "low": 0, "high": 0, "majority": 1.0, "vision_tokens": 96.0
    }  # fmt: skip
    assert as_markdown(table).splitlines()[-1].startswith("| new | all | 2 | 0.500 |")


def test_the_majority_is_the_most_frequent_answer_of_each_type():
    """2 of 3 colours are red and 1 of 2 counts is 4, which is right in 3 of 5 questions. Descriptions do not count."""
    said = [("colour", "red"), ("colour", "red"), ("colour", "blue"), ("count", "4"), ("count", "2"), ("describe", "a")]
    table = summarise([outcome(kind, answer, "?") for kind, answer in said])["new"]
    assert {kind: row["majority"] for kind, row in table.items()} == {
        "colour": 0.6667, "count": 0.5, "describe": 1.0, "all": 0.6
    }  # fmt: skip
    assert "| new | all | 5 | 0.000 | 0.000 to 0.793 | 0.600 | 100 |" in as_markdown(table={"new": table})


def test_questions_about_one_scene_are_not_independent():
    """Of two scenes drawn from two, a quarter of the draws has only the scene whose answers are all wrong."""
    asked = [Row(image, "?", answer, "count", "new") for image, answer in (("a", "1"), ("b", "2")) for _ in range(10)]
    row = summarise([Outcome(each, "1", 100) for each in asked])["new"]["count"]
    assert (row["n"], row["accuracy"], row["low"], row["high"]) == (20, 0.5, 0.0, 1.0)
    right = summarise([Outcome(each, each.answer, 100) for each in asked])["new"]["count"]
    assert (right["accuracy"], right["low"], right["high"]) == (1.0, round(wilson(2, 2)[0], 4), 1.0)


def test_a_scene_is_what_a_question_is_about():
    assert Row("a", "?", "", "", "").scene == Row("a", "!", "x", "", "").scene != Row("b", "?", "", "", "").scene
    assert Row("", "?", "", "", "", images=("a", "b")).scene != Row("", "?", "", "", "", images=("a", "c")).scene
    assert Row("", "?", "", "", "", clip="a").scene != Row("", "?", "", "", "", clip="b").scene


class Service:
    """Answers as `say` tells, from a request's body, and keeps the bodies."""

    def __init__(self, say: Any) -> None:
        self.say, self.bodies = say, []
        self.client = httpx.Client(base_url="http://service", transport=httpx.MockTransport(self.respond))

    def respond(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(
                200, json={"data": [{"id": "reference", "fingerprint": "ab", "visual_fingerprint": "cd"}]}
            )
        body = json.loads(request.content)
        self.bodies.append(body)
        vision = {"vision_tokens": 200, "reduced": body["question"] == "what came?"}
        return httpx.Response(200, json={"answer": self.say(body), "vision": vision})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two clips with three questions, and a pair of images with one."""
    for name in ("a.mp4", "b.mp4", "a.webp", "b.webp"):
        (tmp_path / name).write_bytes(name.encode())
    lines = [
        {"clip": "a.mp4", "question": "what moved?", "answer": "star", "type": "moved", "split": "clips"},
        {"clip": "a.mp4", "question": "what came?", "answer": "ring", "type": "came", "split": "clips"},
        {"clip": "b.mp4", "question": "what moved?", "answer": "ring", "type": "moved", "split": "clips"},
        {"images": ["b.webp", "a.webp"], "question": "same?", "answer": "yes", "type": "same", "split": "several"},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_clips_are_asked_with_each_number_of_frames(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The stand-in knows only one of the three answers at 4 frames, and all at 8 and more."""

    def say(body: dict[str, Any]) -> str:
        clip = base64.b64decode(body["video"]).decode()
        known = {("a.mp4", "what moved?"): "star", ("a.mp4", "what came?"): "ring", ("b.mp4", "what moved?"): "ring"}
        return known[clip, body["question"]] if body["video_frames"] >= 8 else "star"

    service = Service(say)
    table = evaluate(service.client, folder, CLIPS, detail="low", clients=2, out=tmp_path / "out.json")
    assert sorted(body["video_frames"] for body in service.bodies) == [number for number in FRAMES for _ in range(3)]
    assert all({"image", "images"}.isdisjoint(body) and body["detail"] == "low" for body in service.bodies)
    shares = {split: (kinds["all"]["n"], kinds["all"]["accuracy"]) for split, kinds in table.items()}
    assert shares == {f"clips, {number} frames": (3, 0.3333 if number == 4 else 1.0) for number in FRAMES}
    assert table["clips, 8 frames"]["moved"]["majority"] == 0.5
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["accuracy"] == table
    assert (report["model"], report["fingerprint"], report["visual_fingerprint"]) == ("reference", "ab", "cd")
    assert (report["answers"], report["reduced_by_load"]) == (12, 4)
    assert set(report["minus_8_frames"]) == {"4", "16", "32"}
    assert report["minus_8_frames"]["4"] | {"low": 0, "high": 0} == {"value": -0.6667, "low": 0, "high": 0}
    assert report["minus_8_frames"]["32"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    said = capsys.readouterr().out
    assert "4 frames minus 8: -0.667 (-1.000 to -0.500)" in said
    assert "4 of 12 answers are reduced" in said


def test_several_images_are_asked_in_their_order(folder: Path, tmp_path: Path):
    service = Service(lambda body: "yes" if body["question"] == "same?" else "no")
    table = evaluate(service.client, folder, SEVERAL, out=tmp_path / "out.json")
    (body,) = service.bodies
    assert [base64.b64decode(image) for image in body["images"]] == [b"b.webp", b"a.webp"]
    assert {"image", "video", "video_frames"}.isdisjoint(body)
    assert table["several"]["same"]["accuracy"] == 1.0
    assert "minus_8_frames" not in json.loads((tmp_path / "out.json").read_text())


def test_frames_are_compared_question_by_question():
    """Without 8 frames there is nothing to compare with."""
    asked = [Row("", "?", "yes", "order", "clips", clip=f"{clip}.mp4") for clip in "abcd"]
    right, wrong = ([Outcome(row, said, 1) for row in asked] for said in ("yes", "no"))
    assert compare_frames({4: right, 16: wrong}) == {}
    half = [*right[:2], *wrong[2:]]
    found = compare_frames({8: half, 16: right})
    assert found[16]["value"] == 0.5
    assert 0 <= found[16]["low"] < 0.5 < found[16]["high"] <= 1


def test_committed_splits_are_found_by_their_names():
    for split in (CLIPS, SEVERAL):
        asked = rows(folder_of(split), split)
        assert len(asked) >= 280
        assert {row.split for row in asked} == {split}
        assert {row.type for row in asked}.isdisjoint({"all", "describe"})  # the table's own
        assert all((FOLDERS[split] / name).is_file() for row in asked for name in (row.images or (row.clip,)))
    assert folder_of(None) == folder_of("new") == SCENES


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


def test_several_committed_images_are_asked_through_the_service(gateway: Gateway):
    """Every tenth question is answered. How well is not tested here."""
    asked = rows(folder_of(SEVERAL), SEVERAL)[::10]
    with httpx.Client(base_url=gateway.url, timeout=60) as client:
        outcomes = list(ask_all(client, folder_of(SEVERAL), asked, {}, clients=4))
    assert [one.row for one in outcomes] == asked
    assert all(one.answer and one.vision_tokens >= 64 * len(one.row.images) for one in outcomes)
