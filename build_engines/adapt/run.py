"""The steps of an adaptation, in order. Each continues where a killed run stopped."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import save_file
from torch import nn

from build_engines.adapt import data, measure
from build_engines.adapt.adapters import adapt as adapt_qformer
from build_engines.adapt.adapters import changed
from build_engines.adapt.chain import Language, Questions, Reader, new_allocator, prompts_of
from build_engines.adapt.data import Asked, Data
from build_engines.adapt.features import FeatureStore
from build_engines.adapt.sharding import Peers
from build_engines.adapt.teacher import ANSWERS, LIKELIHOOD, TOKENS, Teacher
from build_engines.adapt.train import Drawer, Schedule, Student, Training, accelerator_of
from build_engines.model.adapted import DISTILLED, FIXED, QFORMER, TRAINED, WEIGHTS, ZERO_SHOT, Adapted
from build_engines.model.allocation import Allocation
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.checkpoint import Checkpoint, save_allocator
from build_engines.model.qformer import InstructQFormer
from build_engines.model.zero_shot import QFormerKnowing
from service.media.decoder import ImageLimits

SKIPPED, REPORT, PLOT = "skipped.txt", "report.json", "measured.png"
JOB = "job.json"  # in the work folder: what `--teacher auto` was


@dataclass(frozen=True)
class Job:
    """One adaptation."""

    checkpoint: Path
    out: Path
    teacher: str
    schedule: Schedule
    questions_an_image: int
    closer_images: int
    threshold: float
    limits: ImageLimits
    adapter_rank: int = 0  # of LoRA on the Q-Former's cross-attention; 0 leaves it frozen
    shard: bool = False  # whether the processes hold the language model together

    @property
    def work(self) -> Path:
        return self.out / "work"


def adapt(job: Job, found: Data) -> Adapted:
    """Compute features, ask the teacher, train, measure, and write the result into job.out."""
    started = time.monotonic()
    accelerator = accelerator_of()
    job = agreed(job)
    job.work.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        (job.work / JOB).write_text(json.dumps({"teacher": job.teacher}))
    peers = Peers(accelerator, job.shard)
    checkpoint = peers.in_turn(lambda: frozen(job, peers))
    questions = Questions(prompts_of(checkpoint))
    encoder = checkpoint.vision_encoder().to(accelerator.device)
    models = Adapted(
        FIXED,
        checkpoint.vision_fingerprint(),
        (0, 0),
        question_tokenizer=checkpoint.question_fingerprint(),
        qformer=checkpoint.qformer_fingerprint(),
    )
    width = checkpoint.model.config.vision_config.hidden_size
    reader = Reader(checkpoint.qformer().to(accelerator.device), checkpoint.reads_question)
    language = None
    if job.teacher != TOKENS:
        language = Language(checkpoint.model.language_model.to(accelerator.device), questions, peers)
    times = {"start": time.monotonic() - started}
    with accelerator.main_process_first():  # one process computes, the others load what it wrote
        store = FeatureStore(job.work, found.images, width, job.closer_images, models.encoder)
        store.fill(encoder, job.limits)
        times["features"] = time.monotonic() - started
    asked = chosen_questions(found, store, job)
    kept_apart = data.measured(found, asked, job.schedule.seed)
    allocation = Allocation().to(accelerator.device)
    asks = asked_models(checkpoint)
    teacher = Teacher(
        reader, language, questions, allocation, job.teacher, asks, device=accelerator.device, peers=peers
    )
    with peers.once():
        lessons = teacher.teach(asked, store, job.work)
    times["teacher"] = time.monotonic() - started
    adapters = adapt_qformer(checkpoint.model.qformer, job.adapter_rank) if job.adapter_rank else []
    allocator = new_allocator(checkpoint, bool(store.closer), job.schedule.seed).to(accelerator.device)
    student = Student(allocator, reader, language, questions, adapters)
    drawer = Drawer(store, asked, lessons, job.schedule, accelerator.device, bool(adapters))
    learned_from = f"{teacher.key(asked, store)} rank {job.adapter_rank} without {sorted(kept_apart)}"
    training = Training(accelerator, student, job.schedule, job.work, learned_from)
    learned = drawer_of(drawer, [row for row, one in enumerate(asked) if one.image not in kept_apart])
    training.run(learned, relevance=True)
    if training.step == job.schedule.relevance_steps:
        student.settle_level(learned)
    if job.teacher == LIKELIHOOD:
        learned = looked_nearer(peers, training, teacher, learned, job.work)
    training.run(learned)
    times["training"] = time.monotonic() - started
    if not peers.takes_part:
        return models
    told = measured(student, drawer, kept_apart, job, quiet=not peers.is_main)
    times["measuring"] = time.monotonic() - started
    told |= {
        "teacher": job.teacher,
        "data": {
            "form": found.form,
            "images": len(found.images),
            "questions": len(asked),
            "skipped": len(found.skipped) + len(store.broken),
        },
        "seconds": {name: round(value, 1) for name, value in times.items()},
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
    }
    if not peers.is_main:
        return models
    return publish(job, found, store, student, checkpoint.model.qformer, models, told)


def agreed(job: Job) -> Job:
    """The main process's teacher and sizes: each process has seen the free memory at another moment."""
    told = [job.teacher, job.closer_images, job.schedule]
    broadcast_object_list(told)
    return replace(job, teacher=told[0], closer_images=told[1], schedule=told[2])


