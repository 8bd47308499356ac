"""What the whole view says: the teacher's answers, and how much each patch matters for them.

Two forms, both without labels:
- `tokens`: the Q-Former's visual tokens of the full view. A patch matters by how much leaving it out changes them. If
  the Q-Former does not read the question (BLIP-2), neither does this teacher.
- `likelihood`: the language model's own answer to the full view. A patch matters by how much leaving it out changes the
  log odds of that answer.
With the form `answers`, the data's answers take the place of the model's own.

The change is measured to first order, at the gates of the patches (`gates.py`), with all patches open. For an image
with a closer view, the model also looks at the quarter of the image that mattered most, as at an image of its own. If
the whole view is unsure and the quarter is sure, the quarter's answer is the one to give. Once relevance is trained,
`look_nearer` chooses the quarters again by it.

    WORK/teacher.json       key, number of finished questions, answers
    WORK/importance.f16     [Q, 256] in [0, 1]
    WORK/nearer.json        answers from quarters that relevance chose, by question
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor
from tqdm import tqdm

from build_engines.adapt.chain import ALONE, MOST_ANSWER, Language, Questions, Reader
from build_engines.adapt.data import Asked
from build_engines.adapt.features import FeatureStore
from build_engines.adapt.sharding import Peers
from build_engines.model.allocation import CELL_COUNT, GRID, PATCH_COUNT, Allocation

TOKENS, LIKELIHOOD, ANSWERS = "tokens", "likelihood", "answers"
FORMS = (TOKENS, LIKELIHOOD, ANSWERS)
DIRECTIONS = 4  # random projections of the visual tokens, for the form `tokens`
UNSURE, SURE = 0.6, 0.8  # probabilities of the whole view's answer and of the quarter's
CONCENTRATED = 0.5  # share of the importance inside the quarter
SAVE_EVERY = 8  # batches
TAUGHT = 32  # questions of a batch


@dataclass(eq=False)
class Lessons:
    """What the teacher says to Q questions."""

    answers: list[list[int]]  # ids without the end; empty for the form `tokens`
    sure: list[float]  # probability of the full view's own answer
    nearer: list[bool]  # whether the answer is that of a quarter, from nearer
    importance: np.ndarray  # float16 [Q, 256] in [0, 1]

    def with_nearer(self, work: Path) -> Lessons:
        """These, with the answers from nearer that `Teacher.look_nearer` kept, if it did."""
        try:
            kept = json.loads((work / "nearer.json").read_text())
        except OSError:
            return self
        answers, nearer = list(self.answers), list(self.nearer)
        for row, answer in kept.items():
            answers[int(row)], nearer[int(row)] = answer, True
        return replace(self, answers=answers, nearer=nearer)

    def weight(self, row: int) -> float:
        """How much the whole view's answer teaches: its probability, as the geometric mean of its tokens'."""
        return float(self.sure[row] ** (1 / (len(self.answers[row]) + 1)))

    def trusted(self, row: int) -> bool:
        """Whether the teacher is sure of its answer, from whichever view."""
        return self.nearer[row] or self.sure[row] >= UNSURE

    def of(self, rows: Sequence[int]) -> Lessons:
        """Those of these questions only."""
        return Lessons(
            [self.answers[row] for row in rows],
            [self.sure[row] for row in rows],
            [self.nearer[row] for row in rows],
            self.importance[list(rows)],
        )


@dataclass
class Teacher:
    """Ask the frozen chain about full views."""

    reader: Reader
    language: Language | None
    questions: Questions
    allocation: Allocation
    form: str
    asks: str = ""  # names the Q-Former, the language model, the tokenizers and the prompt
    batch: int = TAUGHT
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    peers: Peers = ALONE

    def teach(self, asked: Sequence[Asked], store: FeatureStore, work: Path, stop_after: int | None = None) -> Lessons:
        """Answer every question, or load what an earlier start answered. stop_after: batches, as a kill would."""
        record, key = work / "teacher.json", self.key(asked, store)
        kept = _kept(record, key)
        path = work / "importance.f16"
        mode: Any = "r+" if kept["done"] and path.exists() else "w+"
        if mode == "w+":
            kept = _kept(record, "")
            self.peers.wait()  # every process has read the record
            if self.peers.writes:
                record.unlink(missing_ok=True)  # before its file is emptied
        importance = self.peers.opened(path, mode, (len(asked), PATCH_COUNT))
        found = Lessons(kept["answers"], kept["sure"], kept["nearer"], importance)
        bar = tqdm(
            total=len(asked), initial=kept["done"], desc="teacher", unit="question", mininterval=2,
            disable=not self.peers.writes,
        )  # fmt: skip
        first, batches = kept["done"], 0
        while first < len(asked) and batches != stop_after:
            part = asked[first : first + self.batch]
            importance[first : first + len(part)] = self._ask(part, store, found)
            first, batches = first + len(part), batches + 1
            if self.peers.writes and (batches % SAVE_EVERY == 0 or first == len(asked) or batches == stop_after):
                importance.flush()
                told = {"key": key, "done": first, "answers": found.answers, "sure": found.sure, "nearer": found.nearer}
                partial = record.with_suffix(".partial")
                partial.write_text(json.dumps(told))
                os.replace(partial, record)
            bar.update(len(part))
        bar.close()
        return found

    def key(self, asked: Sequence[Asked], store: FeatureStore) -> str:
        """A digest of what is taught from: the form, the models, the images and the questions."""
        told = [
            self.form,
            self.asks,
            store.key,
            str(MOST_ANSWER),
            *(f"{one.image} {one.text} {one.answer}" for one in asked),
            *(str(self.questions.answer(one.text, one.answer)) for one in asked if self.form == ANSWERS),
        ]
        return blake3("\n".join(told).encode()).hexdigest()

    def _ask(self, asked: Sequence[Asked], store: FeatureStore, found: Lessons) -> np.ndarray:
        """Add the answers of these questions to `found` -> their patches' importance [R, 256]."""
        images = sorted({one.image for one in asked})
        features = store.take(images)[0].to(self.device)
        owner = torch.tensor([images.index(one.image) for one in asked], device=self.device)
        texts = [one.text for one in asked]
        question = tuple(part.to(self.device) for part in self.questions.tensors(texts))
        gates = full_view(len(asked)).to(self.device).requires_grad_(True)
        visual = self.reader.visual(self.allocation.sources(features), gates, owner, question)
        if self.language is None:
            found.answers += [[] for _ in asked]
            found.sure += [1.0] * len(asked)
            found.nearer += [False] * len(asked)
            return normalised(self._change_of_tokens(visual, gates))
        said = self.language.answer(visual, texts)
        if self.form == ANSWERS:
            said = [
                self.questions.answer(one.text, one.answer) if one.answer else own
                for one, own in zip(asked, said, strict=True)
            ]
        spoken = self.language.speak(visual, texts, said)
        (gradient,) = torch.autograd.grad(spoken.margins.sum(), gates)
        importance = normalised(self.peers.agree(gradient[:, 1 : 1 + PATCH_COUNT]))
        sure, nearer = self.peers.agree(spoken.probability).tolist(), [False] * len(asked)
        if self.form == ANSWERS:  # given answers are right, however sure the model is of them
            sure = [1.0] * len(asked)
        if self.form == LIKELIHOOD:
            for row, answer in self._from_nearer(asked, store, importance, sure).items():
                said[row], nearer[row] = answer, True
        found.answers += said
        found.sure += sure
        found.nearer += nearer
        return importance

    def _change_of_tokens(self, visual: Tensor, gates: Tensor) -> Tensor:
        """The squared change of the visual tokens by each patch's gate, [R, 256]: Hutchinson's estimate."""
        generator = torch.Generator().manual_seed(3)
        total = torch.zeros_like(gates[:, 1 : 1 + PATCH_COUNT])
        for _ in range(DIRECTIONS):
            direction = torch.randn(visual.shape, generator=generator).to(visual)
            (gradient,) = torch.autograd.grad((visual * direction).sum(), gates, retain_graph=True)
            total += gradient[:, 1 : 1 + PATCH_COUNT].square()
        return total.sqrt()

    def look_nearer(
        self, asked: Sequence[Asked], store: FeatureStore, found: Lessons, importance: np.ndarray, work: Path
    ) -> Lessons:
        """Look again where the whole view was unsure, at the quarter that `importance` [Q, 256] chooses.

        Importance that was learned from all questions errs less than what was measured for one. The answers are
        kept in WORK/nearer.json, because relevance changes as training goes on.
        """
        record = work / "nearer.json"
        answers: dict[str, list[int]] = {}
        for first in range(0, len(asked), self.batch):
            rows = slice(first, first + self.batch)
            near = self._from_nearer(asked[rows], store, importance[rows], found.sure[rows])
            answers |= {str(first + row): answer for row, answer in near.items()}
        if self.peers.writes:
            partial = record.with_suffix(".partial")
            partial.write_text(json.dumps(answers))
            os.replace(partial, record)
        self.peers.wait()
        return found.with_nearer(work)

    @torch.no_grad()
    def _from_nearer(
        self, asked: Sequence[Asked], store: FeatureStore, importance: np.ndarray, sure: Sequence[float]
    ) -> dict[int, list[int]]:
        """For questions of which the whole view is unsure, the answer of the quarter that matters, if it is sure."""
        quarter, share = quarters(importance)
        rows = [
            row for row, one in enumerate(asked)
            if one.image in store.closer and sure[row] < UNSURE and share[row] > CONCENTRATED
        ]  # fmt: skip
        if not rows or self.language is None:
            return {}
        crops = store.take_crops([asked[row].image for row in rows])[range(len(rows)), quarter[rows]].to(self.device)
        texts = [asked[row].text for row in rows]
        question = tuple(part.to(self.device) for part in self.questions.tensors(texts))
        gates, owner = full_view(len(rows)).to(self.device), torch.arange(len(rows), device=self.device)
        visual = self.reader.visual(self.allocation.sources(crops), gates, owner, question)
        answers = self.language.answer(visual, texts)
        probability = self.peers.agree(self.language.speak(visual, texts, answers).probability).tolist()
        return {
            row: answer for row, answer, sureness in zip(rows, answers, probability, strict=True) if sureness > SURE
        }


