"""Read images and questions in the forms in which people have them.

| form | files in the folder |
|---|---|
| plain | images, and questions.txt; a line is a question, or image, tab, question, or these and a tab and the answer |
| JSONL | `*.jsonl`, one object a line: `image`, `question`, optional `answer`; other JSON files are not read then |
| VQAv2 | `*questions.json` with `questions` (`image_id`, `question`), optional `*annotations.json` |
| GQA | `*.json`, an object by question id: `imageId`, `question`, optional `answer` |
| TextVQA | `*.json` with `data`: `image_id`, `question`, optional `answers` |
| DocVQA | `*.json` with `data`: `image`, `question`, optional `answers` |

`build_engines/datasets` reads all but the first. JSON files lie in the folder, or if it has none, in the folders in
it. Images lie anywhere below the folder. Templates ask only if there is no file that could have questions. What cannot
be used is listed with the reason, and left out.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from build_engines.convert.options import Refused
from build_engines.convert.source import file_digest
from build_engines.datasets import forms
from build_engines.datasets.entries import Entry, NotReadable
from build_engines.datasets.images import SUFFIXES, ImageIndex, images_below

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
NAMES = {"vqav2": "VQAv2", "gqa": "GQA", "textvqa": "TextVQA", "docvqa": "DocVQA"}  # by form


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
    def answered(self) -> list[Asked]:
        return [question for question in self.questions if question.answer]


def read(folder: Path, limit: int | None = None) -> Data:
    """Read a folder. limit: use only this many images, in the order of their names.

    Raises Refused if there are no images, if no question is about an image of the folder, or if there are files that
    could have questions and none has one.
    """
    if not folder.is_dir():
        raise Refused(f"--data {folder} is not a folder: give one with images and questions")
    paths = images_below(folder)
    if not paths:
        raise Refused(f"--data {folder} has no images: add some ({', '.join(sorted(SUFFIXES))})")
    skipped: dict[str, str] = {}
    try:
        form, lines = _lines(folder, paths, skipped)
    except NotReadable as exc:
        raise Refused(f"--data {folder}: {exc}") from exc
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


def _lines(folder: Path, paths: Sequence[Path], skipped: dict[str, str]) -> tuple[str, list[Entry] | None]:
    """The form, and every question of the folder's files; None if no file could have questions.

    Raises NotReadable if such files have none.
    """
    if (plain := folder / "questions.txt").exists():
        return "plain", list(_plain(forms.lines_of(plain), skipped))
    files = forms.question_files(folder)
    if lines := [path for path in files if path.suffix == ".jsonl"]:
        form, found = "jsonl", [entry for path in lines for entry in forms.jsonl_entries(path, skipped)]
    else:
        form, found = _of_json(files, folder, skipped)
    if found:
        return form, found
    if reasons := _without_questions(folder, files, paths, skipped):
        few = "; ".join(reasons[:3])
        raise NotReadable(f"its files have no questions: {few}. Correct them, or take them out so that templates ask")
    return "templates", None


def _of_json(files: Iterable[Path], folder: Path, skipped: dict[str, str]) -> tuple[str, list[Entry]]:
    """The form of the first file of questions, and the questions of all."""
    form, found = "", list[Entry]()
    for path in files:
        content = forms.content_of(path, skipped)
        if kind := NAMES.get(forms.form_of(content)):
            form = form or kind
            found += forms.entries_of(content, path, folder, skipped)
    return form, found


def _without_questions(
    folder: Path, files: Iterable[Path], images: Iterable[Path], skipped: Mapping[str, str]
) -> list[str]:
    """Every file that could have questions, and why it has none. A file named as an image is about that image."""
    beside = {path.with_suffix("") for path in images} | set(images)
    others = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jsonl")]
    others += sorted(folder.glob("[Qq]uestion*.txt"))  # a README.txt may be there, too
    others += sorted(folder.glob("*/questions.txt"))
    told, named = (
        [f"{name}: {reason}" for name, reason in skipped.items()],
        {name.partition(":")[0] for name in skipped},
    )
    for path in dict.fromkeys([*files, *others]):
        if path.with_suffix("") not in beside and path.name not in named:
            told.append(f"{path.relative_to(folder)}: {_why_none(path)}")
    return told


def _why_none(path: Path) -> str:
    if path.suffix == ".txt":
        return "only questions.txt beside the images is read"
    if not path.is_file():
        return "not a file that can be read"
    if path.suffix == ".jsonl":
        return "empty"
    content = forms.content_of(path, {})
    if isinstance(content, list):
        return "a list: write one object a line, into a file that ends in .jsonl"
    return f"{forms.form_of(content) or 'no known format'}: questions of {', '.join(NAMES.values())} are read"


def _plain(lines: Iterable[tuple[int, str]], skipped: dict[str, str]) -> Iterator[Entry]:
    """Lines without a tab are questions about every image."""
    for number, line in lines:
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) > 3 or not all(parts[:2]):
            skipped[f"questions.txt:{number}"] = "write image, tab, question, and if known a tab and the answer"
        elif len(parts) == 1:
            yield Entry("", parts[0])
        else:
            yield Entry(parts[0], parts[1], tuple(parts[2:]))


def _placed(entries: Sequence[Entry], paths: Sequence[Path], folder: Path, skipped: dict[str, str]) -> list[Asked]:
    """Find each question's image, as ImageIndex does. A question without one is about every image."""
    index = ImageIndex(folder, paths)
    found: list[Asked] = []
    for entry in entries:
        if not entry.image:
            found += [Asked(number, entry.question) for number in range(len(paths))]
        elif (place := index.find(entry.image)) is not None:
            found.append(Asked(place, entry.question, entry.answer))
        else:
            skipped.setdefault(entry.image, "a question names this image, and the folder does not have it")
    return found


def _from_templates(images: int) -> Iterator[Asked]:
    rng = random.Random(5)
    for image in range(images):
        for text in rng.sample(TEMPLATES, TEMPLATES_AN_IMAGE):
            yield Asked(image, text)


def measured(found: Data, asked: Sequence[Asked], seed: int) -> set[int]:
    """The numbers of the images that are kept for the measurement: a tenth of those that are asked, at least one.

    Copies of one file stay together. Raises Refused if no image is left to learn from.
    """
    groups = _copies(found.images, sorted({one.image for one in asked}))
    if len(groups) < 2:
        raise Refused(
            f"{len(groups)} of {len(found.images)} images can be used, and two are needed, one to learn from and one "
            "to measure: an image counts if it can be decoded, is asked, and is no copy of another; with --teacher "
            "answers, if a question about it has an answer. Give more images"
        )
    chosen = random.Random(seed).sample(range(len(groups)), max(1, round(MEASURED_SHARE * len(groups))))
    return {image for group in chosen for image in groups[group]}


def _copies(paths: Sequence[Path], images: Iterable[int]) -> list[list[int]]:
    """The images, those whose files are identical together. Only files of one size are read."""
    by_size: dict[int, list[int]] = {}
    for image in images:
        by_size.setdefault(paths[image].stat().st_size, []).append(image)
    alike: dict[tuple[int, str], list[int]] = {}
    for size, several in by_size.items():
        for image in several:
            alike.setdefault((size, file_digest(paths[image]) if len(several) > 1 else ""), []).append(image)
    return sorted(alike.values())
