"""Images and questions are read in every form, and what cannot be used is listed."""

from __future__ import annotations

import json
import random
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


LISTED = [{"image": "a.png", "question": "what?"}]
CAPTIONS = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("q.json", json.dumps(LISTED), r"q\.json: a list: write one object a line, into a file that ends in \.jsonl"),
        ("q.json", '{"questions": [{"image_id": 1, "quest', r"q\.json: no JSON"),
        ("q.json", "[" * 100_000, r"q\.json: no JSON"),
        ("captions.json", json.dumps(CAPTIONS), r"captions\.json: coco-captions: questions of VQAv2, .* are read"),
        ("q.jsonl", "{}\n", r"q\.jsonl:1: needs a JSON object"),
        ("q.jsonl", "", r"q\.jsonl: empty"),
        ("question.txt", "what?\n", r"question\.txt: only questions\.txt beside the images is read"),
        ("sub/questions.txt", "what?\n", r"sub/questions\.txt: only questions\.txt beside"),
        ("sub/q.json", json.dumps(LISTED), r"sub/q\.json: a list"),
    ],
)
def test_templates_do_not_ask_in_place_of_a_file_without_questions(
    name: str, content: str, reason: str, tmp_path: Path
) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=f"its files have no questions: {reason}"):
        data.read(tmp_path)


def test_a_link_to_nowhere_is_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "q.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(Refused, match=r"q\.jsonl: not a file that can be read"):
        data.read(tmp_path)


def test_a_file_named_as_an_image_has_no_questions(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    for name in ("a.json", "a.png.json", "a.txt", "README.txt"):
        (tmp_path / name).write_text("{}")
    assert data.read(tmp_path).form == "templates"


def test_questions_may_lie_a_folder_below(tmp_path: Path) -> None:
    pictures(tmp_path, "images/a.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "q.jsonl").write_text('{"image": "a.png", "question": "what?"}\n')
    found = data.read(tmp_path)
    assert (found.form, found.questions) == ("jsonl", [Asked(0, "what?")])


def test_a_byte_order_mark_and_unicodes_line_separator_are_no_part_of_a_question(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "gqa.json").write_text(json.dumps({"1": {"imageId": "a", "question": "what?"}}), "utf-8-sig")
    assert data.read(tmp_path).form == "GQA"
    (tmp_path / "questions.txt").write_text("a.png\twhat\u2028is it?\nwhere?\r\n", "utf-8-sig")
    assert data.read(tmp_path).questions == [Asked(0, "what\u2028is it?"), Asked(0, "where?")]


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


def test_only_images_that_are_asked_are_kept_apart_and_copies_stay_together(tmp_path: Path) -> None:
    names = [f"{number:02}.png" for number in range(40)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"copy" if number % 2 else f"{number:04}".encode())
    found = data.read(tmp_path)
    asked = [one for one in found.questions if one.image < 20]
    copies = set(range(1, 20, 2))
    for seed in range(30):
        kept = data.measured(found, asked, seed)
        assert kept
        assert kept < set(range(20))
        assert kept & copies in (set(), copies)
    assert any(data.measured(found, asked, seed) & copies for seed in range(30))
    unlike = [one for one in found.questions if one.image in (0, 2, 4, 6)]
    assert data.measured(found, unlike, 5) == {2 * random.Random(5).sample(range(4), 1)[0]}
    for few in ([], asked[:3], [one for one in asked if one.image in copies]):
        with pytest.raises(Refused, match="of 40 images can be used, and two are needed"):
            data.measured(found, few, 5)


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
