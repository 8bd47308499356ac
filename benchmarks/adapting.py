"""Compare an allocator from `glimpse adapt` with the reference model's own, by accuracy on held-out scenes.

    python -m benchmarks.adapting_pictures --out pictures --pictures 5000
    glimpse adapt CHECKPOINT --data pictures --out adapted       # the reference without its allocator.safetensors
    python -m benchmarks.adapting --adapted adapted --scenes 150

    python -m benchmarks.adapting --reference instruct --adapted adapted    # an InstructBLIP: benchmarks/instruct.py

All arms read the same features, and use the same Q-Former and language model. Differences are paired, with the 95 %
interval of a bootstrap over scenes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from build_engines.adapt.chain import Questions, prompts_of
from build_engines.model.adapted import QFORMER, WEIGHTS
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.checkpoint import Checkpoint, load_allocator
from build_engines.model.zero_shot import QFormerKnowing
from build_engines.scenes.held_out import NEW, PAIRS, SMALL, SPLITS
from build_engines.train.evaluation import Arm, Chain, Exam, answer, held_out_exam, paired, summarise

FIRST = 500_000  # held-out scenes that nothing else uses
PLAIN = {"112": Arm(vision_tokens=(112, 112)), "adaptive": Arm(), "256": Arm(vision_tokens=(256, 256))}
CLOSE = {f"closer_{n}": Arm(vision_tokens=(n, n), closer=True) for n in (112, 160, 256)} | {
    "closer_adaptive": Arm(vision_tokens=(64, 400), closer=True)
}
ARMS = {NEW: PLAIN, PAIRS: PLAIN, SMALL: PLAIN | CLOSE}
POLICIES = ("random", "uniform")


def chains_of(reference: Path, adapted: Path) -> dict[str, Chain]:
    """The same chain with the adapted allocator, a fixed one, and the shipped one or an InstructBLIP's zero-shot."""
    chain = Chain.load(reference)
    checkpoint = Checkpoint.load(reference)
    ours = load_allocator(adapted / WEIGHTS)
    fixed = RelevanceAllocator(None, None, ours.closer).eval()
    if not checkpoint.reads_question:
        return {"adapted": replace(chain, allocator=ours), "shipped": chain, "fixed": replace(chain, allocator=fixed)}
    for path in (adapted / QFORMER, adapted / "work" / QFORMER):  # it was adapted too; of a fixed result in `work`
        if path.exists():
            checkpoint.model.load_state_dict(load_file(path), strict=False)
    qformer, questions = checkpoint.qformer(), Questions(prompts_of(checkpoint))
    chain = replace(
        chain, qformer=qformer, read_by_qformer=lambda asked: questions.tensors([each.text for each in asked])
    )
    already = RelevanceAllocator(None, None, ours.closer, QFormerKnowing(qformer)).eval()
    allocators = {"adapted": ours, "fixed": fixed, "zero-shot": already}
    return {name: replace(chain, allocator=allocator) for name, allocator in allocators.items()}


def compare(chains: dict[str, Chain], exam: Exam, arm: Arm) -> dict[str, Any]:
    """By way of choosing: the summary, and the adapted allocator less this one."""
    ways = {name: (chain, arm) for name, chain in chains.items()}
    ways |= {policy: (chains["adapted"], replace(arm, policy=policy)) for policy in POLICIES}
    ours, report = answer(chains["adapted"], exam, arm), {}
    for name, (chain, one) in ways.items():
        found = ours if name == "adapted" else answer(chain, exam, one)
        table = summarise(found)
        report[name] = {kind: table[kind] for kind in ("all", "read") if kind in table}
        if name != "adapted":
            report[name]["adapted_less_this"] = paired(ours, found)
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapted", type=Path, required=True, help="folder that `glimpse adapt` wrote")
    parser.add_argument("--reference", type=Path, default=Path("reference"), help="(default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=150, help="held-out scenes of each split (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adapting.json"), help="report to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chains = chains_of(options.reference, options.adapted)
    report: dict[str, Any] = {"scenes": options.scenes}
    for split in SPLITS:
        closely = split == SMALL and chains["adapted"].allocator.closer is not None
        exam = held_out_exam(chains["adapted"], split, options.scenes, closely, FIRST)
        arms = {name: arm for name, arm in ARMS[split].items() if closely or not arm.closer}
        report[split] = {name: compare(chains, exam, arm) for name, arm in arms.items()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
