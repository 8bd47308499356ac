"""Stage `vision`: train the encoder alone, with a temporary readout at every patch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from build_engines.scenes.world import WIDE, World
from build_engines.train.architecture import new_model
from build_engines.train.course import Course, Measures
from build_engines.train.stages import Plan, device, faster, mixed, muon_and_adam
from build_engines.train.tokens import new_tokenizer
from build_engines.train.vision import (
    WANDERING,
    Curriculum,
    Perception,
    draw_views,
    normalised,
    perception_loss,
)

STEPS = 1500
BATCH, MICRO_BATCH = 32, 16
FROZEN_STEPS = 100  # from a published checkpoint
START_STEPS, START_RATE = 960, 0.3  # from a published checkpoint; the latter of the learning rates
VALIDATION_SEED = 77


def train_vision(plan: Plan) -> None:
    torch.manual_seed(1)
    tokenizer = new_tokenizer()
    encoder = new_model(tokenizer, plan.config(tokenizer)).vision_model.to(device())
    encoder.set_attn_implementation("eager")  # twice as fast backwards on a CPU
    state, rate = {"jitter": 1.0, "shape": 0.0}, 1.0
    if plan.start:
        encoder.load_state_dict(plan.published().model.vision_model.state_dict())
        state, rate = {"jitter": WANDERING, "shape": 1.0}, START_RATE
    perception = Perception(encoder.config.hidden_size).to(device())
    others = [*encoder.embeddings.parameters(), *encoder.post_layernorm.parameters()]
    see = faster(lambda pixels: encoder(pixel_values=pixels).last_hidden_state, plan)
    course = Course(
        plan,
        "vision",
        plan.steps(START_STEPS if plan.start else STEPS),
        {"encoder": encoder, "perception": perception},
        [
            *muon_and_adam([encoder.encoder], others, muon=0.02 * rate, adam=2e-3 * rate),
            torch.optim.AdamW(perception.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
        ],
        state=state,
        decay_share=1.0 if plan.start else 0.35,
    )
    course.resume()
    batch, micro = plan.size(BATCH, 4), plan.size(MICRO_BATCH, 4)

    def look(pixels: Tensor) -> dict[str, Tensor]:
        frozen = plan.start is not None and course.step < FROZEN_STEPS  # the readout is new, the encoder is not
        with mixed(), torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = see(normalised(pixels))
        return perception(features[:, 1:].float())

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        curriculum = Curriculum(**course.state)
        compressed_share = 0.4 if curriculum.jitter >= WANDERING else 0.0
        for _ in range(batch // micro):
            views = draw_views(rng, micro, curriculum.worlds(), compressed_share)
            loss, measures = perception_loss(look(views.pixels), views.labels)
            curriculum.observe(measures["shape"])
            yield loss / (batch // micro), measures
        course.state = {"jitter": curriculum.jitter, "shape": curriculum.shape}

    @torch.no_grad()
    def validate() -> Measures:
        rng = np.random.default_rng(VALIDATION_SEED)
        seen: dict[str, list[float]] = {}
        for kind, world in {"new": World(), "pairs": World(held_out=True), "wide": WIDE}.items():
            for _ in range(plan.size(6, 1)):
                views = draw_views(rng, micro, [world], 1.0)
                for name, value in perception_loss(look(views.pixels), views.labels)[1].items():
                    seen.setdefault(f"{kind}_{name}", []).append(value)
        return {name: round(float(np.mean(values)), 3) for name, values in seen.items()}

    course.run(losses, validate, validate_every=100)
