"""`python -m build_engines.train --out runs/reference`: train the reference model from scratch.

Runs on a CPU or a GPU, in five resumable stages. `language` (the decoder, on symbols) and `vision` (the encoder, on
dense losses) run at the same time, then `qformer`, `joint` and `allocator`. At the end the checkpoint is written,
rounded to FP16, read back and evaluated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from build_engines.train.allocator_stage import train_allocator
from build_engines.train.curve import plot
from build_engines.train.joint_stage import train_joint
from build_engines.train.language_stage import train_language
from build_engines.train.publishing import publish
from build_engines.train.qformer_stage import train_qformer
from build_engines.train.replicas import run_replicas
from build_engines.train.stages import Plan, set_threads
from build_engines.train.vision_stage import train_vision

STAGES = {
    "language": train_language,
    "vision": train_vision,
    "qformer": train_qformer,
    "joint": train_joint,
    "allocator": train_allocator,
}
ALONE = ("language", "vision")  # need no other stage's weights
COMPLETE = ("joint", "allocator")  # end with a model that answers
REPLICAS = 2  # processes of the later stages on a CPU; each adds to the batch, so another number trains differently


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="glimpse train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reference"), help="checkpoints, log, curve (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of the number of steps (default: 1, the shipped model)"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="total CPU threads (default: %(default)s)"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile: needs no C++ compiler, but is slower")
    parser.add_argument(
        "--large-budgets", action="store_true", help="stage allocator: large budgets more often, 2:3:5 by thirds"
    )
    parser.add_argument(
        "--adapter-rank",
        type=int,
        default=0,
        help="stage allocator: rank of LoRA on the language model (default: frozen)",
    )
    parser.add_argument("--tiny", action="store_true", help="a smoke test with a tiny model and a few steps")
    options = parser.parse_args(arguments)

    stages = options.stages.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"--stages has unknown {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    begun = [stage for stage in stages if (options.out / f"{stage}.pt").exists()]
    if begun and not options.resume:
        parser.error(f"{options.out} already holds {', '.join(begun)}: add --resume or choose another --out")

    plan = Plan(
        options.out,
        options.scale,
        compiled=not options.eager,
        tiny=options.tiny,
        large_budgets=options.large_budgets,
        adapter_rank=options.adapter_rank,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    first = [stage for stage in stages if stage in ALONE]
    _side_by_side(plan, first, options.threads)
    copies = 1 if torch.cuda.is_available() or options.tiny else min(REPLICAS, options.threads)
    for stage in stages:
        if stage not in ALONE:
            run_replicas(STAGES[stage], plan, copies)
    if complete := [stage for stage in stages if stage in COMPLETE]:
        card = json.loads((publish(plan, complete[-1]) / "model_card.json").read_text())
        told = {split: rows["adaptive"]["all"] for split, rows in card["accuracy_in_pytorch"].items()}
        tqdm.write(json.dumps(told, indent=2))
    plot(options.out / "log.jsonl", options.out / "learning_curve.png")
    tqdm.write(f"finished in {(time.monotonic() - started) / 60:.1f} minutes; output is in {options.out}")
    return 0


def _side_by_side(plan: Plan, stages: list[str], threads: int) -> None:
    """Run stages that need no other's weights at the same time, each in its own process."""
    each = max(1, threads // max(1, len(stages)))
    if len(stages) < 2 or threads < 2 or plan.tiny:
        for stage in stages:
            set_threads(threads)
            STAGES[stage](plan)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_one, args=(stage, plan, each), name=stage) for stage in stages]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failed = [process.name for process in processes if process.exitcode != 0]
    if failed:
        raise SystemExit(
            f"stage {' and '.join(failed)} failed, see above; continue from the last checkpoint with --resume"
        )


def _one(stage: str, plan: Plan, threads: int) -> None:
    set_threads(threads)
    STAGES[stage](plan)


if __name__ == "__main__":
    sys.exit(main())
