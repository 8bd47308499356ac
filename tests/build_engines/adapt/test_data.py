"""Images and questions are read in every form, and what cannot be used is listed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from build_engines.adapt import data
from build_engines.adapt.__main__ import main
from build_engines.adapt.data import Asked
from build_engines.convert.options import Refused


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def test_a_plain_folder_has_questions_by_image(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "more/b.jpg")
    (tmp_path / "questions.txt").write_text("a.png\twhat?\tred\nmore/b.jpg\twhere?\n\na.png\t\nc.png\twho?\n")
    found = data.read(tmp_path)
    assert [path.name for path in found.images] == ["a.png", "b.jpg"]
    assert found.questions == [Asked(0, "what?", "red"), Asked(1, "where?")]
    assert set(found.skipped) == {"questions.txt:4", "c.png"}


def test_questions_without_an_image_are_about_every_image(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "questions.txt").write_text("what?\n")
    assert data.read(tmp_path).questions == [Asked(0, "what?"), Asked(1, "what?")]


def test_a_file_that_cannot_be_read_is_told_and_nested_json_is_skipped(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "a.json").write_text("[" * 100_000)
    assert set(data.read(tmp_path).skipped) == {"a.json"}
    (tmp_path / "q.jsonl").mkdir()
    with pytest.raises(Refused, match=r"q\.jsonl: Is a directory"):
        data.read(tmp_path)


def test_jsonl(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    lines = [json.dumps({"image": "a.png", "question": "what?", "answer": ["red", "blue", "red"]}), "{", "[]"]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    found = data.read(tmp_path)
    assert found.questions == [Asked(0, "what?", "red")]
    assert set(found.skipped) == {"q.jsonl:2", "q.jsonl:3"}


FORMS = {
    "VQAv2": {
        "OpenEnded_questions.json": {"questions": [{"image_id": 42, "question": "what?", "question_id": 7}]},
        "annotations.json": {"annotations": [{"question_id": 7, "multiple_choice_answer": "red"}]},
    },
    "GQA": {"train.json": {"1": {"imageId": "COCO_train2014_000000000042", "question": "what?", "answer": "red"}}},
    "DocVQA": {
        "val_v1.0.json": {
            "data": [
                {
                    "image": "train2014/COCO_train2014_000000000042.jpg",
                    "question": "what?",
                    "answers": ["red"],
                    "questionId": 1,
                }
            ]
        }
    },
    "TextVQA": {"TextVQA.json": {"data": [{"image_id": "42", "question": "what?", "answers": ["red", "red", "a"]}]}},
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_files_of_public_data_sets(form: str, tmp_path: Path) -> None:
    pictures(tmp_path, "train2014/COCO_train2014_000000000042.jpg", "train2014/COCO_train2014_000000000043.jpg")
    for name, content in FORMS[form].items():
        (tmp_path / name).write_text(json.dumps(content))
    found = data.read(tmp_path)
    assert (found.form, found.questions) == (form, [Asked(0, "what?", "red")])
    assert [path.stem for path in found.images] == ["COCO_train2014_000000000042"]


def test_without_questions_templates_ask(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    found = data.read(tmp_path)
    assert [one.image for one in found.questions] == [0, 0, 0, 1, 1, 1]
    assert {one.text for one in found.questions} <= set(data.TEMPLATES)
    assert found == data.read(tmp_path)


def test_a_folder_without_images_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nothing", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no images: add some" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_questions_about_other_images_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "questions.txt").write_text("b.png\twhat?\n")
    with pytest.raises(Refused, match=r"about one of its 1 images\. b\.png: a question names this image"):
        data.read(tmp_path)


def test_a_folder_of_something_else_is_not_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(tmp_path / "data", "a.png")
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["nothing", "--data", str(tmp_path / "data"), "--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err
