"""Measure an allocator against the full view, honestly: beside random, uniform and fixed choice, on images kept apart.

Agreement is the share of questions to which the budgeted view gives the full view's answer (with a closer view: the
teacher's answer). With the teacher `answers` it is accuracy. Without a language model it is the mean cosine of the
visual tokens with the full view's. Intervals are 95 %, by a bootstrap over images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from build_engines.adapt.teacher import Lessons
from build_engines.adapt.train import QUERIES, Batch, Drawer, Student
from build_engines.evaluation.intervals import mean
from build_engines.model.allocation import CELL_COUNT, MAX_VISION_TOKENS, MOST_TOKENS
from build_engines.model.allocator import RelevanceAllocator, Weighed
from build_engines.model.knowing import mean_meaning
from build_engines.model.relaxation import choose, gates_of
from build_engines.train.selection import GUIDED, RANDOM, UNIFORM, select
from build_engines.train.settling import SHARES, Curves, settle
from service.core.vision import TOKENS_AT_LEVEL

FIXED = "fixed"  # relevance without a question: the mean of the first two maps
BUDGETS = (64, 80, 96, 112, 128, 192, 256)
CLOSER_BUDGETS = (112, 160, 256, 400)
MOST_MEASURED, MOST_SETTLED = 300, 300  # questions
LEAST_IMAGES = 10  # with questions that are answered from nearer
AT_ONCE = 24  # questions
VIEWS = ("whole view", "closer view")
NEARER = "answered from nearer"  # of the closer view's questions: those that the teacher could not answer from afar


@dataclass(frozen=True)
class Spent:
    """Results of one arm for n questions."""

    values: np.ndarray  # [n]: agreement
    tokens: np.ndarray  # [n]: vision tokens
    images: np.ndarray  # int [n]

    def part(self, which: np.ndarray | slice) -> Spent:
        """The results for some of the questions."""
        return Spent(self.values[which], self.tokens[which], np.unique(self.images[which], return_inverse=True)[1])

    def told(self) -> dict[str, Any]:
        figure = mean(self.values, self.images)
        return {"agreement": figure.as_json() if figure else None, "vision_tokens": round(float(self.tokens.mean()), 1)}


def policy_of(name: str, batch: Batch, student: Student, others: Mapping[str, RelevanceAllocator]) -> Weighed:
    """How an arm weighs the questions of a batch."""
    own = student.allocator
    if name in others:
        student.allocator = others[name]
    try:
        return student.weigh(batch, student.question(batch))
    finally:
        student.allocator = own


@torch.no_grad()
def measure(
    student: Student, drawer: Drawer, rows: Sequence[int], arm: str, budget: tuple[int, int],
    others: Mapping[str, RelevanceAllocator], closely: bool = False,
) -> Spent:  # fmt: skip
    """Ask the questions of these numbers under one arm. others: allocators that an arm of their name uses."""
    noise = torch.Generator().manual_seed(11)
    values, tokens = [], []
    for start in range(0, len(rows), AT_ONCE):
        part = list(rows[start : start + AT_ONCE])
        batch = drawer.batch(part, [0] * len(part), closely)
        batch.budget = torch.tensor([[*budget, QUERIES, QUERIES]] * len(part), dtype=torch.int32).to(batch.budget)
        weighed = policy_of(arm, batch, student, others)
        if arm in (RANDOM, UNIFORM):
            cells, tensions = select(
                arm, weighed, torch.rand(len(part), CELL_COUNT, generator=noise).to(batch.features)
            )
        else:
            cells, tensions = select(GUIDED, weighed, weighed.cells)
        value, spent = _answered(student, batch, cells, tensions)
        values.append(value)
        tokens.append(spent)
    images = np.array([drawer.asked[row].image for row in rows])
    return Spent(np.concatenate(values), np.concatenate(tokens), np.unique(images, return_inverse=True)[1])


def _answered(student: Student, batch: Batch, cells: Tensor, tensions: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Agreement and vision tokens, each [R]."""
    ranked = _Ranked(cells, tensions)
    question = student.question(batch)
    visual, levels = _read(student, batch, ranked, question)
    spent = torch.stack([tokens * (levels == level).sum(1) for level, tokens in enumerate(TOKENS_AT_LEVEL)]).sum(0)
    if student.language is None:
        whole = student.whole(batch, question)
        value = functional.cosine_similarity(visual, whole, dim=2).mean(1)
    else:
        value = student.language.speak(visual, batch.texts, batch.answers).right.float()
    return value.cpu().numpy(), spent.cpu().numpy()


@dataclass(frozen=True)
class _Ranked:
    cells: Tensor
    tensions: Tensor


