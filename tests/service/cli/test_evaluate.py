"""`glimpse eval --dataset`: the user's own files are asked, scored and reported."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.core.errors import DeadlineExceeded
from tests.service.cli.conftest import serving
from tests.service.cli.test_main import run
from tests.support import datasets
from tests.support.datasets import Asked
from tests.support.fakes import CLOSER, House, png
from tests.support.paths import SCENES
from tests.support.servers import Gateway, eventually

TOLD = replace(CLOSER, language_fingerprint="l")
COMMAND = [sys.executable, "-c", "from service.cli.main import main; main()", "eval"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images and four questions about each. The stand-in for the model says `red` to all."""
    source = tmp_path / "source"
    source.mkdir()
    for number, name in enumerate("ab"):
        (source / f"{name}.png").write_bytes(png((number, 0, 0)))
    asked = [
        Asked(f"{name}.png", f"{number}?", answer, kind)
        for name in "ab"
        for number, (answer, kind) in enumerate(
            [("red", "colour"), ("Red.", "colour"), ("two", "count"), ("3", "count")]
        )
    ]
    datasets.write("jsonl", tmp_path / "set", source, asked)
    return tmp_path / "set"


def evaluate(folder: Path, url: str, *more: str) -> tuple[int, dict[str, Any], str]:
    """Measure into the folder `out` beside the dataset -> status, report and what was said on standard error."""
    out = folder.parent / "out"
    status, _, told = run("eval", "--dataset", str(folder), "--out", str(out), "--url", url, *more)
    report = out / "report.json"
    return status, json.loads(report.read_text()) if report.exists() else {}, told


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder.parent / "out" / "answers.jsonl").read_text().splitlines()]


def test_answers_are_scored_by_type_and_reported(server, folder):
    status, report, told = evaluate(folder, server.url)
    assert (status, report["format"]) == (0, "jsonl")
    assert report["metrics"]["exact match"]["value"] == 0.5
    assert {kind: line["value"] for kind, line in report["by"]["type"].items()} == {"colour": 1.0, "count": 0.0}
    assert report["by"]["type"]["colour"]["images"] == 2
    assert report["counts"] == {"read": 8, "answered": 8, "failed": 0, "skipped": {}}
    assert (report["asked"]["prompt"], report["asked"]["max_tokens"]) == ("{question}", 16)
    page = (folder.parent / "out" / "report.html").read_text()
    assert "Telling wrong answers: 2 of 4" in page
    assert str(folder.parent / "out" / "report.html") in told


def test_what_cannot_be_used_is_skipped_told_and_counted(server, folder):
    (folder / "images" / "broken.png").write_bytes(png()[:40])
    with (folder / "questions.jsonl").open("a") as questions:
        for image in ("gone.png", "images/broken.png", "images/broken.png"):
            questions.write(json.dumps({"image": image, "question": "?", "answer": "red"}) + "\n")
        questions.write(json.dumps({"image": "images/n1.png", "question": "?"}) + "\nno JSON\n")
    status, report, told = evaluate(folder, server.url)
    assert (status, report["counts"]["answered"], report["counts"]["failed"]) == (0, 8, 0)
    assert report["counts"]["skipped"] == {
        "not readable": 1,
        "image missing": 1,
        "without answers": 1,
        "image broken": 1,
    }
    assert report["skipped"]["image broken"][0].endswith("(2 questions)")
    assert "skipped, image missing: 1, such as gone.png: question 9" in told
    assert report["metrics"]["exact match"]["value"] == 0.5


def test_text_that_is_no_unicode_ends_nothing(server, folder):
    """Half of a surrogate pair, as JSON may have it, and as Python reads a file's name that is no UTF-8."""
    name = os.fsdecode(b"n\xff.png")
    (folder / "images" / name).write_bytes(png((7, 7, 7)))
    with (folder / "questions.jsonl").open("a") as questions:
        for fields in (
            {"question": "?", "answer": "\ud800", "type": "\ud800"},
            {"question": "\ud800", "answer": "red"},
        ):
            questions.write(json.dumps({"image": name, **fields}) + "\n")
    status, report, told = evaluate(folder, server.url)
    assert (status, report["counts"]["answered"], report["counts"]["failed"]) == (1, 9, 1)
    assert "half of a surrogate pair ('\\ud800'): remove it" in told
    assert answers(folder)[-1]["image"] == f"images/{name}"
    assert "n?.png" in (folder.parent / "out" / "report.html").read_text()


