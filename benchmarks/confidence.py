"""Measure how sure the service is of its answers, on fresh questions through the served chain.

    python -m benchmarks.confidence                 # starts a service of its own; a few minutes on two cores
    python -m benchmarks.confidence --scenes 40     # quicker, with wider intervals

The scenes have seeds that neither training nor calibration uses, and the photographs are others than those of the
calibration. Groups of questions:

- the three splits of build_engines/scenes, with detail low
- small_print_auto: the scenes of small print with detail auto
- other_renderer: the same world, drawn by other code (benchmarks/other_renderer.py)
- absent: questions about an object that is not there; they count for `found` only
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from benchmarks.arguments import count
from benchmarks.bench.models import BUILD
from benchmarks.figures import tell
from benchmarks.latency import own_server
from benchmarks.other_renderer import drawn
from build_engines.calibration.asking import ABSENT, Task, as_webp, is_found, scenes
from build_engines.calibration.foreign import foreign
from build_engines.scenes.held_out import NEW, SMALL, SPLITS, held_out_scenes

mpl.use("Agg")
from matplotlib import pyplot

FIRST = 900_000  # scenes that nothing else uses
IMAGES_OF_A_GROUP = 10_000_000  # distance between the image numbers of two groups
COVERAGE = 0.9
BINS = 10
DRAWS = 500
CLIENTS = 6
SHARES = {"other_renderer": 0.4, "foreign": 0.2}  # of the scenes of a split
AUTO, OTHER = "small_print_auto", "other_renderer"
GOALS = {"ece": 0.05, "errors_gone": 0.5, "found_auroc": 0.98, "world_auroc": 0.95}


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file and what to ask about it."""

    data: bytes
    tasks: Sequence[Task]
    detail: str = "low"


@dataclass(frozen=True, slots=True)
class Said:
    """An answer of the service."""

    task: Task
    right: bool
    confidence: float
    found: float | None
    familiar: float


def pictures(number: int) -> Iterator[Picture]:
    """Render what is asked about, `number` scenes a split."""
    for split in SPLITS:
        for picture in scenes(split, number, FIRST):
            tasks = [renamed(replace(task, image=image_number(split, task.image)), split) for task in picture.tasks]
            yield Picture(picture.data, tasks)
            if split == SMALL:
                yield Picture(picture.data, [renamed(task, AUTO) for task in tasks if task.group != ABSENT], "auto")
    rng = np.random.default_rng(FIRST)
    for index, scene in enumerate(held_out_scenes(NEW, round(number * SHARES[OTHER]), FIRST + number), FIRST + number):
        tasks = [
            Task(image_number(OTHER, index), OTHER, asked.text, asked.answer, is_found(asked))
            for asked in scene.questions
        ]
        yield Picture(as_webp(drawn(scene.things, rng)), tasks)
    asked = [task for picture in scenes(NEW, number, FIRST + 2 * number, absent=0) for task in picture.tasks]
    for index, each in enumerate(foreign("measure", round(number * SHARES["foreign"]), seed=1)):
        questions = [asked[(3 * index + place) % len(asked)].question for place in range(3)]
        yield Picture(each.data, [Task(-1 - index, each.kind, question, None, None) for question in questions])


def image_number(group: str, scene: int) -> int:
    """Number the images of all groups: every split begins with the same scene's number."""
    return (*SPLITS, OTHER).index(group) * IMAGES_OF_A_GROUP + scene


def renamed(task: Task, group: str) -> Task:
    """Put a task into a group; one about an absent object stays in its own."""
    return task if task.group == ABSENT else replace(task, group=group)


def asked(url: str, number: int) -> list[Said]:
    """Ask everything. Raises httpx.HTTPError."""
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(CLIENTS) as pool:
        return [said for some in pool.map(lambda picture: answers(client, picture), pictures(number)) for said in some]


def answers(client: httpx.Client, picture: Picture) -> list[Said]:
    image = client.post("/v1/images", content=picture.data).raise_for_status().json()["id"]
    return [answer(client, image, task, picture.detail) for task in picture.tasks]


def answer(client: httpx.Client, image: str, task: Task, detail: str) -> Said:
    body = {"image": image, "question": task.question, "detail": detail, "max_tokens": 8}
    said = client.post("/v1/vqa", json=body).raise_for_status().json()
    right = task.answer is not None and said["answer"].strip().lower() == task.answer.lower()
    return Said(task, right, said["confidence"], said.get("found"), said["vision"]["familiar"])


