"""Stage `qformer`: each query learns to report the object in its cell, on stored features of the trained encoder."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from build_engines.model.allocation import Allocation
from build_engines.scenes.world import Thing, World
from build_engines.train.architecture import new_model
from build_engines.train.course import Course, Measures
from build_engines.train.queries import (
    SlotReadout,
    allocate,
    looker,
    random_relevance,
    refinements,
    slot_loss,
)
from build_engines.train.stages import Plan, device, faster, mixed, muon_and_adam, tensor
from build_engines.train.symbols import SlotTable, slot_tensors
from build_engines.train.tokens import new_tokenizer
from build_engines.train.vision import draw_views, normalised

STEPS = 1600
BATCH = 48
STORED, FRESH = 5000, 8  # scenes kept, and how many of them every step replaces
WORLDS = [World(), World(), World(fewest=4, most=8, unnamed_share=0.25)]


def train_qformer(plan: Plan) -> None:
    torch.manual_seed(3)
    tokenizer = new_tokenizer()
    model = new_model(tokenizer, plan.config(tokenizer))
    model.vision_model.load_state_dict(plan.finished("vision")["encoder"])
    table = SlotTable(model.config.text_config.hidden_size)
    table.load_state_dict(plan.finished("language")["table"])
    table.to(device())
    model.to(device()).set_attn_implementation("eager")
    allocation = Allocation().to(device())
    readout = SlotReadout(model.config.qformer_config.hidden_size).to(device())
    see = faster(lambda pixels: model.vision_model(pixel_values=pixels).last_hidden_state, plan)
    look = faster(looker(model), plan)
    queries = torch.nn.ParameterList([model.query_tokens])
    course = Course(
        plan.out,
        "qformer",
        plan.steps(STEPS),
        {"qformer": model.qformer, "queries": queries, "projection": model.language_projection, "readout": readout},
        muon_and_adam(
            [model.qformer.encoder],
            [
                *model.qformer.layernorm.parameters(),
                *queries,
                *model.language_projection.parameters(),
                *readout.parameters(),
            ],
            muon=0.01,
            adam=1.5e-3,
        ),
    )
    course.resume()
    if course.finished:
        return

    @torch.no_grad()
    def encoded(
        rng: np.random.Generator, number: int, worlds: list[World]
    ) -> tuple[Tensor, list[list[Thing]], list[np.ndarray]]:
        views = draw_views(rng, number, worlds, 0.5)
        with mixed():
            return see(normalised(views.pixels)).bfloat16(), views.scenes, views.coverage

    def answer(
        rng: np.random.Generator,
        features: Tensor,
        scenes: list[list[Thing]],
        coverage: list[np.ndarray],
        refined: Tensor,
    ) -> tuple[Tensor, Measures]:
        tokens, mask = allocate(allocation, features.float(), random_relevance(rng, coverage), refined)
        with mixed():
            seen = look(model.query_tokens.expand(len(tokens), -1, -1), tokens, mask).float()
        slots = slot_tensors(scenes)
        loss, measures = slot_loss(readout(seen), slots)
        target = table(*slots).detach()
        # Empty slots are many and all alike.
        weight = torch.where(slots[2], 4.0, 1.0)[..., None] / target.var()
        error = ((model.language_projection(seen) - target).square() * weight).mean()
        return loss + 3.0 * error, {**measures, "projection": error.item()}

    stored = plan.size(STORED, FRESH * 2)
    filler = np.random.default_rng((3, 3))
    parts = [encoded(filler, FRESH, WORLDS) for _ in tqdm(range(stored // FRESH), desc="features", mininterval=5.0)]
    features = torch.cat([part[0] for part in parts])
    scenes = [things for part in parts for things in part[1]]
    coverage = [shares for part in parts for shares in part[2]]

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        start = course.step * FRESH % (len(scenes) // FRESH * FRESH)
        features[start : start + FRESH], scenes[start : start + FRESH], coverage[start : start + FRESH] = encoded(
            rng, FRESH, WORLDS
        )
        chosen = rng.choice(len(scenes), plan.size(BATCH, 8), replace=False)
        yield answer(
            rng,
            features[chosen],
            [scenes[i] for i in chosen],
            [coverage[i] for i in chosen],
            refinements(rng, len(chosen)),
        )

    @torch.no_grad()
    def validate() -> Measures:
        measures: Measures = {}
        for name, world in {"new": World(), "pairs": World(held_out=True)}.items():
            rng = np.random.default_rng(79)
            number = plan.size(BATCH, 8)
            rows = [
                answer(rng, *encoded(rng, number, [world]), tensor(np.full((number, 1), 64, np.float32)))[1]
                for _ in range(3)
            ]
            measures |= {f"{name}_{key}": round(float(np.mean([row[key] for row in rows])), 3) for key in rows[0]}
        return measures

    course.run(losses, validate, validate_every=100)
