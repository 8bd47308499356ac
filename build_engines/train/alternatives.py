"""Compare other ways to train the stage `allocator` with the shipped one.

    python -m build_engines.train.alternatives

Runs short trainings of equal length from the same start, the stage `joint` of --start. The alternatives are large
budgets more often (2:3:5), and LoRA on the language model. All answer the same questions on held-out scenes.
Differences are paired, with the 95 % interval of a bootstrap over scenes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from build_engines.model.allocation import MAX_VISION_TOKENS
from build_engines.scenes.held_out import NEW, PAIRS, SMALL
from build_engines.train.allocator_stage import train_allocator
from build_engines.train.evaluation import Answers, Arm, Chain, Exam, answer, held_out_exam, paired, summarise
from build_engines.train.looking import Looking
from build_engines.train.looks import Eye
from build_engines.train.replicas import run_replicas
from build_engines.train.stages import Plan, set_threads

START = ("language.pt", "joint.pt", "looks_0.pt", "looks_1.pt")  # the last two only if they exist
FIRST = 300_000  # held-out scenes that nothing else uses
RANK = 8
WAYS: dict[str, dict[str, Any]] = {
    "as_shipped": {},
    "large_budgets_2_3_5": {"large_budgets": True},
    f"lora_rank_{RANK}": {"adapter_rank": RANK},
}
ARMS = {
    NEW: {f"{n}": Arm(vision_tokens=(n, n)) for n in (80, 112, 256)},
    PAIRS: {"112": Arm(vision_tokens=(112, 112))},
    SMALL: {f"closer_{n}": Arm(vision_tokens=(n, n), closer=True) for n in (160, MAX_VISION_TOKENS)},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=Path("runs/reference"), help="a run with a finished stage joint")
    parser.add_argument("--runs", type=Path, default=Path("runs/alternatives"), help="folder of the short runs")
    parser.add_argument("--scale", type=float, default=0.08, help="share of the stage's steps (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes of each split (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a smoke test with a tiny model and a few steps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"), help="report to write")
    options = parser.parse_args(arguments)
    plan = Plan(options.runs, options.scale, compiled=not options.tiny, tiny=options.tiny)
    chains = {}
    for name, changed in WAYS.items():
        way = replace(plan, out=options.runs / name, **changed)
        start(options.start, way.out)
        run_replicas(train_allocator, way, 1 if options.tiny else min(2, options.threads))
        chains[name] = chain_of(way)
    set_threads(options.threads)
    said = ["python -m build_engines.train.alternatives", f"--scale {options.scale:g} --scenes {options.scenes}"]
    report = {
        "command": " ".join(said),
        "steps": {name: steps_of(options.runs / name) for name in WAYS},
        "ways": compare(chains, options.scenes),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def start(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in START:
        if (source / name).exists() and not (target / name).exists():
            partial = (target / name).with_suffix(".partial")
            shutil.copyfile(source / name, partial)
            os.replace(partial, target / name)


def steps_of(run: Path) -> int:
    """The steps that a run has trained, from its log."""
    return max(json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines())


def chain_of(plan: Plan) -> Chain:
    """The FP32 chain of a finished stage `allocator`."""
    looking = Looking(plan)
    looking.start_from(plan)
    weights = plan.finished("allocator")
    for name, module in looking.modules.items():
        module.load_state_dict(weights[name])
        module.eval()
    eye = Eye.exact(looking.model.vision_model)
    return Chain(eye, looking.allocator, looking.qformer, looking.model.language_model, looking.tokenizer)


def compare(chains: dict[str, Chain], scenes: int) -> dict[str, Any]:
    """By way, split and arm: the summary, and the difference to the first way."""
    report: dict[str, Any] = {name: {} for name in chains}
    for split, arms in ARMS.items():
        # The encoder is frozen, so all chains share the first chain's exam.
        exam: Exam = held_out_exam(next(iter(chains.values())), split, scenes, split == SMALL, FIRST)
        for arm_name, arm in arms.items():
            first: Answers | None = None
            for name, chain in chains.items():
                answers = answer(chain, exam, arm)
                first = first or answers
                table = summarise(answers)
                told = {key: table[key] for key in ("all", "count", "read") if key in table}
                report[name].setdefault(split, {})[arm_name] = told | {"against_first": paired(answers, first)}
    return report


if __name__ == "__main__":
    sys.exit(main())