def test_failures_are_no_wrong_answers_and_are_asked_again(server, folder):
    server.house.language.fault = DeadlineExceeded("too late")
    server.house.language.wait_at = 0
    status, report, told = evaluate(folder, server.url)
    assert (status, report, "no question was answered" in told) == (1, {}, True)
    server.house.language.fault = None
    assert evaluate(folder, server.url)[:2][0] == 0
    assert len(answers(folder)) == 8


def test_a_larger_limit_asks_only_what_is_new(server, folder):
    assert evaluate(folder, server.url, "--limit", "3", "--seed", "5")[1]["counts"]["answered"] == 3
    first = {each["line"] for each in answers(folder)}
    assert evaluate(folder, server.url, "--limit", "6", "--seed", "5")[1]["counts"]["answered"] == 6
    assert first < {each["line"] for each in answers(folder)}
    assert len(server.house.language.request_ids) == 6
    assert evaluate(folder, server.url, "--limit", "2", "--seed", "5")[1]["counts"]["answered"] == 2
    assert len(server.house.language.request_ids) == 6


def test_the_prompt_stands_around_the_question(server, folder):
    report = evaluate(folder, server.url, "--prompt", "{question} In one word.", "--limit", "1")[1]
    assert answers(folder)[0]["question"].endswith("? In one word.")
    assert report["asked"]["prompt"] == "{question} In one word."
    assert "--prompt has no {question}" in evaluate(folder, server.url, "--prompt", "what?")[2]


@pytest.mark.parametrize("change", ["question", "image", "option"])
def test_answers_to_something_else_are_never_taken(change, server, folder):
    assert evaluate(folder, server.url)[0] == 0
    if change == "question":
        path = folder / "questions.jsonl"
        path.write_text(path.read_text().replace("0?", "other?"))
    if change == "image":
        (folder / "images" / "n1.png").write_bytes(png((9, 9, 9)))
    more = ["--detail", "high"] if change == "option" else []
    status, _, told = evaluate(folder, server.url, *more)
    assert (status, "answer to another question or with other options for line 1" in told) == (1, True)


@pytest.mark.parametrize("server", [TOLD], indirect=True)
@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "another"},
        {"visual_fingerprint": "another"},  # as with --allocator
        {"language_fingerprint": "another"},
        {"default_vision_tokens": (96, 192)},
        {"closer_view_at": 0.9},
        {"fit": "pad"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_answers_of_another_model_are_never_taken(server, folder, change):
    assert evaluate(folder, server.url)[0] == 0
    with serving(House(replace(TOLD, **change))) as other:
        status, _, told = evaluate(folder, other.url)
    assert (status, "has answers of another model" in told) == (1, True)
    assert evaluate(folder, server.url)[0] == 0


def test_a_run_of_an_older_version_goes_on_if_all_agrees_that_it_told(server, folder):
    assert evaluate(folder, server.url)[0] == 0
    run_file = folder.parent / "out" / "run.json"
    noted = json.loads(run_file.read_text())
    older = {name: noted["model"][name] for name in ("id", "card", "fingerprint", "precision")}
    run_file.write_text(json.dumps(noted | {"model": older}))
    assert evaluate(folder, server.url)[0] == 0
    run_file.write_text(json.dumps(noted | {"model": older | {"precision": "int8"}}))
    status, _, told = evaluate(folder, server.url)
    assert (status, "has answers of another model" in told) == (1, True)


def test_a_run_that_ended_before_its_first_answer_begins_anew(server, folder):
    out = folder.parent / "out"
    out.mkdir()
    (out / "run.json").touch()  # the program was killed while it wrote this
    assert evaluate(folder, server.url)[0] == 0
    assert json.loads((out / "run.json").read_text())["form"] == "jsonl"


def test_the_same_command_goes_on_inside_the_folder_of_the_dataset(server, folder, monkeypatch):
    """Questions and images lie one folder below, beside what the first run has written."""
    (folder / "questions").mkdir()
    (folder / "questions.jsonl").rename(folder / "questions" / "questions.jsonl")
    monkeypatch.chdir(folder)
    for _ in range(2):
        assert run("eval", "--dataset", ".", "--url", server.url)[0] == 0
    assert (folder / "set-eval" / "report.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "nowhere"], "nowhere does not exist: give a folder"),
        (["--dataset", ".", "--split", "new"], "--scenes, --split and --frames belong to the committed scenes"),
        (["--dataset", ".", "--frames", "8"], "--scenes, --split and --frames belong to the committed scenes"),
        (["--frames", "8"], "--frames belongs to clips: add --split clips"),
        (["--split", "several", "--frames", "8"], "--frames belongs to clips: add --split clips"),
        (["--limit", "3"], "belong to --dataset: name one"),
    ],
)
def test_what_does_not_go_together_is_told(arguments, said):
    status, _, told = run("eval", *arguments)
    assert (status, said in told) == (1, True)


