"""Go on from a published checkpoint (`--start`).

A checkpoint holds what answers questions. The readouts that only training uses are not published; they are fitted anew
here, to what the checkpoint makes of scenes that it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration

from build_engines.model.checkpoint import Checkpoint
from build_engines.scenes.world import World
from build_engines.train.queries import SlotReadout, slot_loss
from build_engines.train.stages import Plan
from build_engines.train.symbols import SlotTable, slot_tensors
from build_engines.train.vision import draw_views, normalised

SCENES, AT_ONCE = 640, 32
STEPS, RATE = 400, 1e-2

Slots = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Said:
    """Slots of known scenes, the Q-Former's outputs about them [N, 32, D], and their visual tokens [N, 32, H]."""

    slots: Slots
    outputs: Tensor
    prefixes: Tensor


@torch.no_grad()
def said_by(published: Checkpoint, plan: Plan) -> Said:
    """Run the checkpoint over scenes of the plain renderer, with all vision tokens."""
    rng, model = np.random.default_rng(8), published.model
    scenes, outputs = [], []
    for _ in range(plan.size(SCENES, 8) // plan.size(AT_ONCE, 8)):
        views = draw_views(rng, plan.size(AT_ONCE, 8), [World()], 0.5)
        features = model.vision_model(pixel_values=normalised(views.pixels).cpu()).last_hidden_state
        queries = model.query_tokens.expand(len(features), -1, -1)
        outputs.append(model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state)
        scenes += views.scenes
    told = torch.cat(outputs)
    slots = slot_tensors(scenes)
    return Said((slots[0].cpu(), slots[1].cpu(), slots[2].cpu()), told, model.language_projection(told))


def load_published(model: Blip2ForConditionalGeneration, published: Checkpoint) -> None:
    """Load the Q-Former, its queries and the projection. Encoder and language model come from their own stages."""
    model.qformer.load_state_dict(published.model.qformer.state_dict())
    model.language_projection.load_state_dict(published.model.language_projection.state_dict())
    model.query_tokens.data.copy_(published.model.query_tokens.data)


def fit_table(table: SlotTable, said: Said) -> None:
    """Fit the symbols' vectors to the checkpoint's visual tokens, in place and on the CPU."""
    place = next(table.parameters()).device
    table.cpu()
    weight = torch.where(said.slots[2], 4.0, 1.0)[..., None]

    def error() -> Tensor:
        missed: Tensor = ((table(*said.slots) - said.prefixes).square() * weight).mean()
        return missed

    _fit(table, error)
    table.to(place)


def fit_readout(readout: SlotReadout, said: Said) -> None:
    """Fit the slots' readout to the checkpoint's outputs, in place and on the CPU."""
    _fit(readout, lambda: slot_loss(readout(said.outputs), said.slots)[0])


def _fit(module: nn.Module, loss: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=RATE)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
