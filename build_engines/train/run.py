"""A whole training run: its stages in their order, the checkpoint at the end."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from build_engines.train.allocator_stage import train_allocator
from build_engines.train.clips_stage import train_clips
from build_engines.train.course import check_settings
from build_engines.train.curve import plot
from build_engines.train.joint_stage import train_joint
from build_engines.train.language_stage import train_language
from build_engines.train.publishing import publish
from build_engines.train.qformer_stage import train_qformer
from build_engines.train.replicas import run_replicas
from build_engines.train.stages import Plan, set_threads
from build_engines.train.vision_stage import train_vision

STAGES: Mapping[str, Callable[..., Any]] = {
    "language": train_language,
    "vision": train_vision,
    "qformer": train_qformer,
    "joint": train_joint,
    "allocator": train_allocator,
    "clips": train_clips,
}
ALONE = ("language", "vision")  # need no other stage's weights
COMPLETE = ("joint", "allocator", "clips")  # leave a model that answers
REPLICAS = 2  # processes of the later stages on a CPU; each adds its own part to the batch


def train(plan: Plan, stages: Sequence[str], threads: int) -> None:
    """Run the stages, or go on with them. Raises OtherSettingsError if one was begun with other settings."""
    for stage in stages:
        check_settings(plan, stage, processes(plan, stage, threads))
    later = [stage for stage in stages if stage not in ALONE]
    if not plan.tiny and any(processes(plan, stage, threads) < REPLICAS for stage in later):
        tqdm.write(
            f"{', '.join(later)}: one process, so that each step has half of the usual batch. "
            "--threads 2 on a CPU gives the whole"
        )
    set_threads(threads)
    _side_by_side(plan, [stage for stage in stages if stage in ALONE], threads)
    for stage in later:
        run_replicas(STAGES[stage], plan, processes(plan, stage, threads))
    if complete := [stage for stage in stages if stage in COMPLETE]:
        card = json.loads((publish(plan, complete[-1]) / "model_card.json").read_text())
        told = {split: rows["adaptive"]["all"] for split, rows in card["accuracy_in_pytorch"].items()}
        tqdm.write(json.dumps(told, indent=2))
    plot(plan.out / "log.jsonl", plan.out / "learning_curve.png")


def processes(plan: Plan, stage: str, threads: int) -> int:
    """How many processes train a stage. Its batch grows with them."""
    if stage in ALONE or plan.tiny or torch.cuda.is_available():
        return 1
    return min(REPLICAS, threads)


def _side_by_side(plan: Plan, stages: list[str], threads: int) -> None:
    """Stages that need no other's weights share the machine, each with its own process."""
    each = max(1, threads // max(1, len(stages)))
    if len(stages) < 2 or threads < 2 or plan.tiny:
        for stage in stages:
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
        raise SystemExit(f"stage {' and '.join(failed)} failed: see above; --resume goes on from the last checkpoint")


def _one(stage: str, plan: Plan, threads: int) -> None:
    set_threads(threads)
    STAGES[stage](plan)
