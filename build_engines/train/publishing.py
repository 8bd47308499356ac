"""Publish the last stage's state as a checkpoint that transformers can load."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import Blip2ForConditionalGeneration, OPTForCausalLM

from build_engines.calibration.checkpoint import calibrate_checkpoint, calibrate_several
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.checkpoint import CLIP, CLIP_LANGUAGE, save_clip, save_clip_language
from build_engines.model.clip import ClipResampler
from build_engines.model.closer import CloserView
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.model.qformer import QFormer
from build_engines.scenes.held_out import NEW, SMALL
from build_engines.scenes.world import HELD_OUT_PAIRS
from build_engines.train.adapters import merged
from build_engines.train.architecture import new_model, save_checkpoint
from build_engines.train.evaluation import Answers, Arm, Chain, answer, committed_report, held_out_exam
from build_engines.train.stages import Plan
from build_engines.train.tokens import new_tokenizer

CALIBRATION_FROM = 200_000  # held-out scenes that nothing else uses
CALIBRATION_SCENES = 150
TOLD = {
    "joint": {"vision_tokens": "trained under random budgets of 64 to 256 vision tokens; a quarter with 256"},
    "allocator": {
        "vision_tokens": "trained under random budgets of 64 to 256 vision tokens, to 400 with the closer view, "
        "each way of choosing them in equal shares",
        "visual_tokens": [32, 128],
        "default_visual_tokens": [32, 32],
    },
}

# What GET /v1/models tells callers about the scenes of build_engines/scenes.
KNOWS = (
    "Generated scenes of a few coloured shapes on a plain or patterned ground. The shapes are circles, squares, "
    "triangles, stars, crosses and rings in eight colours and three sizes. Some carry a letter or a digit. "
    "Questions can be about colour, shape, size, number, position and the character. It knows nothing else: an answer "
    "about a photograph means nothing."
)

KNOWS_CLIPS = (
    "Clips of such scenes, in which objects move, appear, vanish or change their colour, and questions what happened. "
    "Two to four such images can be compared."
)


class Parts(NamedTuple):
    """What a stage leaves that answers questions. The last two are only of the stage `clips`."""

    model: Blip2ForConditionalGeneration
    allocator: RelevanceAllocator
    clip: ClipResampler | None = None
    clip_language: OPTForCausalLM | None = None


def publish(plan: Plan, stage: str) -> Path:
    """Write <out>/checkpoint from a stage that leaves a whole model, in FP16, with its accuracy and calibration.

    The stage `clips` changes nothing for questions about one image. What was measured of these stays as it was, and
    only answers about clips and several images are calibrated.
    """
    directory = plan.out / "checkpoint"
    if stage == "clips":
        if goes_on(plan):
            shutil.copytree(plan.published().directory, directory, dirs_exist_ok=True)
        else:
            publish(plan, "allocator")
        add_clips(directory, finished_parts(plan, stage))
        if not plan.tiny:
            calibrate_several(directory)
        return directory
    tokenizer = new_tokenizer()
    parts = finished_parts(plan, stage)
    card: dict[str, Any] = {
        "knows": KNOWS,
        "training_command": f"python -m build_engines.train --scale {plan.scale:g}"
        + (f" --start {plan.start.name}" if plan.start else ""),
        "held_out_pairs": [" ".join(pair) for pair in HELD_OUT_PAIRS],
    }
    save_checkpoint(directory, parts.model, parts.allocator, tokenizer, card | TOLD[stage])
    chain = Chain.load(directory)
    if parts.allocator.closer is not None:
        tell(directory, {"closer_view_at": closer_view_at(chain, plan.size(CALIBRATION_SCENES, 2))})
    tell(directory, {"accuracy_in_pytorch": committed_report(chain, 2 if plan.tiny else None)})
    if not plan.tiny:
        calibrate_checkpoint(directory)
    return directory


def add_clips(directory: Path, parts: Parts) -> None:
    """Write what the stage `clips` left into a checkpoint, and tell its card."""
    counted = json.loads((directory / "model_card.json").read_text())["parameters"]
    for name, part, save in (
        (CLIP, parts.clip, save_clip),
        (CLIP_LANGUAGE, parts.clip_language, save_clip_language),
    ):
        save(part, directory / name)
        counted[Path(name).stem] = sum(p.numel() for p in part.parameters())
    tell(directory, {"knows_clips": KNOWS_CLIPS, "parameters": counted})


def finished_parts(plan: Plan, stage: str) -> Parts:
    """What the stage `joint`, `allocator` or `clips` left."""
    if stage == "clips":
        parts, weights = parts_before_clips(plan), plan.finished(stage)
        clip, language = ClipResampler(QFormer(parts.model)), copy.deepcopy(parts.model.language_model)
        clip.load_state_dict(weights["resampler"])
        language.load_state_dict(weights["language"])
        return parts._replace(clip=clip, clip_language=language)
    tokenizer = new_tokenizer()
    model = new_model(tokenizer, plan.config(tokenizer))
    width = model.config.vision_config.hidden_size
    participatory, weights = ParticipatoryKnowing(len(tokenizer), width), plan.finished(stage)
    model.load_state_dict(merged(weights["model"]))
    participatory.load_state_dict(weights["participatory"])
    if stage == "joint":
        return Parts(model, RelevanceAllocator(participatory))
    balancing, closer = OpponentProcessing(participatory.coupling_width), CloserView(width)
    balancing.load_state_dict(weights["balancing"])
    closer.load_state_dict(weights["closer"])
    return Parts(model, RelevanceAllocator(participatory, balancing, closer))


def parts_before_clips(plan: Plan) -> Parts:
    """What the stage `clips` starts from: the stage `allocator`, or the published checkpoint if that was not run.

    Raises FileNotFoundError without either.
    """
    if not goes_on(plan):
        return finished_parts(plan, "allocator")
    published = plan.published()
    return Parts(published.model, published.allocator(), published.clip, published.clip_language)


def goes_on(plan: Plan) -> bool:
    """Whether the stage `clips` starts from the published checkpoint."""
    return plan.start is not None and not (plan.out / "allocator.pt").exists()


def tell(directory: Path, facts: dict[str, Any]) -> None:
    """Add facts to the checkpoint's card."""
    path = directory / "model_card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts, indent=2) + "\n")


def closer_view_at(chain: Chain, scenes: int) -> float:
    """The particularize value from which `auto` uses the closer view.

    At this value, the share of small-print reading questions at or above it exceeds that of all other questions by the
    most (Youden 1950).
    """
    small, plain = (
        answer(chain, held_out_exam(chain, split, scenes, first=CALIBRATION_FROM), Arm()) for split in (SMALL, NEW)
    )
    reading, others = wanting_and_not(small, plain)
    if not len(reading) or not len(others):
        return 1.0
    candidates = np.unique(np.concatenate([reading, others]))
    gains = [float((reading >= at).mean() - (others >= at).mean()) for at in candidates]
    return round(float(candidates[int(np.argmax(gains))]), 3)


def wanting_and_not(small: Answers, plain: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Particularize of reading questions about small print, and of all other questions."""
    reading = small.types == "read"
    return small.tensions[reading, 0], np.concatenate([small.tensions[~reading, 0], plain.tensions[:, 0]])
