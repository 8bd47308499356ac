"""Score a dataset's answers by its own metric, all together and by type, with 95 % intervals over images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from build_engines.evaluation.intervals import Figure, of_images, wilson
from build_engines.evaluation.metrics import captions, short_answers

RIGHT_AT = 0.5  # an answer with a lower score is shown as wrong
METRICS: Mapping[str, tuple[str, Callable[[str, Sequence[str]], float]]] = {
    "vqav2": ("VQA accuracy", short_answers.vqa_accuracy),
    "gqa": ("exact match", short_answers.exact_match),
    "textvqa": ("TextVQA accuracy", short_answers.textvqa_accuracy),
    "docvqa": ("ANLS", short_answers.anls),
    "jsonl": ("exact match", short_answers.exact_match),
}
CAPTIONS = "coco-captions"
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Answered:
    """One entry and what the service said to it. `record` is the service's whole answer."""

    image: str
    question: str
    said: str
    answers: tuple[str, ...]
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of a table: of all entries, or of those of one type."""

    name: str
    questions: int
    images: int
    figure: Figure

    def as_json(self) -> dict[str, Any]:
        return {"questions": self.questions, "images": self.images, **self.figure.as_json()}


@dataclass(frozen=True, slots=True)
class Scores:
    """`each` [n] is the score of each answer; of a caption it is CIDEr-D / 10.

    `metrics` has the figures of all entries, `by` those of each type of each typing, the most frequent first.
    """

    metric: str
    each: list[float]
    metrics: list[Line]
    by: dict[str, list[Line]]


def score(form: str, answered: Sequence[Answered]) -> Scores:
    """Score at least one answer of a dataset of this form."""
    if form == CAPTIONS:
        return _captions(answered)
    name, metric = METRICS[form]
    each = [metric(one.said, one.answers) for one in answered]
    images = _images(answered)
    by: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, one in enumerate(answered):
        for typing, kinds in one.kinds.items():
            for kind in kinds:
                by[typing][kind].append(place)
    lines = {
        typing: [
            _mean(kind, each, images, places)
            for kind, places in sorted(kinds.items(), key=lambda it: (-len(it[1]), it[0]))
        ]
        for typing, kinds in sorted(by.items())
    }
    return Scores(name, each, [_mean(name, each, images, range(len(each)))], lines)


def _images(answered: Sequence[Answered]) -> list[int]:
    """The number of each answer's image."""
    known: dict[str, int] = {}
    return [known.setdefault(one.image, len(known)) for one in answered]


def _mean(name: str, each: Sequence[float], images: Sequence[int], places: Sequence[int]) -> Line:
    """The mean of some answers' scores. The draws are of images: questions about one image are not independent."""
    totals = np.zeros((max(images) + 1, 2))
    for place in places:
        totals[images[place]] += each[place], 1
    asked = int((totals[:, 1] > 0).sum())
    figure = of_images(totals, lambda sums: sums[..., :1] / sums[..., 1:])[0]
    if figure.value in (0.0, 1.0):  # all alike: the draws cannot tell how sure that is
        figure = Figure(figure.value, *wilson(round(figure.value * asked), asked))
    return Line(name, len(places), asked, figure)


def _captions(answered: Sequence[Answered]) -> Scores:
    of_words = [captions.Captioned.of(one.said, one.answers) for one in answered]
    cider = captions.cider_d(of_words)
    rouge = np.array([captions.rouge_l(one) for one in of_words])
    ones = np.ones_like(cider)
    means = of_images(np.stack([cider, rouge, ones], 1), lambda sums: sums[..., :2] / sums[..., 2:])
    bleu = of_images(np.stack([captions.bleu_counts(one) for one in of_words]), captions.bleu)
    names = ("CIDEr-D", *(f"BLEU-{length}" for length in range(1, captions.LONGEST + 1)), "ROUGE-L")
    figures = (means[0], *bleu, means[1])
    many = len(answered)
    lines = [Line(name, many, many, figure) for name, figure in zip(names, figures, strict=True)]
    return Scores("CIDEr-D", (cider / 10).tolist(), lines, {})


def telling(answered: Sequence[Answered], scores: Scores, most: int) -> list[int]:
    """Places of the wrong answers that tell most: one an image, from every type in turn.

    Within a type come first those of which the model was surest; without confidence, those on which people agree most.
    """
    queues: dict[str, list[int]] = defaultdict(list)
    for place, one in enumerate(answered):
        if scores.each[place] < RIGHT_AT:
            kinds = next(iter(one.kinds.values()), ("",))
            queues[kinds[0]].append(place)
    for queue in queues.values():
        queue.sort(key=lambda place: (_certainty(answered[place]), -place))  # the last is taken first
    chosen: list[int] = []
    shown: set[str] = set()
    while queues and len(chosen) < most:
        for kind in sorted(queues, key=lambda kind: (-len(queues[kind]), kind)):
            while queues[kind]:
                place = queues[kind].pop()
                if answered[place].image not in shown and len(chosen) < most:
                    shown.add(answered[place].image)
                    chosen.append(place)
                    break
        queues = {kind: queue for kind, queue in queues.items() if queue}
    return chosen


def _certainty(one: Answered) -> float:
    sure = one.record.get("confidence")
    if isinstance(sure, int | float):
        return float(sure)
    return Counter(one.answers).most_common(1)[0][1] / len(one.answers)
