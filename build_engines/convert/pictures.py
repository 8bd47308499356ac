"""Read the folder of `--images`: its images, and the questions about them."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

from blake3 import blake3

from build_engines.convert.options import Refused
from build_engines.convert.source import file_digest
from build_engines.datasets.images import images_below

PLAIN_QUESTIONS = ("what is in the picture?", "what colour is it?", "how many are there?", "where is it?")
QUESTIONS = "questions.txt"


def pictures(folder: Path) -> list[tuple[Path, str]]:
    """Return each image with a question.

    Questions come from the folder's questions.txt (one a line), else from PLAIN_QUESTIONS.
    """
    asked = folder / QUESTIONS
    questions = asked.read_text().splitlines() if asked.exists() else PLAIN_QUESTIONS
    return list(zip(images_below(folder), cycle(questions), strict=False))


def digest_of(folder: Path) -> str:
    """blake3 of the names and bytes of what a build reads in the folder. Raises Refused if it is no folder."""
    if not folder.is_dir():
        raise Refused(f"--images {folder} is not a folder: give one with images")
    read = [*images_below(folder), *(path for path in [folder / QUESTIONS] if path.exists())]
    told = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in read]
    return blake3("\n".join(told).encode()).hexdigest()