def full_view(rows: int) -> Tensor:
    """Gates [R, 321] of the candidates of `Allocation.sources`: CLS and patches open, means of cells closed."""
    return torch.cat([torch.ones(rows, 1 + PATCH_COUNT), torch.zeros(rows, CELL_COUNT)], dim=1)


def normalised(change: Tensor) -> np.ndarray:
    """Magnitudes of changes [R, 256], divided by the greatest: in [0, 1]."""
    size = change.abs()
    return (size / size.amax(1, keepdim=True).clamp(min=1e-20)).cpu().numpy()


def quarters(importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The quarter of the image with the most importance, int [R], 0 to 3 row by row, and its share, [R]."""
    half = GRID // 2
    grid = importance.astype(np.float32).reshape(-1, 2, half, 2, half).transpose(0, 1, 3, 2, 4)
    mass = np.square(grid).sum((3, 4)).reshape(-1, 4)
    return mass.argmax(1), mass.max(1) / np.maximum(mass.sum(1), 1e-20)


def _kept(record: Path, key: str) -> dict[str, Any]:
    try:
        kept: dict[str, Any] = json.loads(record.read_text())
    except (OSError, ValueError):
        kept = {}
    return kept if key and kept.get("key") == key else {"done": 0, "answers": [], "sure": [], "nearer": []}
