"""Turn answers into figures: accuracy, differences between arms, tokens spent, verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.ablation.arms import Named
from benchmarks.ablation.exams import COLUMNS
from build_engines.evaluation.intervals import difference_of_groups, mean, share
from build_engines.model.allocation import CELL_COUNT
from build_engines.scenes.questions import TYPES
from build_engines.scenes.world import SIZE_NAMES
from build_engines.train.evaluation import Answers, Exam
from build_engines.train.selection import RANDOM, TENSIONS, UNIFORM, WAYS

ALL, READ, WITHOUT_READ = "all", "read", "without_read"
MOST_TOKENS, GAP, MOST_SHARE, LEAST_HITS = 120, 0.5, 0.1, 0.85  # the verdict's bars
Mask = npt.NDArray[np.bool_]
Json = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """An arm with its answers."""

    named: Named
    answers: Answers
    closer: float  # share of questions for which the closer view was encoded

    @property
    def scene(self) -> npt.NDArray[np.int64]:
        return self.answers.scenes

    @property
    def tokens(self) -> float:
        return float(self.answers.vision_tokens.mean())

    def first(self, number: int) -> Measured:
        """Return the same for the first `number` questions."""
        exam = Exam(self.answers.exam.looks, self.answers.exam.asked[:number])
        columns = {column: getattr(self.answers, column)[:number] for column in COLUMNS}
        return replace(self, answers=Answers(exam, **columns))

    def of(self, kind: str, size: str | None = None) -> Mask:
        """Select questions by kind (a type, `all` or `without_read`) and by size of the one object asked about."""
        kinds = {ALL: set(TYPES), WITHOUT_READ: set(TYPES) - {READ}}.get(kind, {kind})
        right_kind = np.isin(self.answers.types, list(kinds))
        return right_kind if size is None else right_kind & (self.sizes == size)

    @property
    def sizes(self) -> npt.NDArray[np.str_]:
        """Size of the one object that each question asks about; empty if it asks about several."""
        exam = self.answers.exam
        asked = [exam.things(index) for index in range(len(exam.asked))]
        return np.array([SIZE_NAMES[things[0].size] if len(things) == 1 else "" for things in asked])


def accuracies(measured: Measured) -> Json:
    """Return accuracy by type, for all, and for all but reading, with the number of questions."""
    kinds = {}
    for kind in (ALL, WITHOUT_READ, *TYPES):
        some = measured.of(kind)
        figure = share(measured.answers.right[some])
        if figure is not None:
            kinds[kind] = figure.as_json() | {"n": int(some.sum())}
    return kinds


def arm_row(measured: Measured, common: int) -> Json:
    """Return an arm's figures over the first `common` questions, which all arms were asked.

    An arm that was asked more questions also has its accuracy over all of them.
    """
    first = measured.first(common)
    tokens = mean(first.answers.vision_tokens, first.scene)
    return {
        "split": measured.named.split,
        **asdict(measured.named.arm),
        "mean_vision_tokens": tokens.as_json(1) if tokens else None,
        "mean_visual_tokens": round(float(first.answers.visual_tokens.mean()), 1),
        "closer_view_share": round(measured.closer, 4),
        "accuracy": accuracies(first),
        "accuracy_over_all_scenes": accuracies(measured) if len(measured.answers.right) > common else None,
    }


def points(ours: Measured, theirs: Measured) -> Json:
    """Subtract the accuracy of `theirs` from that of `ours`, in percentage points, by kind of question.

    Only questions that both arms were asked count.
    """
    number = min(len(ours.answers.right), len(theirs.answers.right))
    found: Json = {"ours": ours.named.name, "theirs": theirs.named.name, "n": number}
    gained = 100.0 * ours.answers.right[:number] - 100.0 * theirs.answers.right[:number]
    for kind in (ALL, WITHOUT_READ, READ):
        some = ours.of(kind)[:number]
        figure = mean(gained[some], ours.scene[:number][some])
        found[kind] = figure.as_json(2) if figure else None
    return found


def spending(adaptive: Measured) -> Json:
    """Return mean vision tokens by type of question and size of the asked object, and the expected differences."""
    tokens, scene, sizes = adaptive.answers.vision_tokens, adaptive.scene, adaptive.sizes

    def of(some: Mask) -> Json | None:
        figure = mean(tokens[some], scene[some])
        return figure.as_json(1) | {"n": int(some.sum())} if figure else None

    kinds = {kind: adaptive.of(kind) for kind in (ALL, *TYPES)}
    easy = kinds["colour"] & (sizes == SIZE_NAMES[-1])
    more: Json = {}
    for kind in (READ, "count"):
        figure = difference_of_groups(tokens, kinds[kind], easy, scene)
        more[kind] = figure.as_json(1) if figure else None
    return {
        "by_type": {kind: row for kind in kinds if (row := of(kinds[kind]))},
        "by_type_and_size": {
            f"{kind}, {size}": row
            for kind in TYPES
            for size in SIZE_NAMES
            if (row := of(kinds[kind] & (sizes == size)))
        },
        "more_than_colour_of_a_large_object": more,
    }


def balance(adaptive: Measured) -> Json:
    """Return mean weights of the ways of knowing and mean tensions, by type."""
    values = np.concatenate([adaptive.answers.weights, adaptive.answers.tensions], axis=1)
    found: Json = {}
    for kind in (ALL, *TYPES):
        some = adaptive.of(kind)
        if some.any():
            figures = [mean(values[some, column], adaptive.scene[some]) for column in range(values.shape[1])]
            named = zip((*WAYS, *TENSIONS), figures, strict=True)
            found[kind] = {name: figure.as_json(3) for name, figure in named if figure}
    return found


def peak_on_asked(adaptive: Measured) -> Json | None:
    """Return the share of reading questions whose most relevant cell lies on the asked object.

    It includes the share that a random cell would hit.
    """
    some = np.flatnonzero(adaptive.of(READ))
    figure = share(adaptive.answers.on_asked[some])
    if figure is None:
        return None
    exam = adaptive.answers.exam
    shown = [exam.looks.coverage[exam.asked[i].scene][list(exam.asked[i].question.asked)].max(0) for i in some]
    by_chance = float(np.mean([_cells_shown(each) / CELL_COUNT for each in shown]))
    return figure.as_json() | {"n": len(some), "a_random_cell": round(by_chance, 4)}


def _cells_shown(coverage: npt.NDArray[np.float32]) -> int:
    """Count cells of a coverage map [16, 16] with a patch that shows the object, as `on_asked` does."""
    return int((coverage.reshape(8, 2, 8, 2).max((1, 3)) > 0.15).sum())


def verdict(
    comparisons: Mapping[str, Json],
    tokens: float,
    spent: Mapping[str, Json],
    peak: Json | None,
    shares: Mapping[str, float | None],
) -> Json:
    """State for each expected result whether it holds, and by how much.

    A difference holds if its interval excludes 0. A result is None if it was not measured.
    """
    against_all = comparisons["adaptive less 256 tokens"][ALL]
    lines: Json = {
        f"at most {MOST_TOKENS} vision tokens on average are within {GAP} points of 256": {
            "met": tokens <= MOST_TOKENS and against_all["value"] >= -GAP,
            "mean_vision_tokens": round(tokens, 1),
            "difference_points": against_all,
            "whole_interval_within": against_all["low"] >= -GAP,
        }
    }
    for where in ("adaptive", "small_print, high"):
        for policy in (RANDOM, UNIFORM):
            found = comparisons.get(f"{where} less {policy} of its size")
            if found:
                lines[f"{where}: beats {policy} choice of the same size"] = {
                    "met": found[ALL]["low"] > 0,
                    "difference_points": {kind: found[kind] for kind in (ALL, WITHOUT_READ, READ)},
                }
    for where, each in spent.items():
        for kind, figure in each["more_than_colour_of_a_large_object"].items():
            lines[f"{where}: {kind} spends more than colour of a large object"] = {
                "met": figure and figure["low"] > 0,
                "difference_tokens": figure,
            }
    for where, value in shares.items():
        lines[f"the allocator takes at most {MOST_SHARE:.0%} of the encoder's time, {where}"] = {
            "met": value and value <= MOST_SHARE,
            "share": value and round(value, 4),
        }
    lines[f"the most relevant cell lies on the asked object in {LEAST_HITS:.0%} of reading questions"] = {
        "met": peak and peak["value"] >= LEAST_HITS,
        "share": peak,
    }
    closer = comparisons.get("small_print: closer view less without", {}).get(READ)
    lines["small characters gain from the closer view"] = {"met": closer and closer["low"] > 0, "points": closer}
    return lines
