"""Small datasets in the forms in which the public ones are published."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A question about an image of the dataset, with the answer that people agree on."""

    image: str  # the name of a file that is there
    question: str
    answer: str
    kind: str = "other"


PEOPLE = 10
FORMS = ("vqav2", "gqa", "textvqa", "docvqa", "coco-captions", "jsonl")
FILES = {
    "vqav2": "v2_OpenEnded_mscoco_val2014_questions.json",
    "gqa": "testdev_balanced_questions.json",
    "textvqa": "TextVQA_0.5.1_val.json",
    "docvqa": "val_v1.0.json",
    "coco-captions": "captions_val2014.json",
    "jsonl": "questions.jsonl",
}
# The numbers and names of images, as the datasets have them.
COCO, TEXTVQA, DOCVQA = "COCO_val2014_{:012d}", "{:016x}", "documents/page{}_{}"


def write(form: str, folder: Path, source: Path, asked: Sequence[Asked]) -> Path:
    """Write the questions and copies of their images, named as the dataset names them -> the file of questions."""
    images = list(dict.fromkeys(each.image for each in asked))
    named = {image: _named(form, number, image) for number, image in enumerate(images, 1)}
    for image, (path, _) in named.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes((source / image).read_bytes())
    if form == "jsonl":
        lines = [
            {"image": named[each.image][1], "question": each.question, "answer": each.answer, "type": each.kind}
            for each in asked
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines)
    else:
        content = json.dumps(_content(form, folder, asked, {image: name for image, (_, name) in named.items()}))
    path = folder / FILES[form]
    path.write_text(content)
    return path


def _named(form: str, number: int, image: str) -> tuple[str, Any]:
    """The image's path in the folder, and what the questions call it."""
    suffix = Path(image).suffix
    if form in ("vqav2", "coco-captions"):
        name = COCO.format(number)
        return f"val2014/{name}{suffix}", number if form == "vqav2" else f"{name}{suffix}"
    if form == "docvqa":
        name = DOCVQA.format(number, number) + suffix
        return name, name
    name = TEXTVQA.format(number) if form == "textvqa" else f"n{number}"
    return f"images/{name}{suffix}", f"images/{name}{suffix}" if form == "jsonl" else name


def _content(form: str, folder: Path, asked: Sequence[Asked], named: dict[str, Any]) -> Any:
    numbered = list(enumerate(asked, 1))
    if form == "vqav2":
        annotations = [
            {
                "question_id": number,
                "question_type": each.question.split()[0],
                "answer_type": each.kind,
                "multiple_choice_answer": each.answer,
                "answers": [{"answer": each.answer, "answer_id": person} for person in range(1, PEOPLE + 1)],
            }
            for number, each in numbered
        ]
        (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
        return {
            "questions": [
                {"question_id": number, "image_id": named[each.image], "question": each.question}
                for number, each in numbered
            ]
        }
    if form == "gqa":
        return {
            str(number): {
                "imageId": named[each.image],
                "question": each.question,
                "answer": each.answer,
                "types": {"structural": "query", "semantic": each.kind, "detailed": each.kind},
            }
            for number, each in numbered
        }
    if form == "textvqa":
        return {
            "data": [
                {
                    "question_id": number,
                    "image_id": named[each.image],
                    "question": each.question,
                    "answers": [each.answer] * PEOPLE,
                }
                for number, each in numbered
            ]
        }
    if form == "docvqa":
        return {
            "data": [
                {
                    "questionId": number,
                    "image": named[each.image],
                    "question": each.question,
                    "answers": [each.answer],
                    "question_types": [each.kind, "form"],
                }
                for number, each in numbered
            ]
        }
    ids = {image: number for number, image in enumerate(named, 1)}
    return {
        "images": [{"id": ids[image], "file_name": name} for image, name in named.items()],
        "annotations": [
            {"id": number, "image_id": ids[each.image], "caption": each.answer} for number, each in numbered
        ],
    }
