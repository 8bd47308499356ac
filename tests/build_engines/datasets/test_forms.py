"""Every form's file is read, and what cannot be used is listed with the reason."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from build_engines.datasets import forms
from build_engines.datasets.entries import Entry, NotReadable
from build_engines.datasets.images import ImageIndex, images_below
from tests.support import datasets
from tests.support.datasets import Asked
from tests.support.fakes import png

KINDS = {
    "vqav2": {"answer type": ("number",), "question type": ("how",)},
    "gqa": {"structural type": ("query",), "semantic type": ("number",)},
    "textvqa": {},
    "docvqa": {"question type": ("number", "form")},
    "jsonl": {"type": ("number",)},
}


@pytest.mark.parametrize("form", datasets.FORMS)
def test_each_form_is_told_by_its_content_and_its_images_are_found(form: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    file = datasets.write(form, tmp_path / "set", tmp_path, [Asked("a.png", "how many?", "two", "number")])
    found = forms.read(tmp_path / "set")
    assert (found.form, found.path, found.skipped) == (form, file, {})
    (entry,) = found.entries
    assert entry.answer == "two"
    if form == "coco-captions":
        assert (entry.question, entry.answers) == ("", ("two",))
    else:
        assert (entry.question, dict(entry.kinds)) == ("how many?", KINDS[form])
        assert len(entry.answers) == (datasets.PEOPLE if form in ("vqav2", "textvqa") else 1)
    paths = images_below(tmp_path / "set")
    assert ImageIndex(tmp_path / "set", paths).find(entry.image) == 0
    assert forms.read(file, form) == found


def test_of_several_files_one_must_be_named(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"1": {"imageId": "n1", "question": name, "answer": "x"}}))
    with pytest.raises(NotReadable, match=r"several files of questions \(train.json, val.json\): name one of them"):
        forms.read(tmp_path)
    assert forms.read(tmp_path / "val.json").entries[0].question == "val"


NESTED = "[" * 100_000


def test_json_that_is_nested_too_deep_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(NESTED + '\n{"image": "a.png", "question": "?", "answer": "x"}\n')
    found = forms.read(tmp_path)
    assert (len(found.entries), list(found.skipped)) == (1, ["lines.jsonl:1"])
    (tmp_path / "nested.json").write_text(NESTED)
    with pytest.raises(NotReadable, match="no JSON"):
        forms.read(tmp_path / "nested.json")


@pytest.mark.parametrize(
    "line",
    ['{"image": null, "question": "?"}', '{"image": "a.png", "question": ["?"]}',
     '{"image": "a.png", "question": "?", "answers": ["x", null]}'],
)  # fmt: skip
def test_what_is_no_text_is_no_question(line: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(line + '\n{"image": 7, "question": "?", "answer": 3}\n')
    found = forms.read(tmp_path)
    assert found.entries == [Entry("7", "?", ("3",), "2")]
    assert "is no text" in found.skipped["q.jsonl:1"]


def test_what_adapt_has_written_is_no_file_of_questions(tmp_path: Path) -> None:
    (tmp_path / "adapted").mkdir()
    for name in ("adapted.json", "report.json"):
        (tmp_path / "adapted" / name).write_text("{}")
    assert forms.question_files(tmp_path) == []


def test_an_annotation_without_a_usable_question_id_is_passed_by(tmp_path: Path) -> None:
    (tmp_path / "questions.json").write_text(
        json.dumps({"questions": [{"image_id": 1, "question": "?", "question_id": 2}]})
    )
    annotations = [{"question_id": [2]}, {"question_id": 2, "multiple_choice_answer": "x"}]
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    assert forms.read(tmp_path).entries[0].answers == ("x",)


def test_only_files_are_images(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "a.png").write_bytes(png())
    assert images_below(tmp_path) == [tmp_path / "a.png"]


def test_a_missing_image_is_not_another_of_the_same_name(tmp_path: Path) -> None:
    index = ImageIndex(tmp_path, [tmp_path / name for name in ("a/1.png", "a/2.png", "b/1.png")])
    assert [index.find(name) for name in ("b/1.png", "c/1.png", "c/2.png", "1.png")] == [2, None, 1, 0]


def test_files_may_lie_a_folder_below_and_other_json_is_passed_by(tmp_path: Path) -> None:
    for folder, files in (("annotations", 1), ("ocr", forms.MOST_JSON_FILES + 1)):
        (tmp_path / folder).mkdir()
        for number in range(files):
            content = {"1": {"imageId": "n1", "question": folder, "answer": "x"}}
            (tmp_path / folder / f"{number}.json").write_text(json.dumps(content))
    assert forms.read(tmp_path).entries[0].question == "annotations"


def test_other_files_that_datasets_come_with_are_no_questions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    captions = datasets.write("coco-captions", tmp_path, tmp_path, [Asked("a.png", "", "a bus")])
    others = {
        "instances_val2014.json": {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"bbox": [0, 0, 1, 1]}]},
        "TextVQA_Rosetta_OCR_v0.2_val.json": {"data": [{"image_id": "a", "ocr_tokens": []}]},
        "v2_mscoco_val2014_annotations.json": {"annotations": [{"question_id": 1, "answers": []}]},
        "v2_mscoco_val2014_complementary_pairs.json": [[1, 2]],
        "val_sceneGraphs.json": {"1": {"objects": {}}},
    }
    for name, content in others.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert forms.read(tmp_path).path == captions


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("{", "has no questions in a known form"),
        ("{}", "has no questions in a known form"),
        ('{"questions": [{"question": "?"}]}', r"no question that can be used. q.json:0: no question of this form"),
    ],
)
def test_what_is_no_dataset_is_told(content: str | None, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    if content is not None:
        folder.mkdir()
        (folder / "q.json").write_text(content)
    with pytest.raises(NotReadable, match=said):
        forms.read(folder)


def test_another_form_than_asked_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"1": {"imageId": "n1", "question": "?", "answer": "x"}}))
    with pytest.raises(NotReadable, match="its content is gqa"):
        forms.read(tmp_path / "q.json", "vqav2")


def test_bad_records_are_left_out_with_their_place(tmp_path: Path) -> None:
    good = {"image_id": "a", "question": "?", "answers": ["x", "y", "x"]}
    (tmp_path / "q.json").write_text(json.dumps({"data": [good, {"image_id": "a"}, 7]}))
    found = forms.read(tmp_path)
    assert found.entries == [Entry("a", "?", ("x", "y", "x"), "0")]
    assert set(found.skipped) == {"q.json:1", "q.json:2"}
    assert found.entries[0].answer == "x"


def test_only_cocos_numbers_stand_for_images(tmp_path: Path) -> None:
    names = ["n161313.jpg", "2_7.jpg", "abstract_v002_val2015_000000000007.png"]
    names += ["a/COCO_val2014_000000000009.jpg", "b/COCO_val2014_000000000009.jpg"]  # copies
    names += ["COCO_train2014_000000000008.jpg", "000000000008.jpg"]
    index = ImageIndex(tmp_path, [tmp_path / name for name in names])
    assert [index.find(name) for name in ("161313", "7", "9", "8")] == [None, 2, 3, None]


def test_an_image_is_found_by_path_name_stem_and_number(tmp_path: Path) -> None:
    names = ["a/COCO_val2014_000000000042.jpg", "a/n7.png", "b/n7.png"]
    index = ImageIndex(tmp_path, [tmp_path / name for name in names])
    found = [
        index.find(name) for name in ("42", "COCO_val2014_000000000042", "n7", "b/n7.png", "elsewhere/n7.png", "8")
    ]
    assert found == [0, 0, 1, 2, None, None]
