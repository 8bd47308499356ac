"""Estimate what an adaptation needs before it starts: memory, disk and time."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from build_engines.adapt.features import CROPS, TOKENS, bytes_of
from build_engines.adapt.teacher import TAUGHT
from build_engines.adapt.train import Schedule
from build_engines.convert.estimate import FIXED_BYTES, available_memory, gigabytes
from build_engines.convert.options import Refused
from build_engines.model.allocation import MAX_VISION_TOKENS, PATCH_COUNT

TRAINED_BYTES = 16  # of a trained parameter: weight, gradient and two moments
ACTIVATIONS = 6  # floats kept for the backward pass, times the tokens' width and the Q-Former's layers
LANGUAGE_ACTIVATIONS = 14  # the same, times the language model's tokens, width and layers: a Llama's; an OPT's are 10
LANGUAGE_TOKENS = 96  # of a question: visual tokens, prompt and answer
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
    language_width: int = 0
    language_layers: int = 0
    processes: int = 1  # on this machine
    shard: bool = False  # whether they share the language model


@dataclass(frozen=True)
class Needs:
    """Memory and disk in bytes, time in seconds."""

    memory: int  # of the machine, for all its processes
    disk: int
    seconds: float
    device: int = 0  # memory of the GPU of one process; 0 without GPUs

    def told(self) -> str:
        device = f"{gigabytes(self.device)} on each GPU, " if self.device else ""
        return (
            f"needs about {gigabytes(self.memory)} of memory, {device}{gigabytes(self.disk)} of disk "
            f"and {max(1, round(self.seconds / 60))} minutes on this machine"
        )


def needs(work: Work, flops: float, cuda: bool | None = None) -> Needs:
    """Estimate. flops: floating-point operations a second that this machine sustains. cuda: looked up if not given.

    A token costs two operations a parameter forward. Time leaves out the measurement's plot and the checkpoint's start.
    """
    rows = (work.schedule.images + work.schedule.closer_images) * work.schedule.asked
    vision = 2 * work.parameters["vision_encoder"] * TOKENS * (work.images + CROPS * work.closer)
    question = 2 * (work.parameters["qformer"] * 96 + (work.parameters["llm"] * 64 if work.language else 0))
    passes = BACKWARD * (work.questions + work.schedule.steps * rows)
    disk = bytes_of(work.images, work.closer, work.width) + work.questions * PATCH_COUNT * 2 + 50_000_000
    cuda = torch.cuda.is_available() if cuda is None else cuda
    memory, device = _memory(work, rows, cuda)
    return Needs(memory, disk, (vision + question * passes) / flops, device)


def _memory(work: Work, rows: int, cuda: bool) -> tuple[int, int]:
    """Bytes of the machine, and of one GPU. rows: questions of a step of all processes."""
    processes, llm = work.processes, 4 * work.parameters["llm"] if work.language else 0
    others = 4 * (sum(work.parameters.values()) - work.parameters["llm"])
    step = _activations(work, -(-rows // processes))
    step += -(-work.schedule.images // processes) * MAX_VISION_TOKENS * 4 * work.width * 8
    taught = _activations(work, TAUGHT)
    if cuda:
        loaded = others + llm
        held = others + (llm // processes if work.shard else llm)
        # With shards one process after the other loads, else all at once.
        return processes * FIXED_BYTES + (1 if work.shard else processes) * loaded, held + max(step, taught)
    whole = 2 * llm if work.shard else processes * llm  # all shares, and the model of the process that loads it
    teaching = (processes if work.shard else 1) * taught  # else one process teaches
    return processes * (FIXED_BYTES + others) + whole + max(processes * step, teaching), 0


def _activations(work: Work, rows: int) -> int:
    """Bytes that a backward pass of so many questions keeps, in the Q-Former and in the language model."""
    language = LANGUAGE_TOKENS * work.language_width * work.language_layers * LANGUAGE_ACTIVATIONS
    return 4 * rows * (ACTIVATIONS * work.width * 512 + (language if work.language else 0))


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


def fits(wanted: Needs) -> bool:
    """Whether there is enough memory."""
    return wanted.memory <= available_memory() and wanted.device <= available_device()


def available_device() -> int:
    """Bytes that are free on this process's GPU; 0 without GPUs."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0])


def check(
    wanted: Needs, out: Path, free_disk: int | None = None, free_memory: int | None = None,
    free_device: int | None = None,
) -> None:  # fmt: skip
    """Raises Refused if the machine has less. What is free is looked up if not given."""
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
    device = available_device() if free_device is None else free_device
    if device < wanted.device:
        raise Refused(
            f"the adaptation needs {gigabytes(wanted.device)} on each GPU; {gigabytes(device)} are free. "
            "Use --teacher tokens, which needs no language model, lower --batch, or share the model by --shard-llm"
        )
