"""Read images and questions in the forms in which people have them.

| form | files in the folder |
|---|---|
| plain | images, and questions.txt; a line is a question, or image, tab, question, or these and a tab and the answer |
| JSONL | `*.jsonl`, one object a line: `image`, `question`, optional `answer` |
| VQAv2 | `*questions.json` with `questions` (`image_id`, `question`), optional `*annotations.json` |
| GQA | `*.json`, an object by question id: `imageId`, `question`, optional `answer` |
| TextVQA | `*.json` with `data`: `image_id`, `question`, optional `answers` |

Images lie anywhere below the folder. Without any questions, templates are used. Files that cannot be used are listed
with the reason, and left out.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build_engines.convert.options import Refused

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
TEMPLATES = (
    "what is in the picture?",
    "what is the main object?",
    "what colour is the object in the middle?",
    "how many objects are there?",
    "what is on the left?",
    "what is on the right?",
    "what is in the background?",
    "what does the text say?",
)
TEMPLATES_AN_IMAGE = 3
MEASURED_SHARE = 0.1  # of the images: kept from training, for the measurement
NUMBER = re.compile(r"(\d+)$")


@dataclass(frozen=True)
class Asked:
    """A question about image number `image`; its answer is empty if there is none."""

    image: int
    text: str
    answer: str = ""


@dataclass(frozen=True)
class Data:
    """Images and questions. `skipped` has what was left out, by name, with the reason."""

    images: list[Path]
    questions: list[Asked]
    skipped: dict[str, str] = field(default_factory=dict)
    form: str = "plain"

    @property
    def answered(self) -> int:
        return sum(bool(question.answer) for question in self.questions)


@dataclass(frozen=True)
class _Line:
    """A question as a file has it: the image by a name, or by an id that is part of the name."""

    image: str
    text: str
    answer: str = ""


def read(folder: Path, limit: int | None = None) -> Data:
    """Read a folder. limit: use only this many images, in the order of their names.

    Raises Refused if there are no images, or questions of which none is about an image of the folder.
    """
    if not folder.is_dir():
        raise Refused(f"--data {folder} is no folder: give one with images and questions")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise Refused(f"--data {folder} has no images: add some ({', '.join(sorted(SUFFIXES))})")
    skipped: dict[str, str] = {}
    form, lines = _lines(folder, skipped)
    if lines is None:
        paths = paths[:limit]
        return Data(paths, list(_from_templates(len(paths))), skipped, "templates")
    questions = _placed(lines, paths, folder, skipped)
    if not questions:
        few = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise Refused(f"no question of {folder} is about one of its {len(paths)} images. {few}")
    used = sorted({question.image for question in questions})[:limit]
    place = {number: index for index, number in enumerate(used)}
    return Data(
        [paths[number] for number in used],
        [Asked(place[q.image], q.text, q.answer) for q in questions if q.image in place],
        skipped,
        form,
    )


def _lines(folder: Path, skipped: dict[str, str]) -> tuple[str, list[_Line] | None]:
    """The form, and every question of the folder's files; None without such files."""
    if (plain := folder / "questions.txt").exists():
        return "plain", list(_plain(plain.read_text(errors="replace").splitlines(), skipped))
    if jsonl := sorted(folder.glob("*.jsonl")):
        return "jsonl", [line for path in jsonl for line in _jsonl(path, skipped)]
    found: list[_Line] = []
    form = ""
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as exc:
            skipped[path.name] = f"no JSON: {exc}"
            continue
        kind, lines = _of_json(content, folder)
        if kind:
            form = form or kind
            found += lines
    return (form, found) if found else ("templates", None)


def _plain(lines: Iterable[str], skipped: dict[str, str]) -> Iterator[_Line]:
    """Lines without a tab are questions about every image."""
    for number, line in enumerate(lines, 1):
        parts = [part.strip() for part in line.split("\t")]
        if not line.strip():
            continue
        if len(parts) > 3 or not all(parts[:2]):
            skipped[f"questions.txt:{number}"] = "write image, tab, question, and if known a tab and the answer"
        elif len(parts) == 1:
            yield _Line("", parts[0])
        else:
            yield _Line(*parts)


def _jsonl(path: Path, skipped: dict[str, str]) -> Iterator[_Line]:
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            yield _Line(str(told["image"]), str(told["question"]), _answer(told.get("answer", "")))
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            skipped[f"{path.name}:{number}"] = f"needs a JSON object with image and question: {exc!r}"


def _of_json(content: Any, folder: Path) -> tuple[str, list[_Line]]:
    """The form of a JSON file and its questions; an empty form for a file of something else."""
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        answers = _annotations(folder)
        return "VQAv2", [
            _Line(str(q["image_id"]), str(q["question"]), answers.get(q.get("question_id"), ""))
            for q in content["questions"]
            if isinstance(q, dict) and {"image_id", "question"} <= q.keys()
        ]
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        return "TextVQA", [
            _Line(str(q["image_id"]), str(q["question"]), _answer(q.get("answers", "")))
            for q in content["data"]
            if isinstance(q, dict) and {"image_id", "question"} <= q.keys()
        ]
    if isinstance(content, dict):
        lines = [
            _Line(str(q["imageId"]), str(q["question"]), _answer(q.get("answer", "")))
            for q in content.values()
            if isinstance(q, dict) and {"imageId", "question"} <= q.keys()
        ]
        return ("GQA", lines) if lines else ("", [])
    return "", []


def _annotations(folder: Path) -> dict[Any, str]:
    """VQAv2's answers by question id."""
    found: dict[Any, str] = {}
    for path in folder.glob("*annotations.json"):
        for told in json.loads(path.read_text()).get("annotations", []):
            found[told["question_id"]] = _answer(told.get("multiple_choice_answer", ""))
    return found


def _answer(told: Any) -> str:
    """One answer. Of several people's answers, the most frequent."""
    if isinstance(told, list):
        return Counter(str(one) for one in told).most_common(1)[0][0] if told else ""
    return str(told)


def _placed(lines: Sequence[_Line], paths: Sequence[Path], folder: Path, skipped: dict[str, str]) -> list[Asked]:
    """Find each question's image: by path, name, name without suffix, or the number at the end of the name.

    COCO's image 42 is COCO_train2014_000000000042.jpg.
    """
    places: dict[str, int] = {}
    for number, path in reversed(list(enumerate(paths))):
        ends = NUMBER.search(path.stem)
        if ends:
            places[str(int(ends.group(1)))] = number
        places |= {path.stem: number, path.name: number, str(path.relative_to(folder)): number}
    found: list[Asked] = []
    for line in lines:
        if not line.image:
            found += [Asked(number, line.text) for number in range(len(paths))]
        elif (place := places.get(line.image)) is not None:
            found.append(Asked(place, line.text, line.answer))
        else:
            skipped.setdefault(line.image, "a question names this image, and the folder does not have it")
    return found


def _from_templates(images: int) -> Iterator[Asked]:
    rng = random.Random(5)
    for image in range(images):
        for text in rng.sample(TEMPLATES, TEMPLATES_AN_IMAGE):
            yield Asked(image, text)


def measured(images: int, seed: int) -> set[int]:
    """The numbers of the images that are kept for the measurement: a tenth, at least one."""
    return set(random.Random(seed).sample(range(images), max(1, round(MEASURED_SHARE * images))))
