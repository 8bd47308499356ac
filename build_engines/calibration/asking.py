"""Ask questions with known answers, and keep the signals of each answer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from build_engines.calibration.absent import about_nothing
from build_engines.calibration.chain import Chain, View
from build_engines.scenes.held_out import QUALITY, SMALL, SPLITS, held_out_scenes
from build_engines.scenes.questions import Question
from build_engines.scenes.world import COLOUR_NAMES, SHAPES, SIZE_NAMES
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
    """Read questions with known answers: JSON lines of image (a file beside it), question, answer and, if the question
    names something, found. `skipped` gets the lines whose image cannot be read. Raises ValueError, which names the
    line."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            task = Task(number, str(row.get("split", "all")), row["question"], row["answer"], row.get("found"))
            name = f"{path.name}:{number}: {row['image']}"
            yield Picture((path.parent / row["image"]).read_bytes(), [task], name=name)
        except OSError as exc:
            if skipped is None:
                raise
            skipped[name] = str(exc)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise ValueError(f"{path}, line {number}: give image, question and answer ({exc!r})") from exc


def ask(chain: Chain, pictures: Iterable[Picture]) -> Iterator[tuple[View, list[Outcome]]]:
    """Answer all questions of each picture."""
    card = chain.card
    for picture in pictures:
        view = chain.look(picture.data, closely=picture.closely)
        budget = Budget(card.vision_tokens_for("high" if picture.closely else "low"), card.default_visual_tokens)
        seen = [chain.attend(view, task.question, budget) for task in picture.tasks]
        said = chain.answer((one, task.question) for one, task in zip(seen, picture.tasks, strict=True))
        yield (
            view,
            [
                Outcome(
                    task,
                    Signals.of(task.question, answer.text, answer.log_prob, [one]),
                    task.answer is not None and answer.text.lower() == task.answer.strip().lower(),
                )
                for task, one, answer in zip(picture.tasks, seen, said, strict=True)
            ],
        )
