"""Stage `qformer`: each query learns to report the object in its cell.

It trains on stored features of the trained encoder. Participatory knowing starts here too, on the same features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from build_engines.model.allocation import CELL_COUNT, Allocation
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.scenes.questions import TYPES
from build_engines.scenes.world import WIDE, World
from build_engines.train.architecture import new_model
from build_engines.train.course import Course, Measures
from build_engines.train.queries import SlotReadout, allocate, looker, random_relevance, refinements, slot_loss
from build_engines.train.relevance import COUPLED, relevance_loss
from build_engines.train.stages import Plan, device, faster, mixed, muon_and_adam, tensor
from build_engines.train.starting import fit_readout, load_published, said_by
from build_engines.train.store import Seen, Store
from build_engines.train.symbols import SlotTable, slot_tensors
from build_engines.train.tokens import new_tokenizer

STEPS = 1300
BATCH = 32  # per replica
STORED, FRESH = 3000, 6  # scenes kept, and how many of them every step replaces; per replica
START_STORED = 1500  # from a published checkpoint
START_STEPS, START_RATE = 350, 0.4  # from a published checkpoint; the latter of the learning rates
WORLDS = [World(), WIDE, World(fewest=4, most=8, unnamed_share=0.25), replace(WIDE, unnamed_share=0.25), World(), WIDE]


def train_qformer(plan: Plan) -> None:
    torch.manual_seed(3)
    tokenizer = new_tokenizer()
    model = new_model(tokenizer, plan.config(tokenizer))
    model.vision_model.load_state_dict(plan.finished("vision")["encoder"])
    model.to(device()).set_attn_implementation("eager")
    table = SlotTable(model.config.text_config.hidden_size)
    table.load_state_dict(plan.finished("language")["table"])
    table.to(device())
    allocation = Allocation().to(device())
    trained: dict[str, nn.Module] = {
        "qformer": model.qformer,
        "queries": nn.ParameterList([model.query_tokens]),
        "projection": model.language_projection,
        "readout": SlotReadout(model.config.qformer_config.hidden_size),
        "participatory": ParticipatoryKnowing(len(tokenizer), model.config.vision_config.hidden_size),
    }
    rate = START_RATE if plan.start else 1.0
    if plan.start:
        published = plan.published()
        load_published(model, published)
        trained["participatory"].load_state_dict(cast(nn.Module, published.participatory).state_dict())
        fit_readout(cast(SlotReadout, trained["readout"]), said_by(published, plan))
    for module in trained.values():
        module.to(device())
    rest = [model.qformer.layernorm, *list(trained.values())[1:]]
    look = faster(looker(model), plan)
    optimizers = muon_and_adam(
        [model.qformer.encoder],
        [p for module in rest for p in module.parameters()],
        muon=0.01 * rate,
        adam=1.5e-3 * rate,
    )
    decay = 1.0 if plan.start else 0.35
    course = Course(
        plan, "qformer", plan.steps(START_STEPS if plan.start else STEPS), trained, optimizers, decay_share=decay
    )
    course.resume()
    if course.finished:
        return

    store = Store(
        model.vision_model, plan, WORLDS, plan.size(START_STORED if plan.start else STORED, 8), plan.size(FRESH, 4)
    )
    number = plan.size(BATCH, 8)

    def report(rng: np.random.Generator, batch: Seen, refined: Tensor) -> tuple[Tensor, Measures]:
        features = batch.features.float()
        tokens, mask = allocate(allocation, features, random_relevance(rng, batch.coverage), refined)
        with mixed():
            seen = look(model.query_tokens.expand(len(tokens), -1, -1), tokens, mask).float()
        slots = slot_tensors(batch.scenes)
        loss, measures = slot_loss(trained["readout"](seen), slots)
        target = table(*slots).detach()
        # There are many empty slots, and all are alike.
        weight = torch.where(slots[2], 4.0, 1.0)[..., None] / target.var()
        error = ((model.language_projection(seen) - target).square() * weight).mean()
        questions = batch.ask(rng, dict.fromkeys(TYPES, 1.0), COUPLED)
        coupling, _, coupled = relevance_loss(
            trained["participatory"], tokenizer, rng, features, batch.coverage, questions
        )
        return loss + 3.0 * error + 2.0 * coupling, {**measures, **coupled, "projection": error.item()}

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        yield report(rng, store.draw(rng, number), refinements(rng, number))

    @torch.no_grad()
    def validate() -> Measures:
        measures: Measures = {}
        everything = tensor(np.full((number, 1), CELL_COUNT, np.float32))
        for name, world in {"new": World(), "pairs": World(held_out=True), "wide": WIDE}.items():
            rng = np.random.default_rng(79)
            rows = [report(rng, store.encode(rng, number, [world]), everything)[1] for _ in range(4)]
            measures |= {f"{name}_{key}": round(float(np.mean([row[key] for row in rows])), 3) for key in rows[0]}
        return measures

    course.run(losses, validate, validate_every=100)
