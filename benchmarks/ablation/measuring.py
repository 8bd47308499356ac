"""The ablations of one checkpoint, from its scenes to the report."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from benchmarks.ablation import arms, costs, report
from benchmarks.ablation.arms import ADAPTIVE, ADAPTIVE_ARM, AUTO, HIGH, LOW, Named
from benchmarks.ablation.exams import FIRST, Scenes, either
from benchmarks.ablation.plan import Plan
from benchmarks.ablation.report import MOST_TOKENS, Json, Measured
from build_engines.model.checkpoint import CLIP, CLIP_LANGUAGE, Checkpoint
from build_engines.scenes.held_out import NEW, SMALL
from build_engines.train.evaluation import Chain
from build_engines.train.selection import GUIDED, RANDOM, UNIFORM


class Ablation:
    """Measure all arms of one checkpoint, each arm once."""

    def __init__(self, plan: Plan) -> None:
        self.checkpoint = Checkpoint.load(plan.checkpoint)
        self.chain = Chain.load(plan.checkpoint)
        self.fingerprint = fingerprint(plan.checkpoint)
        looks, answers = plan.kept / self.checkpoint.vision_fingerprint(), plan.kept / self.fingerprint
        numbers = {NEW: plan.scenes, SMALL: plan.small_print}
        self.scenes = {split: Scenes(split, number, looks, answers) for split, number in numbers.items()}
        for scenes in self.scenes.values():
            scenes.encode(self.chain)
        self.exams = {split: scenes.asked() for split, scenes in self.scenes.items()}
        self.measured: dict[str, Measured] = {}

    @property
    def closer_view(self) -> bool:
        return self.checkpoint.closer is not None

    def of(self, named: Named) -> Measured:
        """Measure an arm over half of the scenes, or return what `of_all` measured over all."""
        if named.name not in self.measured:
            self._measure(named, self.scenes[named.split].number // (2 if named.split == NEW else 1))
        return self.measured[named.name]

    def of_all(self, named: Named) -> Measured:
        self._measure(named, self.scenes[named.split].number)
        return self.measured[named.name]

    def _measure(self, named: Named, scenes: int) -> None:
        answers = self.scenes[named.split].answer(self.chain, named, self.exams[named.split], scenes)
        self.measured[named.name] = Measured(named, answers, float(named.arm.closer))

    def compact(self) -> Measured:
        """Measure the adaptive arm.

        If it would spend more than 120 tokens on average, its upper budget is lowered.
        """
        adaptive = self.of_all(ADAPTIVE)
        if adaptive.tokens <= MOST_TOKENS:
            return adaptive
        most = arms.LEAST + int((arms.MOST - arms.LEAST) * (MOST_TOKENS - arms.LEAST) / (adaptive.tokens - arms.LEAST))
        return self.of_all(Named(f"adaptive, at most {most}", replace(ADAPTIVE_ARM, vision_tokens=(arms.LEAST, most))))

    def auto(self, split: str) -> Measured:
        """Combine low and high: take the closer view for the questions for which the card's `auto` takes it."""
        named, high = arms.detail(split, AUTO), self.of(arms.detail(split, HIGH))
        low = self.of(arms.detail(split, LOW)).first(len(high.answers.right))
        taken = low.answers.tensions[:, 0] >= float(str(self.checkpoint.card.get("closer_view_at", 1.0)))
        self.measured[named.name] = Measured(named, either(low.answers, high.answers, taken), float(taken.mean()))
        return self.measured[named.name]

    def comparisons(self) -> tuple[dict[str, Json], list[str]]:
        """Return the differences between arms, and the names of those that the page shows."""
        compact, adaptive = self.compact(), self.of(ADAPTIVE)
        found = {"adaptive less 256 tokens": report.points(compact, self.of_all(arms.fixed(GUIDED, arms.MOST)))}
        found |= self._of_its_size("adaptive", compact)
        for arm in arms.without_tensions():
            found[f"adaptive less {arm.name}"] = report.points(adaptive, self.of(arm))
        if self.closer_view:
            for split in (NEW, SMALL):
                low, high = self.of(arms.detail(split, LOW)), self.of(arms.detail(split, HIGH))
                found[f"{split}: closer view less without"] = report.points(high, low)
                found[f"{split}: auto less without"] = report.points(self.auto(split), low)
            found |= self._of_its_size("small_print, high", self.of(arms.detail(SMALL, HIGH)))
        shown = list(found)
        for arm in arms.visual():
            found[f"{arm.name} less 32"] = report.points(self.of(arm), adaptive)
        for tokens in arms.BUDGETS[1:-1]:
            for policy in arms.POLICIES[1:]:
                theirs = self.of(arms.fixed(policy, tokens))
                found[f"guided less {policy}, {tokens} tokens"] = report.points(
                    self.of(arms.fixed(GUIDED, tokens)), theirs
                )
        return found, shown

    def asked_of_all_arms(self, split: str) -> int:
        """Return the number of first questions that every arm was asked."""
        return min((len(each.answers.right) for each in self.measured.values() if each.named.split == split), default=0)

    def _of_its_size(self, name: str, ours: Measured) -> dict[str, Json]:
        """Compare with arms of the same mean size: a fixed guided budget, random and evenly spread."""
        size, closer, split = arms.reachable(ours.tokens), ours.named.arm.closer, ours.named.split
        others = {"a fixed budget": GUIDED, RANDOM: RANDOM, UNIFORM: UNIFORM}
        return {
            f"{name} less {other} of its size": report.points(
                ours, self.of_all(arms.fixed(policy, size, closer, split))
            )
            for other, policy in others.items()
        }


def fingerprint(checkpoint: Path) -> str:
    """Hash the weights that answer questions about one image to 16 hex digits. Those for clips answer none."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        if path.name not in (CLIP, CLIP_LANGUAGE):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def measure(plan: Plan) -> Json:
    ablation = Ablation(plan)
    comparisons, shown = ablation.comparisons()
    for arm in arms.curves(ablation.closer_view):
        ablation.of(arm)
    adaptive, compact = ablation.of(ADAPTIVE), ablation.compact()
    cost = costs.of(ablation.checkpoint, plan.repository, plan.timed)
    spent, peak = {ADAPTIVE.name: report.spending(adaptive)}, report.peak_on_asked(adaptive)
    if ablation.closer_view:
        spent |= {each.named.name: report.spending(each) for each in (ablation.auto(NEW), ablation.auto(SMALL))}
    common = {split: ablation.asked_of_all_arms(split) for split in (NEW, SMALL)}
    rows = {
        name: report.arm_row(each, common[each.named.split]) | {"cost": costs.of_arm(cost, each)}
        for name, each in ablation.measured.items()
    }
    return {
        "command": plan.command,
        "checkpoint": {"name": str(ablation.checkpoint.card["name"]), "fingerprint": ablation.fingerprint},
        "closer_view": ablation.closer_view,
        "scenes": {split: scenes.number for split, scenes in ablation.scenes.items()},
        "first_scene": FIRST,
        "questions": {split: len(exam.asked) for split, exam in ablation.exams.items()},
        "verdict": report.verdict(comparisons, compact.tokens, spent, peak, costs.shares(cost, plan.out)),
        "comparisons": comparisons,
        "shown": shown,
        "spending": spent,
        "balance": report.balance(adaptive),
        "most_relevant_cell_on_asked_object": peak,
        "cost": cost,
        "arms": rows,
    }