def asked_models(checkpoint: Checkpoint) -> str:
    """Name what the teacher asks besides the encoder: the Q-Former, the language model, the tokenizers, the prompt."""
    return f"{checkpoint.qformer_fingerprint()} {checkpoint.language_fingerprint()}"


def measured(student: Student, drawer: Drawer, kept_apart: Collection[int], job: Job, quiet: bool) -> dict[str, Any]:
    """Settle how much of a budget each question gets, and measure every arm on the images that were kept apart."""
    student.eval()
    rows: dict[bool, list[int]] = {True: [], False: []}
    for row, one in enumerate(drawer.asked):
        rows[one.image in kept_apart].append(row)
    at = measure.settle_particularize(student, drawer, rows[False], job.schedule.seed)
    others = {measure.FIXED: RelevanceAllocator(None)}
    if isinstance(student.reader.qformer, InstructQFormer):
        others[ZERO_SHOT] = RelevanceAllocator(None, zero_shot=QFormerKnowing(student.reader.qformer))
    others = {name: other.to(drawer.device).eval() for name, other in others.items()}
    return measure.report(student, drawer, rows[True], job.threshold, others, quiet) | {"closer_view_at": at}


def chosen_questions(found: Data, store: FeatureStore, job: Job) -> list[Asked]:
    """At most so many questions of each image that can be decoded, evenly over its list."""
    of: dict[int, list[Asked]] = {}
    for one in found.answered if job.teacher == ANSWERS else found.questions:
        if one.image not in store.broken:
            of.setdefault(one.image, []).append(one)
    asked = []
    for image in sorted(of):
        several = of[image]
        number = min(job.questions_an_image, len(several))
        turn = image % len(several)
        asked += [several[(turn + place) % len(several)] for place in range(number)]
    return asked


def drawer_of(drawer: Drawer, rows: Sequence[int]) -> Drawer:
    """A drawer of these questions only."""
    return replace(drawer, asked=[drawer.asked[row] for row in rows], lessons=drawer.lessons.of(rows))


def frozen(job: Job, peers: Peers) -> Checkpoint:
    """The checkpoint, with all weights frozen, and with this process's part of a shared language model."""
    checkpoint = Checkpoint.load(job.checkpoint, language=job.teacher != TOKENS)
    checkpoint.model.requires_grad_(False)
    peers.shard(checkpoint.model.language_model)
    return checkpoint


def looked_nearer(peers: Peers, training: Training, teacher: Teacher, drawer: Drawer, work: Path) -> Drawer:
    """The drawer with answers from nearer, where trained relevance says. A continued training has them already."""
    if training.step == training.schedule.relevance_steps and peers.takes_part:
        relevance = peers.agree(torch.from_numpy(training.student.relevance(drawer))).numpy()
        learned = np.sqrt(relevance / (1 - relevance))  # the odds were learned from the square of importance
        teacher.look_nearer(drawer.asked, drawer.store, drawer.lessons, learned, work)
    training.accelerator.wait_for_everyone()
    return replace(drawer, lessons=drawer.lessons.with_nearer(work))


def publish(
    job: Job, found: Data, store: FeatureStore, student: Student, qformer: nn.Module, models: Adapted,
    told: dict[str, Any],
) -> Adapted:  # fmt: skip
    """Write weights, card, report, plot and the list of what was left out. `models` names what it was made for."""
    save_allocator(student.allocator.cpu(), job.out / WEIGHTS)
    for folder in (job.out, job.work):
        (folder / QFORMER).unlink(missing_ok=True)
    state = FIXED if not told["gains"] else TRAINED if job.teacher == ANSWERS else DISTILLED
    if len(student.adapters):
        weights = {name: weight.half() for name, weight in changed(qformer).items()}
        save_file(weights, (job.work if state == FIXED else job.out) / QFORMER)  # to measure it, or to build with it
    low, high = told["default_vision_tokens"]
    adapted = replace(
        models,
        state=state,
        default_vision_tokens=(low, high),
        closer_view_at=told["closer_view_at"] if student.allocator.closer is not None else 1.0,
        told={
            "teacher": told["teacher"],
            "images": told["data"]["images"],
            "questions": told["data"]["questions"],
            "least_agreement": job.threshold,
            "agreement": told["adaptive"],
        },
    )
    (job.out / REPORT).write_text(json.dumps(told, indent=2) + "\n")
    left_out = found.skipped | {str(found.images[number]): reason for number, reason in store.broken.items()}
    (job.out / SKIPPED).write_text("".join(f"{name}\t{reason}\n" for name, reason in left_out.items()))
    measure.plot(told, job.out / PLOT)
    adapted.write(job.out)  # last: with it the folder is whole
    return adapted


def threads(number: int) -> None:
    torch.set_num_threads(number)
