"""Store held-out scenes' features and answers on disk in parts.

A killed run resumes, and a larger run asks only what is new. The scenes continue the committed scenes' generator with
seeds used nowhere else. They have 448 pixels and are encoded as WebP, like an upload.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from benchmarks.ablation.arms import Named
from benchmarks.ablation.pruning import Pruned, answer_pruned
from build_engines.train.evaluation import Answers, Arm, Asked, Chain, Exam, answer, held_out_exam
from build_engines.train.looks import Looks

FIRST = 10_000  # first scene of the generator used here; the committed ones are the first few hundred
PART = 50  # scenes per file
COLUMNS = tuple(each.name for each in fields(Answers) if each.name != "exam")


@dataclass(frozen=True)
class Scenes:
    """The first `number` scenes of a split."""

    split: str
    number: int
    looks: Path  # folder of one encoder's features
    answers: Path  # folder of one checkpoint's answers

    def encode(self, chain: Chain) -> None:
        self.looks.mkdir(parents=True, exist_ok=True)
        for name, first, number in tqdm(list(self._parts()), desc=f"look at {self.split}", mininterval=5.0):
            path = self.looks / f"{name}.pt"
            if not path.exists():
                exam = held_out_exam(chain, self.split, number, closely=True, first=FIRST + first)
                torch.save(exam, _partial(path))
                os.replace(_partial(path), path)

    def asked(self) -> Exam:
        """Return all questions, without the features."""
        exams = [self._exam(name) for name, _, _ in self._parts()]
        nothing = torch.empty(0)
        scenes = [things for exam in exams for things in exam.looks.scenes]
        coverage = [shares for exam in exams for shares in exam.looks.coverage]
        asked = [Asked(PART * part + one.scene, one.question) for part, exam in enumerate(exams) for one in exam.asked]
        return Exam(Looks(nothing, nothing, None, scenes, coverage), asked)

    def answer(self, chain: Chain, named: Named, exam: Exam, scenes: int) -> Answers:
        """Answer the exam from `asked` with one arm, for the parts that begin before scene `scenes`."""
        folder = self.answers / named.name.replace(", ", "-").replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        wanted = [(name, first) for name, first, _ in self._parts() if first < scenes]
        for name, first in tqdm(wanted, desc=named.name, mininterval=5.0):
            path = folder / f"{name}.npz"
            if not path.exists():
                answers = ask(chain, self._exam(name), named.arm, first)
                np.savez(_partial(path), **{column: getattr(answers, column) for column in COLUMNS})
                os.replace(_partial(path), path)
            with np.load(path) as kept:
                found.append({column: kept[column] for column in COLUMNS})
        columns = {column: np.concatenate([part[column] for part in found]) for column in COLUMNS}
        return Answers(Exam(exam.looks, exam.asked[: len(columns["right"])]), **columns)

    def _parts(self) -> Iterator[tuple[str, int, int]]:
        """Yield each part's name, first scene and number of scenes."""
        for first in range(0, self.number, PART):
            number = min(PART, self.number - first)
            yield f"{self.split}_{first:05d}_{number}", first, number

    def _exam(self, name: str) -> Exam:
        exam: Exam = torch.load(
            self.looks / f"{name}.pt", weights_only=False, mmap=True
        )  # trusted: written by this program
        return exam


def ask(chain: Chain, exam: Exam, arm: Arm | Pruned, seed: int) -> Answers:
    return answer_pruned(chain, exam, arm, seed) if isinstance(arm, Pruned) else answer(chain, exam, arm, seed)


def either(low: Answers, high: Answers, taken: npt.NDArray[np.bool_]) -> Answers:
    """Combine answers question by question: high's if taken [n], else low's."""

    def chosen(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        return np.where(taken.reshape(-1, *[1] * (ours.ndim - 1)), theirs, ours)

    return replace(low, **{column: chosen(getattr(low, column), getattr(high, column)) for column in COLUMNS})


def _partial(path: Path) -> Path:
    return path.with_name(f"partial_{path.name}")