def _read(student: Student, batch: Batch, ranked: _Ranked, question: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Visual tokens [R, 32, H] and levels [R, 64]."""
    allocation = student.allocator.allocation
    closely = batch.detail is not None
    choice = choose(student.allocator, ranked.cells, ranked.tensions, batch.budget, closer=closely)
    tokens = allocation.sources(batch.features, student.allocator.detail(batch.features, batch.detail))
    return student.reader.visual(tokens, gates_of(allocation, choice), batch.owner, question), choice.levels


@torch.no_grad()
def curves(student: Student, drawer: Drawer, rows: Sequence[int], closely: bool) -> Curves | None:
    """The teacher's loss of each question at four budgets, for fitting particularize."""
    parts = []
    ceiling = MAX_VISION_TOKENS if closely else MOST_TOKENS
    for start in range(0, len(rows), AT_ONCE):
        part = list(rows[start : start + AT_ONCE])
        batch = drawer.batch(part, [0] * len(part), closely)
        question = student.question(batch)
        weighed, losses = student.weigh(batch, question), []
        whole = student.whole(batch, question)
        for share in SHARES:
            spent = round(CELL_COUNT + share * (ceiling - CELL_COUNT))
            budget = torch.tensor([[spent, spent, QUERIES, QUERIES]] * len(part), dtype=torch.int32)
            fixed = replace(batch, budget=budget.to(batch.budget))
            visual, _ = _read(student, fixed, _Ranked(weighed.cells, weighed.tensions), question)
            if student.language is None:
                losses.append((visual - whole).square().mean((1, 2)) / whole.var().clamp(min=1e-12))
            else:
                losses.append(student.language.speak(visual, batch.texts, batch.answers).losses * batch.sure)
        participatory = student.allocator.participatory
        meaning = mean_meaning(participatory.meanings(*question), question[1])
        size = torch.full((len(part),), float(ceiling - CELL_COUNT), device=meaning.device)
        kinds = torch.zeros(len(part), dtype=torch.long, device=meaning.device)
        parts.append(
            Curves(
                weighed.scores, meaning, torch.stack(losses, dim=1), size, kinds, torch.full_like(size, closely).bool()
            )
        )
    return Curves.joined(parts) if parts else None


def settle_particularize(student: Student, drawer: Drawer, rows: Sequence[int], seed: int) -> float:
    """Fit how much of a budget each question gets, in place -> the particularize from which `auto` looks closer.

    The value separates the questions that the teacher answered from nearer from the others best (Youden 1950).
    """
    rng = np.random.default_rng((seed, 1))
    chosen = rng.permutation(rows)[:MOST_SETTLED].tolist()
    near = [row for row in chosen if drawer.asked[row].image in drawer.store.closer]
    found = [curves(student, drawer, part, closely) for part, closely in ((chosen, False), (near, True)) if part]
    with torch.enable_grad():
        settle(student.allocator.balancing, Curves.joined([one for one in found if one is not None]))
    wants = np.array([drawer.lessons.nearer[row] for row in chosen])
    if not wants.any() or wants.all():
        return 1.0
    with torch.no_grad():
        said = [
            student.weigh(batch, student.question(batch)).tensions[:, 0].cpu().numpy()
            for start in range(0, len(chosen), AT_ONCE)
            for batch in [
                drawer.batch(chosen[start : start + AT_ONCE], [0] * len(chosen[start : start + AT_ONCE]), False)
            ]
        ]
    leaning = np.concatenate(said)
    gains = [float((leaning[wants] >= at).mean() - (leaning[~wants] >= at).mean()) for at in np.unique(leaning)]
    return round(float(np.unique(leaning)[int(np.argmax(gains))]), 3)


def report(
    student: Student, drawer: Drawer, rows: Sequence[int], threshold: float, others: Mapping[str, RelevanceAllocator],
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Every arm at every budget, and what follows: the default budget, and whether the allocator gains anything."""
    lessons, order = drawer.lessons, np.random.default_rng(7).permutation(rows).tolist()
    # Agreement with a guess says nothing. A teacher that is never sure is measured as it is.
    trusted = [row for row in order if lessons.trusted(row)]
    every = trusted or order
    rows = from_afar(lessons, every, order)[:MOST_MEASURED]
    close = [row for row in every if drawer.asked[row].image in drawer.store.closer]
    near = close[:MOST_MEASURED]
    nearer = [row for row in close if lessons.nearer[row]][:MOST_MEASURED]
    closely_asked = [*near, *(row for row in nearer if row not in near)]
    arms = (GUIDED, RANDOM, UNIFORM, *others)
    jobs = [(arm, (tokens, tokens), False) for tokens in BUDGETS for arm in arms]
    if near and student.allocator.closer is not None:
        jobs += [(arm, (tokens, tokens), True) for tokens in CLOSER_BUDGETS for arm in arms]
    found: dict[tuple[str, int, bool], Spent] = {}
    for arm, budget, closely in tqdm(jobs, desc="measuring", unit="arm", mininterval=2, disable=quiet):
        asked = closely_asked if closely else rows
        # An allocator without a closer view of its own reads the closer view through the student's.
        found[arm, budget[0], closely] = measure(student, drawer, asked, arm, budget, others, closely)
    least = least_budget({tokens: found[GUIDED, tokens, False] for tokens in BUDGETS}, threshold)
    answered = _nearer(found, arms, np.array([row in nearer for row in closely_asked], bool))
    found = {key: spent.part(slice(len(near))) if key[2] else spent for key, spent in found.items()}
    differences = _differences(found, arms) | answered
    gains = any(differences[view]["interval"][0] > 0 for view in (*VIEWS, NEARER) if view in differences)
    adaptive = measure(student, drawer, rows, GUIDED, (least, MOST_TOKENS), others)
    return {
        "sure": round(len(trusted) / max(1, len(order)), 4),
        "questions": len(rows),
        "images": len({drawer.asked[row].image for row in rows}),
        "threshold": threshold,
        "arms": {
            arm: [spent.told() for (name, _, closely), spent in found.items() if name == arm and not closely]
            for arm in arms
        },
        "closer": {
            arm: [spent.told() for (name, _, closely), spent in found.items() if name == arm and closely]
            for arm in arms
            if near
        },
        "adaptive": adaptive.told(),
        "against_best_other": differences,
        "gains": gains,
        "default_vision_tokens": [least, MOST_TOKENS] if gains else [MOST_TOKENS, MOST_TOKENS],
    }


def from_afar(lessons: Lessons, trusted: Sequence[int], every: Sequence[int]) -> list[int]:
    """The questions that the teacher answered from the whole view: the trusted ones, or if there are none, all."""
    for rows in (trusted, every):
        if found := [row for row in rows if not lessons.nearer[row]]:
            return found
    return list(trusted)


def least_budget(guided: Mapping[int, Spent], threshold: float) -> int:
    """The least budget from which agreement stays at the threshold or above."""
    least = MOST_TOKENS
    for tokens in sorted(guided, reverse=True):
        if guided[tokens].values.mean() < threshold:
            break
        least = tokens
    return least


def _nearer(
    found: Mapping[tuple[str, int, bool], Spent], arms: Sequence[str], which: np.ndarray
) -> dict[str, dict[str, Any]]:
    """The mean of `_differences` over the closer view's budgets, for the questions that only it answers (bool [n]).

    They are what the closer view is for. Among all of its questions they are few, and the others are answered anyhow.
    """
    part = {key: spent.part(which) for key, spent in found.items() if key[2]}
    if any(len(np.unique(spent.images)) < LEAST_IMAGES for spent in part.values()):
        return {}  # too few for an interval
    told = _differences(part, arms)
    return {NEARER: told[VIEWS[True]] | {"questions": int(which.sum())}} if told else {}


def _differences(found: Mapping[tuple[str, int, bool], Spent], arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The guided arm less the best other one on the same questions: at each budget, and their mean in each view."""
    told: dict[str, dict[str, Any]] = {}
    for closely in (False, True):
        budgets = sorted({tokens for _, tokens, near in found if near == closely and (near or tokens < MOST_TOKENS)})
        several = []
        for tokens in budgets:
            ours = found[GUIDED, tokens, closely]
            best = max(
                (arm for arm in arms if arm != GUIDED), key=lambda arm: found[arm, tokens, closely].values.mean()
            )
            several.append(ours.values - found[best, tokens, closely].values)
            told |= _told(f"{tokens}{' closer' if closely else ''}", several[-1], ours.images, other=best)
        if several:
            told |= _told(VIEWS[closely], np.mean(several, axis=0), ours.images)
    return told


def _told(name: str, differences: np.ndarray, images: np.ndarray, **more: str) -> dict[str, dict[str, Any]]:
    figure = mean(differences, images)
    if figure is None:
        return {}
    interval = [round(figure.low, 4), round(figure.high, 4)]
    return {name: more | {"difference": round(figure.value, 4), "interval": interval}}


def plot(told: Mapping[str, Any], path: Path) -> None:
    """Agreement against vision tokens, with intervals."""
    import matplotlib as mpl  # noqa: PLC0415  (a second: only if there is something to draw)

    mpl.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    views = dict(zip(("arms", "closer"), VIEWS, strict=True))
    shown = [view for view in views if told[view]]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5.5 * len(shown), 4), squeeze=False)
    for axis, view in zip(axes[0], shown, strict=True):
        for arm, points in told[view].items():
            tokens = [point["vision_tokens"] for point in points]
            values = [point["agreement"]["value"] for point in points]
            (line,) = axis.plot(tokens, values, marker="o", label="adapted" if arm == GUIDED else arm)
            low, high = ([point["agreement"][end] for point in points] for end in ("low", "high"))
            axis.fill_between(tokens, low, high, alpha=0.15, color=line.get_color())
        axis.axhline(told["threshold"], color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=views[view], xlabel="vision tokens", ylabel="agreement with the full view")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
