"""What an adaptation needs: memory, disk and time, before it starts."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from build_engines.adapt.features import CROPS, TOKENS, bytes_of
from build_engines.adapt.train import Schedule
from build_engines.convert.estimate import FIXED_BYTES, available_memory, gigabytes
from build_engines.convert.options import Refused
from build_engines.model.allocation import MAX_VISION_TOKENS, PATCH_COUNT

TRAINED_BYTES = 16  # of a trained parameter: weight, gradient and two moments
ACTIVATIONS = 6  # floats kept for the backward pass, times the tokens' width and the Q-Former's layers
PROBE = 512  # rows and columns of the matrix product that measures the machine
BACKWARD = 3  # a forward and a backward pass, in forward passes


@dataclass(frozen=True)
class Work:
    """The size of an adaptation."""

    images: int
    closer: int  # images with a closer view
    questions: int
    width: int  # D
    schedule: Schedule
    language: bool  # whether the language model takes part
    parameters: Mapping[str, int]  # by component: vision_encoder, qformer, llm


@dataclass(frozen=True)
class Needs:
    """Memory and disk in bytes, time in seconds."""

    memory: int
    disk: int
    seconds: float

    def told(self) -> str:
        return (
            f"needs about {gigabytes(self.memory)} of memory, {gigabytes(self.disk)} of disk "
            f"and {max(1, round(self.seconds / 60))} minutes on this machine"
        )


def needs(work: Work, flops: float) -> Needs:
    """Estimate. flops: floating-point operations a second that this machine sustains.

    A token costs two operations a parameter forward. Time leaves out the measurement's plot and the checkpoint's start.
    """
    rows = work.schedule.images * work.schedule.asked + work.schedule.closer_images * work.schedule.asked
    loaded = sum(work.parameters.values()) - (0 if work.language else work.parameters["llm"])
    kept = work.schedule.images * MAX_VISION_TOKENS * 4 * work.width * 8 + rows * ACTIVATIONS * 4 * work.width * 512
    vision = 2 * work.parameters["vision_encoder"] * TOKENS * (work.images + CROPS * work.closer)
    question = 2 * (work.parameters["qformer"] * 96 + (work.parameters["llm"] * 64 if work.language else 0))
    passes = BACKWARD * (work.questions + work.schedule.steps * rows)
    disk = bytes_of(work.images, work.closer, work.width) + work.questions * PATCH_COUNT * 2 + 50_000_000
    return Needs(FIXED_BYTES + 4 * loaded + kept, disk, (vision + question * passes) / flops)


def speed() -> float:
    """Floating-point operations a second of a matrix product here, halved for everything that is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.randn(PROBE, PROBE, device=device)
    matrix @ matrix
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < 0.2:
        (matrix @ matrix)[0, 0].item()
        done += 1
    return 0.5 * done * 2 * PROBE**3 / (time.perf_counter() - started)


def check(wanted: Needs, out: Path, free_disk: int | None = None, free_memory: int | None = None) -> None:
    """Raises Refused if the machine has less. Free disk and memory are looked up if not given."""
    folder = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    disk = shutil.disk_usage(folder).free if free_disk is None else free_disk
    disk += sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if disk < wanted.disk:
        raise Refused(
            f"the features need {gigabytes(wanted.disk)} of disk at {out}; {gigabytes(disk)} are free. "
            "Free some, choose --out on a larger disk, or lower --images or --closer-share"
        )
    memory = available_memory() if free_memory is None else free_memory
    if memory < wanted.memory:
        raise Refused(
            f"the adaptation needs {gigabytes(wanted.memory)} of memory; {gigabytes(memory)} are free. "
            "Use --teacher tokens, which needs no language model, lower --batch, or use a larger machine"
        )
