"""What a dataset's file says about one question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


class NotReadable(Exception):
    """The files are no dataset that can be read. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A question, or an image to describe.

    `image` is a file's name, or an id that is part of the name. `answers` are those of several people, or all that
    count as right. `kinds` has the entry's types by the name of the typing, such as {"answer type": ("number",)}.
    """

    image: str
    question: str = ""
    answers: tuple[str, ...] = ()
    id: str = ""
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    agreed: str = ""  # the one answer that the dataset itself names

    @property
    def answer(self) -> str:
        """The dataset's one answer, else the most frequent one, else an empty text."""
        if self.agreed or not self.answers:
            return self.agreed
        return Counter(self.answers).most_common(1)[0][0]


@dataclass(frozen=True, slots=True)
class Dataset:
    """The entries of one file, in its order. `skipped` has the reason for each record that was left out, by place."""

    form: str
    path: Path
    entries: list[Entry]
    skipped: dict[str, str] = field(default_factory=dict)
