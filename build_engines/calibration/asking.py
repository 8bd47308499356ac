"""Ask questions with known answers, and keep the signals of each answer."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from build_engines.calibration.absent import about_nothing
from build_engines.calibration.chain import Chain, View
from build_engines.datasets.forms import jsonl_lines
from build_engines.scenes.held_out import QUALITY, SMALL, SPLITS, held_out_scenes
from build_engines.scenes.questions import Question
from build_engines.scenes.world import COLOUR_NAMES, SHAPES, SIZE_NAMES
from service.core.card import ModelCard
from service.core.confidence import Signals, Words
from service.core.request import Budget

ABSENT = "absent"  # questions about an object that is not there
FOREIGN = "foreign"  # questions about an out-of-distribution image
SMALL_CLOSELY = "small_print_high"  # small print with detail high
CLOSELY_EVERY = 3  # scenes of small print: this one is asked with detail high, the others with low
WORDS = Words(
    frozenset(
        (
            *COLOUR_NAMES,
            *SHAPES,
            *(f"{shape}s" for shape in SHAPES if shape != "cross"),
            "crosses",
            *SIZE_NAMES,
            "character",
        )
    )
    | {"letter", "digit"},
    ("is there", "are there", "do you see", "can you see", "how many"),
    frozenset(("no", "0", "none", "zero")),
)


@dataclass(frozen=True, slots=True)
class Task:
    """A question about an image file, and what is known of its answer."""

    image: int  # questions about one image are not independent
    group: str
    question: str
    answer: str | None  # None: there is no right one
    found: bool | None  # whether what it names is there; None if it names nothing, or if it is not known
    others: tuple[str, ...] = ()  # answers that are right too

    def is_right(self, text: str) -> bool:
        """Whether this is a right answer, in whatever case."""
        known = () if self.answer is None else (self.answer, *self.others)
        return text.lower() in {each.strip().lower() for each in known}


@dataclass(frozen=True, slots=True)
class Outcome:
    """An answer's signals, whose strangeness is 0, and whether it was right."""

    task: Task
    signals: Signals
    right: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file with its questions."""

    data: bytes
    tasks: list[Task]
    closely: bool = False
    name: str = ""  # in messages


def scenes(split: str, number: int, first: int, absent: int = 1) -> Iterator[Picture]:
    """Render fresh scenes with the split's own questions, and questions about absent objects."""
    for index, scene in enumerate(held_out_scenes(split, number, first), first):
        rng = np.random.default_rng((SPLITS.index(split), index))
        nothing = [question for _ in range(absent) if (question := about_nothing(rng, scene.things))]
        closely = split == SMALL and index % CLOSELY_EVERY == 0
        group = SMALL_CLOSELY if closely else split
        tasks = [Task(index, group, q.text, q.answer, is_found(q)) for q in scene.questions]
        tasks += [Task(index, ABSENT, question, None, False) for question in nothing]
        yield Picture(as_webp(scene.pixels), tasks, closely)


def is_found(question: Question) -> bool | None:
    """Whether a scene's question names something that is in the scene; None if it names nothing."""
    if not WORDS.name_something(question.text):
        return None
    return not (question.type in ("exist", "count") and WORDS.deny(question.answer))


def as_webp(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "WEBP", quality=QUALITY)
    return out.getvalue()


def told(path: Path, skipped: dict[str, str] | None = None) -> Iterator[Picture]:
    """Read questions with known answers, and group them by image.

    They are JSON lines of image (a file beside it), question, answer (or answers, if several are right) and, if the
    question names something, found. `skipped` gets the lines that are no questions, and the images that cannot be read;
    without it they raise ValueError and OSError.
    """
    faults: dict[str, str] = {}
    named: dict[Path, str] = {}  # what messages call an image: its first line
    tasks: dict[Path, list[Task]] = {}
    numbers: dict[Path, int] = {}
    for entry, row in jsonl_lines(path, faults):
        place, image = f"{path.name}:{entry.id}", path.parent / entry.image
        if not entry.answers or not isinstance(row.get("found"), bool | None):
            faults[place] = "needs an answer, and if there is one, a found of true or false"
            continue
        number = numbers.setdefault(image, len(numbers))
        named.setdefault(image, f"{place}: {entry.image}")
        answer, *others = entry.answers
        task = Task(number, str(row.get("split", "all")), entry.question, answer, row.get("found"), tuple(others))
        tasks.setdefault(image, []).append(task)
    for place, reason in faults.items():
        if skipped is None:
            raise ValueError(f"{path.parent / place}: give image, question and answer ({reason})")
        skipped[place] = reason
    for image, name in named.items():
        try:
            yield Picture(image.read_bytes(), tasks[image], name=name)
        except OSError as exc:
            if skipped is None:
                raise
            skipped[name] = str(exc)


def budget_of(card: ModelCard, *, closely: bool) -> Budget:
    """The budget of a request that names none: what the service spends where its confidence is shown."""
    return Budget(card.unasked_vision_tokens("high" if closely else "low"), card.default_visual_tokens)


def ask(chain: Chain, pictures: Iterable[Picture]) -> Iterator[tuple[View, list[Outcome]]]:
    """Answer all questions of each picture."""
    card = chain.card
    for picture in pictures:
        view = chain.look(picture.data, closely=picture.closely)
        budget = budget_of(card, closely=picture.closely)
        seen = [chain.attend(view, task.question, budget) for task in picture.tasks]
        said = chain.answer((one, task.question) for one, task in zip(seen, picture.tasks, strict=True))
        yield (
            view,
            [
                Outcome(
                    task,
                    Signals.of(task.question, answer.text, answer.log_prob, [one]),
                    task.is_right(answer.text),
                )
                for task, one, answer in zip(picture.tasks, seen, said, strict=True)
            ],
        )
