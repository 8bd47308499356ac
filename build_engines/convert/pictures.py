"""Read the folder of `--images`: its images, and the questions about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from blake3 import blake3

from build_engines.adapt import data
from build_engines.convert.options import Refused
from build_engines.convert.source import file_digest
from build_engines.datasets import forms
from build_engines.datasets.entries import NotReadable
from build_engines.datasets.images import images_below

PLAIN_QUESTIONS = ("what is in the picture?", "what colour is it?", "how many are there?", "where is it?")
QUESTIONS = "questions.txt"


@dataclass(frozen=True)
class Pictures:
    """Images, each with its questions. `skipped` has the lines that cannot be used, by place, with the reason."""

    asked: list[tuple[Path, list[str]]]
    skipped: dict[str, str] = field(default_factory=dict)


def pictures(folder: Path) -> Pictures:
    """Read the folder.

    If a line of questions.txt has a tab, the file is read as `glimpse adapt` does: a line names its image. Otherwise a
    line is a question, and each image gets the next one. Without the file they come from PLAIN_QUESTIONS. Raises
    Refused if no question can be used.
    """
    images, file = images_below(folder), folder / QUESTIONS
    try:
        lines = [line for _, line in forms.lines_of(file)] if file.exists() else PLAIN_QUESTIONS
    except NotReadable as exc:
        raise Refused(str(exc)) from exc
    if images and any("\t" in line for line in lines):
        found = data.read(folder)
        texts: dict[Path, list[str]] = {path: [] for path in found.images}
        for question in found.questions:
            texts[found.images[question.image]].append(question.text)
        return Pictures(list(texts.items()), found.skipped)
    questions = [line.strip() for line in lines if line.strip()]
    if not questions:
        raise Refused(f"{file} has no question: write one a line, or remove the file")
    return Pictures([(path, [question]) for path, question in zip(images, cycle(questions), strict=False)])


def digest_of(folder: Path) -> str:
    """blake3 of the names and bytes of what a build reads in the folder. Raises Refused if it is no folder."""
    if not folder.is_dir():
        raise Refused(f"--images {folder} is not a folder: give one with images")
    read = [*images_below(folder), *(path for path in [folder / QUESTIONS] if path.exists())]
    told = [f"{path.relative_to(folder).as_posix()} {_digest(path)}" for path in read]
    return blake3("\n".join(told).encode()).hexdigest()


def _digest(path: Path) -> str:
    """Digest a file; an image that cannot be read is left out later."""
    try:
        return file_digest(path)
    except OSError as exc:
        if path.name == QUESTIONS:
            raise Refused(f"{path} cannot be read: {exc.strerror}") from exc
        return "unreadable"