class Table:
    """Columns of many answers, which are resampled by image: questions about one image are not independent."""

    def __init__(self, said: Sequence[Said]) -> None:
        self.said = list(said)
        self.image = np.array([each.task.image for each in self.said])
        self.right = np.array([each.right for each in self.said])
        self.confidence = np.array([each.confidence for each in self.said])

    def resampled(self, measure: Callable[[Table], float], seed: int = 0) -> dict[str, float]:
        """Give a measure with its 95 % bootstrap interval over images."""
        images, rng = np.unique(self.image), np.random.default_rng(seed)
        rows = {image: np.flatnonzero(self.image == image) for image in images}
        drawn_values = []
        for _ in range(DRAWS):
            chosen = np.concatenate([rows[image] for image in rng.choice(images, len(images))])
            drawn_values.append(measure(Table([self.said[row] for row in chosen])))
        low, high = np.nanquantile(drawn_values, (0.025, 0.975))
        return {"value": round(measure(self), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def calibration_error(table: Table) -> float:
    """Expected calibration error over BINS bins of equal width (Naeini et al. 2015)."""
    bins = np.minimum((table.confidence * BINS).astype(int), BINS - 1)
    gaps = [
        (bins == each).mean() * abs(table.confidence[bins == each].mean() - table.right[bins == each].mean())
        for each in np.unique(bins)
    ]
    return float(sum(gaps))


def errors_gone(table: Table) -> float:
    """Share of the wrong answers among the least confident ones that are left out at COVERAGE."""
    order = np.argsort(-table.confidence, kind="stable")
    wrong = ~table.right[order]
    kept = round(COVERAGE * len(wrong))
    return float(1 - wrong[:kept].sum() / wrong.sum()) if wrong.any() else 1.0


def summary(said: Sequence[Said]) -> dict[str, Any]:
    table = Table(said)
    wrong = float(1 - table.right.mean())
    return {
        "n": len(said),
        "accuracy": round(1 - wrong, 4),
        "mean_confidence": round(float(table.confidence.mean()), 4),
        "ece": table.resampled(calibration_error),
        "errors_gone": table.resampled(errors_gone),
        "most_that_can_be_gone": round(min(1.0, (1 - COVERAGE) / wrong), 4) if wrong else 1.0,
    }


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    if not positive or not negative:
        return float("nan")
    labels = np.arange(len(positive) + len(negative)) < len(positive)
    return float(roc_auc_score(labels, [*positive, *negative]))


def found_auroc(table: Table) -> float:
    """How well `found` tells questions about what is there from questions about what is not."""
    named = [each for each in table.said if each.found is not None and each.task.found is not None]
    there, not_there = (
        [each.found or 0.0 for each in named if each.task.found is is_there] for is_there in (True, False)
    )
    return auroc(there, not_there)


def report(said: Sequence[Said]) -> dict[str, Any]:
    def of(*groups: str) -> list[Said]:
        return [each for each in said if each.task.group in groups]

    kinds = sorted({each.task.group for each in said} - {*SPLITS, AUTO, OTHER, ABSENT})
    own = {each.task.image: each.familiar for each in of(*SPLITS)}
    other_worlds = {kind: {each.task.image: each.familiar for each in of(kind)} for kind in kinds}
    outside = [value for values in other_worlds.values() for value in values.values()]
    worlds = {kind: round(auroc([*own.values()], [*values.values()]), 4) for kind, values in other_worlds.items()}
    drawn_by_others = {each.task.image: each.familiar for each in of(OTHER)}
    foreign_said = of(*kinds)
    return {
        "goals": GOALS,
        "questions": len(said),
        "groups": {group: summary(of(group)) for group in (*SPLITS, AUTO, OTHER)} | {"splits": summary(of(*SPLITS))},
        "found_auroc": {
            **{group: Table(of(group)).resampled(found_auroc) for group in (*SPLITS, AUTO, OTHER)},
            "splits": Table(of(*SPLITS)).resampled(found_auroc),
            "splits_and_absent": Table(of(*SPLITS, ABSENT)).resampled(found_auroc),
        },
        "world_auroc": {"all": round(auroc([*own.values()], outside), 4)} | worlds,
        "world_auroc_by_confidence": round(
            auroc([each.confidence for each in of(*SPLITS)], [each.confidence for each in foreign_said]), 4
        ),
        "familiar_at_half": {
            "own": round(float(np.mean([value >= 0.5 for value in own.values()])), 4),
            "other_renderer": round(float(np.mean([value >= 0.5 for value in drawn_by_others.values()])), 4),
            "foreign": round(float(np.mean([value >= 0.5 for value in outside])), 4),
        },
        "foreign_confidence_at_least_half": round(float(np.mean([each.confidence >= 0.5 for each in foreign_said])), 4),
    }


def plot(said: Sequence[Said], told: dict[str, Any], path: Path) -> None:
    """Draw reliability, errors by coverage, `familiar` and `found`."""
    figure, ((reliable, covered), (known, named)) = pyplot.subplots(2, 2, figsize=(11, 8.6), layout="constrained")
    for group in (*SPLITS, AUTO, OTHER):
        table = Table([each for each in said if each.task.group == group])
        _reliability(reliable, table, f"{group}, ECE {told['groups'][group]['ece']['value']:.3f}")
        _coverage(covered, table, group)
    reliable.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    reliable.set(
        title="How often answers are right", xlabel="confidence", ylabel="share right", xlim=(0, 1), ylim=(0, 1)
    )
    reliable.legend(fontsize=8)
    covered.axvline(COVERAGE, color="grey", linewidth=0.8)
    covered.set(title="Errors that are left", xlabel="share of questions answered", ylabel="share of errors left",
                xlim=(0.5, 1), ylim=(0, 1))  # fmt: skip
    covered.legend(fontsize=8)
    _familiar(known, said)
    _found(named, said, told["found_auroc"]["splits_and_absent"]["value"])
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _reliability(axes: Any, table: Table, label: str) -> None:
    """Ten bins with the same number of questions each."""
    parts = np.array_split(np.argsort(table.confidence), BINS)
    axes.plot([table.confidence[part].mean() for part in parts], [table.right[part].mean() for part in parts],
              marker="o", markersize=4, label=label)  # fmt: skip


def _coverage(axes: Any, table: Table, label: str) -> None:
    wrong = ~table.right[np.argsort(-table.confidence, kind="stable")]
    share: npt.NDArray[np.float64] = np.arange(1, len(wrong) + 1) / len(wrong)
    axes.plot(share, np.cumsum(wrong) / max(1, wrong.sum()), label=label)


def _familiar(axes: Any, said: Sequence[Said]) -> None:
    kinds = {"own scenes": set(SPLITS), "other renderer": {OTHER}}
    others = sorted({each.task.group for each in said} - {*SPLITS, AUTO, OTHER, ABSENT})
    kinds |= {kind: {kind} for kind in others}
    values = [
        list({each.task.image: each.familiar for each in said if each.task.group in groups}.values())
        for groups in kinds.values()
    ]
    axes.boxplot(values, tick_labels=list(kinds), whis=(2.5, 97.5), showfliers=True, flierprops={"markersize": 3})
    axes.tick_params(axis="x", rotation=20)
    axes.set(title="familiar, one value an image", ylabel="probability", ylim=(-0.02, 1.02))


def _found(axes: Any, said: Sequence[Said], value: float) -> None:
    named = [
        each for each in said if each.task.found is not None and each.found is not None and each.task.group != AUTO
    ]
    edges = np.linspace(0, 1, 21)
    for is_there, label in ((True, "the object is there"), (False, "it is not")):
        values = [each.found for each in named if each.task.found is is_there]
        axes.hist(values, edges, weights=np.full(len(values), 1 / max(1, len(values))), alpha=0.6, label=label)
    axes.set(title=f"found, AUROC {value:.3f}", xlabel="probability", ylabel="share of questions")
    axes.legend(fontsize=8)


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=count, default=70, help="of each split")
    parser.add_argument("--out", type=Path, default=BUILD / "confidence",
                        help="path of the report, without .json and .png [build/bench/confidence]")  # fmt: skip
    return parser.parse_args(given)


def main() -> None:
    given = parsed()
    with own_server(ELASTIC_FIDELITY="false") as server:  # no answer may rest on fewer tokens because of load
        said = asked(server.url, given.scenes)
        model = httpx.get(f"{server.url}/v1/models").raise_for_status().json()["data"][0]
    weights = {name: model[name] for name in ("fingerprint", "visual_fingerprint")}
    told = {"model": model["id"], **weights, "scenes_of_a_split": given.scenes} | report(said)
    tell(told, given.out.with_suffix(".json"))
    plot(said, told, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
