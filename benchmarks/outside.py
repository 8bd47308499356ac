"""Measure a checkpoint on scenes of the known world that another renderer drew, by kind, in PyTorch.

    python -m benchmarks.outside after=reference before=/path/of/an/older/checkpoint

Each kind (benchmarks/other_renderer.py) has `--scenes` pictures with the seven types of questions; the same for all
checkpoints. `low` sees the whole picture at 224 pixels, `high` has the closer view too, `auto` has it if the checkpoint
asks for it and the picture has more pixels than the first view, as in the service. Small print is asked only for what
is written. The training world is measured beside it: the committed scenes, and `--fresh` new ones of each split.
Intervals are a bootstrap's over pictures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from benchmarks.figures import command, tell
from benchmarks.other_renderer import KINDS, SMALL_KINDS, Kind, pictured, sampled
from build_engines.evaluation.intervals import share_by_scene
from build_engines.model.allocation import MAX_VISION_TOKENS
from build_engines.model.checkpoint import Checkpoint
from build_engines.scenes.held_out import SMALL, SPLITS
from build_engines.scenes.questions import NUMBERS, TYPES, Question, ask
from build_engines.scenes.world import GRID, IMAGE_SIZE, Thing
from build_engines.train.evaluation import (
    Answers,
    Arm,
    Asked,
    Chain,
    Exam,
    answer,
    committed_exam,
    held_out_exam,
    resampled,
)
from build_engines.train.stages import set_threads

SEED = 2027
FRESH_FROM = 1_100_000  # held-out scenes that nothing else uses
READS = 4  # tries for questions about small print
LOW, HIGH = Arm(), Arm(vision_tokens=(64, MAX_VISION_TOKENS), closer=True)
DETAILS = ("low", "auto", "high")
AT_ONCE = 16


@dataclass(frozen=True)
class Drawn:
    """The pictures of a kind, and the questions about each."""

    pictures: list[Image.Image]
    things: list[list[Thing]]
    questions: list[list[Question]]


@dataclass(frozen=True)
class Rights:
    """Whether each question was answered right, bool [n], by detail; its type and its picture."""

    by_detail: Mapping[str, np.ndarray]
    types: np.ndarray
    scenes: np.ndarray


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="NAME=FOLDER; differences are those of the first to the others")
    parser.add_argument("--scenes", type=int, default=16, help="pictures of each kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="*", help="only these kinds")
    parser.add_argument("--fresh", type=int, default=0, help="fresh scenes of each split [committed ones alone]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="report to write, such as benchmarks/results/outside.json")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    folders = dict(each.split("=", 1) for each in options.checkpoints)
    chains = {name: (Chain.load(Path(folder)), closer_view_at(Path(folder))) for name, folder in folders.items()}
    found: dict[str, dict[str, Rights]] = {name: {} for name in chains}
    for kind in options.kinds or (*KINDS, *SMALL_KINDS):
        shown = draw(kind, options.scenes)
        for name, (chain, at) in chains.items():
            found[name][kind] = rights(chain, at, exam_of(chain, shown), has_more_pixels(shown))
    for name, (chain, at) in chains.items() if options.kinds is None else ():
        for split in SPLITS:
            found[name][f"{split} committed"] = rights(chain, at, committed_exam(chain, split, closely=split == SMALL))
            if options.fresh:
                exam = held_out_exam(chain, split, options.fresh, closely=split == SMALL, first=FRESH_FROM)
                found[name][f"{split} fresh"] = rights(chain, at, exam)
    first, *others = chains
    report = {
        "command": command("python -m benchmarks.outside", arguments or sys.argv[1:]),
        "scenes": options.scenes,
        "checkpoints": {name: told(kinds) for name, kinds in found.items()},
        "differences": {f"{first} less {other}": differences(found[first], found[other]) for other in others},
    }
    tell(report, options.out)
    return 0


def closer_view_at(folder: Path) -> float:
    return float(cast(float, Checkpoint.load(folder, language=False).card.get("closer_view_at", 1.0)))


def draw(name: str, scenes: int) -> Drawn:
    """Draw the same pictures every time, and questions about them."""
    kind, small = (KINDS | SMALL_KINDS)[name], name in SMALL_KINDS
    shown = Drawn([], [], [])
    for index in range(scenes):
        rng = np.random.default_rng((SEED, (*KINDS, *SMALL_KINDS).index(name), index))
        things = sampled(rng, kind)
        shown.questions.append(asked(rng, things, kind, ("read",) * READS if small else TYPES))
        shown.pictures.append(pictured(rng, kind, things))
        shown.things.append(things)
    return shown


def asked(rng: np.random.Generator, things: Sequence[Thing], kind: Kind, types: Sequence[str]) -> list[Question]:
    """Ask one question of each type that the scene gives, and if the kind says so, how many objects there are."""
    width, height = (IMAGE_SIZE * (side / other) ** 0.5 for side, other in (kind.size, kind.size[::-1]))
    if kind.padded:
        width = height = max(width, height)
    # Places in the square view, which the model sees: offsets must be clear there.
    seen = [replace(t, x=t.x * IMAGE_SIZE / width, y=t.y * IMAGE_SIZE / height) for t in things]
    found: dict[str, Question] = {}
    for wanted in types:
        for _ in range(24):
            question = ask(rng, seen, wanted)
            if question is not None and question.text not in found:
                found[question.text] = question
                break
    if kind.whole_count:
        every = tuple(range(len(things)))
        whole = Question("how many objects are there?", NUMBERS[len(things)], "count", every)
        found[whole.text] = whole
    return list(found.values())


def has_more_pixels(shown: Drawn) -> np.ndarray:
    """bool [scenes]: whether the service would look closer with `auto`. Nothing closer is to be seen of the others."""
    return np.array([max(picture.size) > IMAGE_SIZE for picture in shown.pictures])


def rights(chain: Chain, at: float, exam: Exam, larger: np.ndarray | None = None) -> Rights:
    """Ask with `low`, `high` and `auto`. Without a closer view, all three are the same.

    larger: bool [scenes], whether each picture has more pixels than the first view; None for all of them.
    """
    low = answer(chain, exam, LOW)
    high = low if exam.looks.detail is None else answer(chain, exam, HIGH)
    auto = as_auto(low, high, at, np.ones(len(exam.looks.scenes), bool) if larger is None else larger)
    return Rights({"low": low.right, "auto": auto, "high": high.right}, low.types, low.scenes)


def as_auto(low: Answers, high: Answers, at: float, larger: np.ndarray) -> np.ndarray:
    """bool [n]: `high` from particularize `at` if the picture has more pixels than the first view; else `low`."""
    return np.where((low.tensions[:, 0] >= at) & larger[low.scenes], high.right, low.right)


def exam_of(chain: Chain, shown: Drawn) -> Exam:
    """Resize each picture as the gateway does, and encode it. Coverage is not measured, so it is zero."""
    closely = chain.allocator.closer is not None
    looks = []
    for start in range(0, len(shown.pictures), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        things = shown.things[part]
        nothing = [np.zeros((len(each), GRID, GRID), np.float32) for each in things]
        views = [_resized(picture, IMAGE_SIZE) for picture in shown.pictures[part]]
        look = chain.eye.look(views, things, nothing, False)
        if closely:
            larger = [_resized(picture, 2 * IMAGE_SIZE) for picture in shown.pictures[part]]
            look = replace(look, detail=chain.eye.look(larger, things, nothing, True).detail)
        looks.append(look)
    questions = [Asked(scene, question) for scene, each in enumerate(shown.questions) for question in each]
    return Exam(type(looks[0]).joined(looks), questions)


def _resized(picture: Image.Image, side: int) -> np.ndarray:
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))


def told(kinds: Mapping[str, Rights]) -> dict[str, Any]:
    """Accuracy by kind, detail and type, and over all kinds and all small print."""
    joint = together(kinds)
    return {
        "all": {name: by_type(rights) for name, rights in joint.items()},
        "by_kind": {name: by_type(rights) for name, rights in kinds.items()},
        "against_low": {name: against_low(rights) for name, rights in joint.items()},
    }


def together(kinds: Mapping[str, Rights]) -> dict[str, Rights]:
    """All kinds joined, and all small print, as far as they were asked."""
    groups = {
        "kinds": [kinds[name] for name in KINDS if name in kinds],
        "small print": [kinds[name] for name in SMALL_KINDS if name in kinds],
    }
    return {name: joined(parts) for name, parts in groups.items() if parts}


def joined(parts: Sequence[Rights]) -> Rights:
    ends = np.cumsum([0, *(int(part.scenes.max()) + 1 for part in parts)])
    return Rights(
        {detail: np.concatenate([part.by_detail[detail] for part in parts]) for detail in DETAILS},
        np.concatenate([part.types for part in parts]),
        np.concatenate([part.scenes + start for part, start in zip(parts, ends[:-1], strict=True)]),
    )


def by_type(found: Rights) -> dict[str, Any]:
    types = {"all": np.ones(len(found.types), bool)}
    types |= {kind: found.types == kind for kind in TYPES if (found.types == kind).any()}
    return {
        detail: {kind: _accuracy(found.by_detail[detail][rows], found.scenes[rows]) for kind, rows in types.items()}
        for detail in DETAILS
    }


def _accuracy(right: np.ndarray, scenes: np.ndarray) -> dict[str, Any]:
    found = share_by_scene(right, scenes)
    return {
        "n": len(right),
        "accuracy": round(found.value, 4),
        "interval": [round(found.low, 4), round(found.high, 4)],
    }


def against_low(found: Rights) -> dict[str, Any]:
    low = found.by_detail["low"]
    return {detail: _gain(found.by_detail[detail], low, found.scenes) for detail in ("auto", "high")}


def _gain(one: np.ndarray, other: np.ndarray, scenes: np.ndarray) -> dict[str, Any]:
    gain = one.astype(float) - other
    return {"difference": round(float(gain.mean()), 4), "interval": resampled(gain, scenes)}


def differences(one: Mapping[str, Rights], other: Mapping[str, Rights]) -> dict[str, Any]:
    """By detail, over all kinds and all small print ("kinds" and "small print") and by kind."""
    ours, theirs = ({**together(each), **each} for each in (one, other))
    return {
        name: {d: _gain(found.by_detail[d], theirs[name].by_detail[d], found.scenes) for d in DETAILS}
        for name, found in ours.items()
    }


if __name__ == "__main__":
    sys.exit(main())
