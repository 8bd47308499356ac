"""Decide how to adapt, and refuse what cannot work, from the checkpoint's small files."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace

from build_engines.adapt import data, estimate
from build_engines.adapt.data import Data
from build_engines.adapt.estimate import Needs, Work
from build_engines.adapt.run import JOB, Job
from build_engines.adapt.teacher import ANSWERS, LIKELIHOOD, TOKENS
from build_engines.adapt.train import LARGE, UNIFORM, Schedule
from build_engines.convert.inspection import inspect
from build_engines.convert.options import Refused
from service.media.decoder import ImageLimits

CLOSER_SHARE_OF_A_STEP = 0.5
ASKED_A_STEP = 3  # most questions about an image in one step: more images teach more than more questions


def planned(options: argparse.Namespace, found: Data) -> tuple[Job, Needs, str]:
    """The job, what it needs, and the checkpoint's name. Raises Refused."""
    source = inspect(options.checkpoint)
    if source.is_idefics:
        raise Refused(
            f"{source.name} is an IDEFICS, which `glimpse adapt` cannot adapt: build it with its fixed allocator"
        )
    if options.teacher == ANSWERS and not found.answered:
        raise Refused(f"--teacher answers needs answers, and {options.data} has none: use --teacher likelihood")
    if source.is_encoder_decoder and options.teacher in (LIKELIHOOD, ANSWERS):
        raise Refused(
            f"--teacher {options.teacher} needs a decoder-only language model, and {source.name} has a FlanT5: use "
            "--teacher tokens"
        )
    data.measured(found, found.answered if options.teacher == ANSWERS else found.questions, options.seed)
    closer = int(options.closer_share * len(found.images))
    near = max(1, round(CLOSER_SHARE_OF_A_STEP * options.batch)) if closer else 0
    schedule = Schedule(
        steps=options.steps,
        relevance_steps=2 * options.steps,
        images=max(1, options.batch - near),
        asked=min(options.questions, ASKED_A_STEP),
        closer_images=near,
        map_images=3 * options.batch,
        thirds=LARGE if options.large_budgets else UNIFORM,
        seed=options.seed,
        checkpoint_s=options.checkpoint_s,
    )
    questions = min(len(found.questions), options.questions * len(found.images))
    work = Work(
        len(found.images), closer, questions, source.vision_width, schedule, options.teacher != TOKENS,
        dict(source.parameters), source.hidden_size, source.language_layers,
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")), options.shard_llm,
    )  # fmt: skip
    flops = estimate.speed()
    wanted = estimate.needs(work, flops)
    teacher = options.teacher
    if teacher == "auto":
        teacher = TOKENS if source.is_encoder_decoder else _automatic(options, wanted)
        if teacher == TOKENS:
            wanted = estimate.needs(replace(work, language=False), flops)
    if options.shard_llm and teacher == TOKENS:
        raise Refused(
            f"--shard-llm shares the language model, and {source.name} can only be adapted by --teacher tokens, which "
            "leaves it out: leave --shard-llm out"
        )
    if teacher == TOKENS and closer:  # the full view's tokens say nothing about a closer one
        closer, schedule = 0, replace(schedule, images=options.batch, closer_images=0)
        wanted = estimate.needs(replace(work, language=False, closer=0, schedule=schedule), flops)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # before the others load, which need some of it
        estimate.check(wanted, options.out)
    job = Job(
        source.directory, options.out, teacher, schedule, options.questions, closer, options.least_agreement,
        ImageLimits(), options.lora_rank, options.shard_llm,
    )  # fmt: skip
    return job, wanted, source.name


def _automatic(options: argparse.Namespace, wanted: Needs) -> str:
    """The teacher of an earlier start in this folder, else the best one that there is memory for.

    Memory differs from start to start, and another teacher would begin anew.
    """
    if options.shard_llm:  # all processes must decide alike
        return LIKELIHOOD
    try:
        kept = json.loads((options.out / "work" / JOB).read_text())["teacher"]
    except (OSError, ValueError, KeyError, TypeError):
        kept = None
    return kept if kept in (LIKELIHOOD, TOKENS) else LIKELIHOOD if estimate.fits(wanted) else TOKENS
