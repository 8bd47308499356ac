"""The allocator beside the field's methods of pruning vision tokens, and beside pruning once for all questions."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.ablation.arms import CLOSER_MOST, LEAST, MOST, Named, fixed, nothing_left_out, rivals
from benchmarks.ablation.measuring import Ablation
from benchmarks.ablation.plan import Plan
from benchmarks.ablation.pruning import CDPRUNER, Pruned
from benchmarks.ablation.report import ALL, READ, Json, Measured, accuracies, points
from build_engines.scenes.held_out import NEW, SMALL
from build_engines.train.evaluation import Arm
from build_engines.train.selection import GUIDED

TOKENS = (64, 100, 139)  # of each question; 100 and 139 are what the allocator spends on new scenes and on small print


def measure(plan: Plan) -> Json:
    ablation = Ablation(plan)
    splits = (NEW, SMALL) if ablation.closer_view else (NEW,)
    return {
        "command": f"{plan.command} --rivals",
        "checkpoint": {"name": str(ablation.checkpoint.card["name"]), "fingerprint": ablation.fingerprint},
        "scenes": {split: ablation.scenes[split].number for split in splits},
        "same_tokens": {split: {tokens: _beside(ablation, split, tokens) for tokens in TOKENS} for split in splits},
        "left_out": {split: {tokens: _left_out(ablation, split, tokens) for tokens in TOKENS} for split in splits}
        if ablation.closer_view
        else {},
        "many_questions": {split: _once(ablation, split) for split in splits},
    }


def _beside(ablation: Ablation, split: str, tokens: int) -> Json:
    """Every method with this many tokens, and ours less the best of them."""
    closer = split == SMALL
    ours = ablation.of_all(fixed(GUIDED, tokens, closer, split))
    theirs = [ablation.of_all(named) for named in rivals(split, tokens, closer)]
    best = max(theirs, key=lambda each: each.answers.right[each.of(ALL)].mean())
    return {
        "accuracy": {each.named.name: _row(each) for each in (ours, *theirs)},
        "best_rival": best.named.name,
        "ours_less_best_rival": points(ours, best),
    }


def _left_out(ablation: Ablation, split: str, tokens: int) -> Json:
    """The closer view within this many tokens, with cells left out and without."""
    ours, before = (
        ablation.of_all(each) for each in (fixed(GUIDED, tokens, True, split), nothing_left_out(tokens, split))
    )
    return {"accuracy": {each.named.name: _row(each) for each in (ours, before)}, "gain": points(ours, before)}


def _once(ablation: Ablation, split: str) -> Json:
    """All questions about an image, each with tokens of its own, and all with those of the first question.

    The encoder sees the image once in either case.
    """
    closer = split == SMALL
    adaptive = Arm(vision_tokens=(LEAST, CLOSER_MOST if closer else MOST), closer=closer)
    own = ablation.of_all(Named(f"{split}, tokens of its own", adaptive, split))
    tokens = round(own.tokens)
    fixed_ones = [
        Named(f"{split}, the first question's tokens", replace(adaptive, once=True), split),
        Named(f"{split}, {CDPRUNER}, {tokens} tokens, once", Pruned(CDPRUNER, tokens, closer, once=True), split),
    ]
    once = [ablation.of_all(named) for named in fixed_ones]
    return {
        "questions_an_image": round(len(own.answers.right) / ablation.scenes[split].number, 1),
        "accuracy": {each.named.name: _row(each) for each in (own, *once)},
        "own_less_once": {each.named.name: points(own, each) for each in once},
    }


def _row(each: Measured) -> Json:
    kinds = accuracies(each)
    return {"mean_vision_tokens": round(each.tokens, 1)} | {kind: kinds[kind] for kind in (ALL, READ) if kind in kinds}


def table(found: Json) -> str:
    """Return the figures as text: accuracy of all questions and of reading, by tokens and method."""
    lines = []
    for split, by_tokens in found["same_tokens"].items():
        for tokens, each in by_tokens.items():
            lines += [_line(name, row) for name, row in each["accuracy"].items()]
            less = each["ours_less_best_rival"][ALL]
            lines.append(
                f"{split}, {tokens} tokens: ours less {each['best_rival']}: "
                f"{less['value']:+.1f} points ({less['low']:+.1f} to {less['high']:+.1f})\n"
            )
    for by_tokens in found["left_out"].values():
        for each in by_tokens.values():
            lines += [_line(name, row) for name, row in each["accuracy"].items()]
    for split, each in found["many_questions"].items():
        lines.append(f"{split}, {each['questions_an_image']} questions an image")
        lines += [_line(name, row) for name, row in each["accuracy"].items()]
    return "\n".join(lines)


def _line(name: str, row: Json) -> str:
    read = f"{row[READ]['value']:.3f}" if READ in row else "-"
    return f"  {name:44} {row['mean_vision_tokens']:6.1f} tokens  all {row[ALL]['value']:.3f}  reading {read}"
