"""From the last stage's state to a checkpoint that transformers reads."""

from __future__ import annotations

from pathlib import Path

from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.scenes.world import HELD_OUT_PAIRS
from build_engines.train.architecture import new_model, save_checkpoint
from build_engines.train.stages import Plan
from build_engines.train.tokens import new_tokenizer


def publish(plan: Plan) -> Path:
    """Write <out>/checkpoint from the joint stage, weights rounded to FP16."""
    tokenizer = new_tokenizer()
    model = new_model(tokenizer, plan.config(tokenizer))
    participatory = ParticipatoryKnowing(len(tokenizer), model.config.vision_config.hidden_size)
    weights = plan.finished("joint")
    model.load_state_dict(weights["model"])
    participatory.load_state_dict(weights["participatory"])
    card = {
        "training_command": f"python -m build_engines.train --scale {plan.scale:g}",
        "vision_tokens": "trained under random budgets of 64 to 256 vision tokens; a quarter of the images with 256",
        "held_out_pairs": [" ".join(pair) for pair in HELD_OUT_PAIRS],
    }
    directory = plan.out / "checkpoint"
    save_checkpoint(directory, model, participatory, tokenizer, card)
    return directory