def test_without_a_dataset_scenes_are_asked_as_before(server, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    row = {"image": "a.png", "question": "?", "answer": "red", "type": "colour", "split": "new"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "table.json"
    status, said, _ = run("eval", "--scenes", str(tmp_path), "--out", str(out), "--url", server.url)
    assert (status, "| new | all | 1 | 1.000 |" in said) == (0, True)
    assert json.loads(out.read_text())["accuracy"]["new"]["colour"]["accuracy"] == 1.0


class Closing(list[str]):
    """Ids of requests. The gate closes when so many have come."""

    def __init__(self, gate: asyncio.Event, at: int) -> None:
        super().__init__()
        self.gate, self.at = gate, at

    def append(self, request_id: str) -> None:
        super().append(request_id)
        if len(self) == self.at:
            self.gate.clear()


def test_a_run_that_is_killed_goes_on(server, folder):
    """It is killed with two answers on the disk and two questions in work. The second run asks the other six."""
    out = folder.parent / "out"
    arguments = ["--dataset", str(folder), "--out", str(out), "--url", server.url, "--clients", "2"]
    language = server.house.language
    language.request_ids = Closing(language.gate, at=3)
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        written = out / "answers.jsonl"
        eventually(lambda: written.exists() and written.read_bytes().count(b"\n") == 2, 60, "two answers")
        eventually(lambda: language.open == 2, 60, "two questions in work")
        process.send_signal(signal.SIGKILL)
    asked = len(language.request_ids)
    server.loop.call_soon_threadsafe(language.gate.set)
    status, report, _ = evaluate(folder, server.url)
    assert (status, report["counts"]["answered"]) == (0, 8)
    assert sorted(each["line"] for each in answers(folder)) == list(range(1, 9))
    assert len(language.request_ids) - asked == 6


def test_every_form_is_measured_on_a_real_service(gateway: Gateway, tmp_path: Path) -> None:
    """The committed model knows these answers, so a form that loses questions, images or answers shows."""
    rows = [json.loads(line) for line in (SCENES / "questions.jsonl").read_text().splitlines()]
    asked = [
        Asked(row["image"], row["question"], row["answer"], row["type"])
        for row in rows
        if row["split"] == "new" and row["type"] in ("colour", "shape")
    ][:12]
    many = len(asked)
    for form in datasets.FORMS:
        datasets.write(form, tmp_path / form, SCENES, asked)
        out = tmp_path / "out" / form
        status, said, told = run("eval", "--dataset", str(tmp_path / form), "--out", str(out), "--url", gateway.url)
        assert status == 0, told
        report = json.loads((out / "report.json").read_text())
        metric, line = next(iter(report["metrics"].items()))
        assert report["format"] == form
        assert metric in said
        if form == "coco-captions":
            assert list(report["metrics"]) == ["CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]
            assert line["questions"] == len({each.image for each in asked})
        else:
            assert (line["questions"], line["value"] >= 0.9) == (many, True), (form, line)
            assert line["low"] < line["value"] or line["value"] == line["high"]
        assert report["answers"]["mean_vision_tokens"] > 0
