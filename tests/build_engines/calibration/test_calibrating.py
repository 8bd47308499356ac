"""`glimpse calibrate` on the committed repository, with few questions; and questions from a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from build_engines.calibration.__main__ import collected, main, words_of
from build_engines.calibration.asking import Outcome, Picture, Task, budget_of, told
from build_engines.calibration.chain import Chain, Said, View
from build_engines.calibration.fitting import Asked
from build_engines.calibration.kept import Kept
from build_engines.calibration.writing import write
from build_engines.convert.run import digests
from build_engines.verify.files import check_manifest
from build_engines.verify.report import Report
from service.core.card import ModelCard
from service.core.confidence import Signals
from service.core.request import Budget
from service.core.vision import Relevance, Seen, VisionFeatures
from tests.support.calibrations import calibrated
from tests.support.fakes import png
from tests.support.paths import PROJECT, SCENES

REPOSITORY = PROJECT / "model_repository"


def questions(path: Path, number: int) -> Path:
    """The first committed questions, as `--questions` takes them."""
    rows = [json.loads(line) for line in (SCENES / "questions.jsonl").read_text().splitlines()][:number]
    for row in rows:
        shutil.copyfile(SCENES / row["image"], path / row["image"])
    file = path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.slow
def test_the_chain_in_this_process_answers_as_the_served_one(tmp_path: Path) -> None:
    chain = Chain.load(REPOSITORY)
    view = chain.look((SCENES / "new_003.webp").read_bytes())
    asked = ("what character is on the pink square?", "how many objects are there?")
    budget = Budget(chain.card.vision_tokens, chain.card.default_visual_tokens)
    said = chain.answer((chain.attend(view, question, budget), question) for question in asked)
    assert [each.text for each in said] == ["8", "4"]
    assert all(each.log_prob <= 0 and each.tokens == 2 for each in said)  # the end token is the second


@pytest.mark.slow
def test_too_few_questions_are_told_and_change_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY, repository)
    before = (repository / "card.json").read_bytes()
    assert main([str(repository), "--questions", str(questions(tmp_path, 4)), "--kept", str(tmp_path)]) == 2
    assert "ask questions with at least 50 right and 50 wrong answers" in capsys.readouterr().err
    assert (repository / "card.json").read_bytes() == before


@pytest.mark.slow
def test_answers_of_another_language_model_are_not_kept_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository, kept = tmp_path / "repository", tmp_path / "kept"
    shutil.copytree(REPOSITORY, repository)
    arguments = [str(repository), "--questions", str(questions(tmp_path, 1)), "--kept", str(kept)]
    card = ModelCard.from_json((repository / "card.json").read_text())
    for language in (card.language_fingerprint, "another"):
        (repository / "card.json").write_text(replace(card, language_fingerprint=language).to_json())
        assert main(arguments) == 2  # too few questions
    assert len([path for path in kept.iterdir() if path.stat().st_size]) == 2
    capsys.readouterr()
    (repository / "card.json").write_text(replace(card, language_fingerprint="").to_json())
    assert main(arguments) == 2
    assert "build the repository again" in capsys.readouterr().err


class Looking(Chain):
    """Counts the images that it looks at."""

    looks = 0

    def look(self, data: bytes, *, closely: bool = False) -> View:
        self.looks += 1
        return super().look(data, closely=closely)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    chain, kept = Looking.load(REPOSITORY), tmp_path / "kept" / "weights.jsonl"
    pictures, foreign = list(told(questions(tmp_path, 40)))[:3], {"a.png": png()}
    first = collected(chain, pictures[:2], {}, kept)
    assert chain.looks == 2
    with kept.open("r+b") as file:  # stopped in the middle of a line
        file.truncate(kept.stat().st_size - 9)
    whole = collected(chain, pictures, foreign, kept)
    assert chain.looks == 2 + 3
    again = collected(chain, pictures, foreign, kept)
    assert chain.looks == 5
    assert [each.outcomes for each in again] == [each.outcomes for each in whole]
    assert [each.outcomes for each in whole[:2]] == [each.outcomes for each in first]
    assert [each.is_foreign for each in again] == [False] * 3 + [True]
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.summary, other.summary)


@pytest.mark.slow
def test_files_that_are_no_images_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, foreign, kept = questions(tmp_path, 3), tmp_path / "foreign", tmp_path / "kept"
    (foreign / "more").mkdir(parents=True)
    (foreign / "Thumbs.db").write_bytes(b"no picture")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    damaged, missing = rows[0] | {"image": "damaged.jpg"}, rows[0] | {"image": "missing.jpg"}
    (tmp_path / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    file.write_text("".join(json.dumps(row) + "\n" for row in (damaged, missing, *rows)))
    arguments = [str(REPOSITORY), "--questions", str(file), "--foreign", str(foreign), "--kept", str(kept)]
    assert main(arguments) == 2
    told_first = capsys.readouterr().err
    assert "4 files or lines are left out: " in told_first
    assert "no file of " + str(foreign) + " is an image that can be used" in told_first
    (foreign / "a.png").write_bytes(png())
    assert main(arguments) == 2
    assert "ask questions with at least 50 right and 50 wrong answers" in capsys.readouterr().err
    listed = (kept / "skipped.txt").read_text()
    for name in ("questions.jsonl:1: damaged.jpg: ", "questions.jsonl:2: missing.jpg: ", "Thumbs.db: ", "more: "):
        assert name in listed
    file.write_text(json.dumps(damaged) + "\n")
    assert main(arguments[:3] + arguments[5:]) == 2
    assert "no question of " in capsys.readouterr().err


def test_the_calibration_goes_into_the_card_and_the_checkpoints_card(tmp_path: Path) -> None:
    card = ModelCard.from_json((REPOSITORY / "card.json").read_text())
    (tmp_path / "card.json").write_text(card.to_json())
    (tmp_path / "model_card.json").write_text('{"name": "x"}')
    calibration = calibrated(card.vision_width)
    write(calibration, tmp_path, tmp_path)
    again = ModelCard.from_json((tmp_path / "card.json").read_text())
    assert again.confidence is not None
    assert again.confidence.to_json() == calibration.to_json()
    assert (
        again.metadata["confidence"]
        == "calibrated on 80 questions about 10 images, and on 2 out-of-distribution images"
    )
    assert json.loads((tmp_path / "model_card.json").read_text()) == {"name": "x", "confidence": calibration.to_json()}


def test_a_calibrated_repository_is_still_what_its_manifest_says(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    shutil.copyfile(REPOSITORY / "card.json", repository / "card.json")
    (repository / "manifest.json").write_text(json.dumps({"precision": "fp32", "files": digests(repository)}))
    before = (repository / "card.json").read_text()
    os.link(repository / "card.json", tmp_path / "opened before")
    write(calibrated(ModelCard.from_json(before).vision_width), repository, None)
    report = Report()
    check_manifest(repository, report)
    assert [(check.name, check.state) for check in report.checks] == [("manifest", "ok")]
    assert json.loads((repository / "manifest.json").read_text())["precision"] == "fp32"
    assert sorted(path.name for path in repository.iterdir()) == ["card.json", "manifest.json"]
    assert (tmp_path / "opened before").read_text() == before  # the new card took its name as a whole
    assert (repository / "card.json").read_text() != before


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"image": "a.png"}',
        '{"image": "a.png", "question": "what?"}',
        '{"image": "a.png", "question": ["what?"], "answer": "x"}',
        '{"image": "a.png", "question": "what?", "answer": {"x": 1}}',
        '{"image": "a.png", "question": "what?", "answer": "x", "found": "yes"}',
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"q.jsonl:1: give image, question and answer"):
        list(told(tmp_path / "q.jsonl"))


def test_questions_about_one_image_are_one_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    rows = [
        {"image": "b.png", "question": "how many\u2028dots?", "answer": 3, "found": True},
        {"image": "gone.png", "question": "what?", "answer": "x"},
        {"image": "a.png", "question": "what colour?", "answers": ["red", " Crimson"], "split": "s"},
        {"image": "./b.png", "question": "where?", "answer": "here"},
        {"image": "gone.png", "question": "where?", "answer": "x"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "q.jsonl").write_text("\n\n".join([*lines, "{"]), "utf-8-sig")
    skipped: dict[str, str] = {}
    first, second = told(tmp_path / "q.jsonl", skipped)
    assert [(task.image, task.group, task.question, task.found) for task in first.tasks] == [
        (0, "all", "how many\u2028dots?", True),
        (0, "all", "where?", None),
    ]
    assert [task.image for task in second.tasks] == [2]
    assert [first.tasks[0].is_right(said) for said in ("3", "three")] == [True, False]
    assert [second.tasks[0].is_right(said) for said in ("Red", "crimson", "blue")] == [True, True, False]
    assert set(skipped) == {"q.jsonl:3: gone.png", "q.jsonl:11"}


class Standing:
    """Stands for a chain: answers everything alike, and notes the budgets."""

    def __init__(self, card: ModelCard) -> None:
        self.card, self.budgets = card, list[Budget]()

    def look(self, data: bytes, *, closely: bool = False) -> View:
        features = VisionFeatures(
            np.zeros((257, self.card.vision_width), np.float16), *(np.zeros(256, np.float32) for _ in range(3))
        )
        return View(features)

    def attend(self, view: View, question: str, budget: Budget) -> Seen:
        self.budgets.append(budget)
        relevance = Relevance(
            np.zeros((16, 16), np.float32), np.zeros((3, 16, 16), np.float32), np.zeros((8, 8), np.int32),
            np.zeros(2, np.float32),
        )  # fmt: skip
        return Seen(np.zeros((32, 8), np.float32), relevance, budget)

    def answer(self, asked: Iterable[tuple[Seen, str]]) -> list[Said]:
        return [Said("red", -0.1, 2) for _ in asked]


def test_a_question_gets_the_budget_of_a_request_that_names_none(tmp_path: Path) -> None:
    """Answers that were kept with another budget are not taken for these."""
    card = ModelCard.from_json((REPOSITORY / "card.json").read_text())
    task, kept = Task(0, "all", "what?", "red", None), tmp_path / "kept.jsonl"
    pictures = [Picture(b"1", [task]), Picture(b"2", [task, task], closely=True)]
    for default in ((96, 128), (64, 256)):
        chain = Standing(replace(card, default_vision_tokens=default))
        for _ in range(2):
            found = collected(chain, pictures, {}, kept)  # type: ignore[arg-type]
            assert [outcome.right for each in found for outcome in each.outcomes] == [True] * 3
        most = chain.card.unasked_vision_tokens("high")[1]
        assert [budget.vision_tokens for budget in chain.budgets] == [default, *[(default[0], most)] * 2]
    assert len(kept.read_text().splitlines()) == 4


@pytest.mark.parametrize(("questions", "of_each"), [(5, 3), (2, 2)])
def test_every_foreign_image_is_asked_about(questions: int, of_each: int) -> None:
    """However many there are: the questions begin anew once they are used up."""
    chain = Standing(ModelCard.from_json((REPOSITORY / "card.json").read_text()))
    pictures = [Picture(b"1", [Task(0, "all", f"what {number}?", "red", None) for number in range(questions)])]
    files = {f"{number}.png": bytes([number]) for number in range(10)}
    found = collected(chain, pictures, files)  # type: ignore[arg-type]
    foreign = [[outcome.task.question for outcome in each.outcomes] for each in found if each.is_foreign]
    assert len(foreign) == 10
    assert all(len(set(asked)) == of_each for asked in foreign)
    assert {question for asked in foreign for question in asked} == {f"what {number}?" for number in range(questions)}


def test_only_an_unfinished_line_is_cut_off_what_is_kept(tmp_path: Path) -> None:
    card = ModelCard.from_json((REPOSITORY / "card.json").read_text())
    budget, path = budget_of(card, closely=False), tmp_path / "kept.jsonl"
    picture = Picture(b"1", [Task(0, "all", "what?", "red", None, ("crimson",))])
    signals = Signals("what?", "red", -0.1, 0.5, 0.5, 0.5, False, 0.0, 1)
    asked = Asked(np.zeros(3, np.float32), [Outcome(picture.tasks[0], signals, right=True)])
    with Kept(path) as kept:
        kept.put(picture, budget, asked)
        assert json.loads(path.read_text())["is_foreign"] is False  # on the disk at once
    with path.open("a") as file:
        file.write('{"key": "of a version that wrote less"}\n{"key": "unfin')
    before = path.stat().st_ino
    with Kept(path) as kept:
        found = kept.get(picture, budget)
        assert found is not None
        assert found.outcomes == asked.outcomes
        with pytest.raises(ValueError, match="another process uses"):
            Kept(path)
        kept.put(Picture(b"2", picture.tasks), budget, asked)
    assert path.stat().st_ino == before
    assert [line[-1] for line in path.read_text().splitlines()] == ["}"] * 3
    with Kept(path) as kept:
        assert kept.get(Picture(b"2", picture.tasks), budget) is not None


@pytest.mark.parametrize("content", ["{", '{"names": []}', "[]", '{"names": 1, "presence": [], "denials": []}'])
def test_words_of_another_form_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text(content)
    with pytest.raises(ValueError, match="give names, presence and denials"):
        words_of(tmp_path / "words.json")


def test_the_committed_calibration_is_of_the_committed_weights() -> None:
    card = ModelCard.from_json((REPOSITORY / "card.json").read_text())
    assert card.confidence is not None
    assert card.confidence.fitted_on["weights"] == card.visual_fingerprint
    assert card.confidence.fitted_on["language"] == card.language_fingerprint
    checkpoint = json.loads((PROJECT / "reference" / "model_card.json").read_text())
    assert checkpoint["confidence"] == json.loads((REPOSITORY / "card.json").read_text())["confidence"]
