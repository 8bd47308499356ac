"""Stage `joint`: train Q-Former and decoder on answers, with the finished encoder.

Budgets are random. The decoder has a low learning rate and the slots' losses stay on. Both keep what was learned from
symbols, which transfers to colour-shape pairs never seen. (One run with the encoder in training and a high decoder rate
lost about six points on held-out pairs.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration

from build_engines.model.allocation import CELL_COUNT, Allocation
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.scenes.questions import DESCRIBE, TYPES, Question
from build_engines.scenes.world import WIDE, World
from build_engines.train.architecture import new_model
from build_engines.train.course import Course, Measures
from build_engines.train.language import answer_loss, decoder_of
from build_engines.train.packing import Packer
from build_engines.train.queries import SlotReadout, allocate, looker, random_relevance, refinements, slot_loss
from build_engines.train.relevance import relevance_loss
from build_engines.train.stages import Plan, device, faster, mixed, muon_and_adam, tensor
from build_engines.train.store import Seen, Store
from build_engines.train.symbols import SlotTable, slot_tensors
from build_engines.train.tokens import new_tokenizer

STEPS = 900
BATCH = 24  # per replica
STORED, FRESH = 3000, 6  # per replica
START_STORED = 1500  # from a published checkpoint
TEXT_TOKENS = 160  # per image: about eight questions
WEIGHTS = {
    "colour": 0.7,
    "shape": 1.2,
    "count": 3.5,
    "exist": 1.5,
    "relation": 1.0,
    "size": 0.8,
    "read": 0.8,
    DESCRIBE: 0.2,
}
START_STEPS, START_RATE = 300, 0.6  # from a published checkpoint; the latter of the learning rates
WORLDS = [World(), WIDE, World(unnamed_share=0.4), WIDE, World(), replace(WIDE, unnamed_share=0.4)]


class Joint:
    """The chain and its parts used only in training."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(4)
        self.tokenizer = new_tokenizer()
        self.model: Blip2ForConditionalGeneration = new_model(self.tokenizer, plan.config(self.tokenizer))
        width = self.model.config.vision_config.hidden_size
        self.participatory = ParticipatoryKnowing(len(self.tokenizer), width)
        self.readout = SlotReadout(self.model.config.qformer_config.hidden_size)
        self.table = SlotTable(self.model.config.text_config.hidden_size)
        for module in (*self.modules.values(), self.table):
            module.to(device())
        self.model.set_attn_implementation("eager")
        self.allocation = Allocation().to(device())
        self.packer = Packer(self.tokenizer, plan.size(TEXT_TOKENS, 96))
        self._look = faster(looker(self.model), plan)
        self._decode = faster(decoder_of(self.model.language_model), plan)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model, "participatory": self.participatory, "readout": self.readout}

    def start_from(self, plan: Plan) -> None:
        """Load the weights of the earlier stages."""
        vision, language, qformer = (plan.finished(stage) for stage in ("vision", "language", "qformer"))
        self.model.vision_model.load_state_dict(vision["encoder"])
        self.model.language_model.load_state_dict(language["language"])
        self.table.load_state_dict(language["table"])
        self.model.qformer.load_state_dict(qformer["qformer"])
        self.model.query_tokens.data.copy_(qformer["queries"]["0"])
        self.model.language_projection.load_state_dict(qformer["projection"])
        self.readout.load_state_dict(qformer["readout"])
        self.participatory.load_state_dict(qformer["participatory"])

    def look(self, features: Tensor, relevance: Tensor, refined: Tensor) -> Tensor:
        """The Q-Former's outputs [B, 32, D] float32, over the tokens chosen by relevance [B, 256]."""
        tokens, mask = allocate(self.allocation, features, relevance, refined)
        with mixed():
            seen: Tensor = self._look(self.model.query_tokens.expand(len(tokens), -1, -1), tokens, mask)
        return seen.float()

    def answer(
        self, prefix: Tensor, questions: list[list[Question]]
    ) -> tuple[Tensor, dict[str, float], dict[str, int]]:
        """As `answer_loss`."""
        with mixed():
            return answer_loss(self.model.language_model, self._decode, prefix, self.packer.pack(questions))

    def optimizers(self, rate: float) -> list[torch.optim.Optimizer]:
        """Train the Q-Former, the decoder at a fifth of its rate, and not the encoder."""
        model, decoder = self.model, self.model.language_model.model.decoder
        seeing = [model.qformer.layernorm, model.language_projection, self.readout, self.participatory]
        saying = [decoder.embed_tokens, decoder.embed_positions, decoder.final_layer_norm]
        return [
            *muon_and_adam(
                [model.qformer.encoder],
                [model.query_tokens, *(p for module in seeing for p in module.parameters())],
                muon=0.005 * rate,
                adam=6e-4 * rate,
            ),
            *muon_and_adam(
                [decoder.layers],
                [p for module in saying for p in module.parameters()],
                muon=0.001 * rate,
                adam=1e-4 * rate,
            ),
        ]


def train_joint(plan: Plan) -> None:
    joint = Joint(plan)
    joint.start_from(plan)
    optimizers = joint.optimizers(START_RATE if plan.start else 1.0)
    course = Course(
        plan, "joint", plan.steps(START_STEPS if plan.start else STEPS), joint.modules, optimizers, decay_share=0.7
    )
    course.resume()
    if course.finished:
        return
    store = Store(
        joint.model.vision_model,
        plan,
        WORLDS,
        plan.size(START_STORED if plan.start else STORED, 8),
        plan.size(FRESH, 4),
    )
    number = plan.size(BATCH, 4)

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        batch = store.draw(rng, number)
        features, questions = batch.features.float(), batch.ask(rng, WEIGHTS, 10)
        coupling, asked_for, coupled = relevance_loss(
            joint.participatory, joint.tokenizer, rng, features, batch.coverage, questions
        )
        guided = tensor(rng.random((number, 1)) < 0.5) & (asked_for.amax(1, keepdim=True) > 0)
        relevance = torch.where(guided, asked_for, random_relevance(rng, batch.coverage))
        outputs = joint.look(features, relevance, refinements(rng, number))
        slots = slot_tensors(batch.scenes)
        reported, read = slot_loss(joint.readout(outputs), slots)
        prefix, target = joint.model.language_projection(outputs), joint.table(*slots).detach()
        error = ((prefix - target).square() * torch.where(slots[2], 4.0, 1.0)[..., None] / target.var()).mean()
        answers, right, asked = joint.answer(prefix, questions)
        measures = {kind: right[kind] / asked[kind] for kind in asked} | read | coupled
        yield (
            answers + 0.2 * reported + 0.3 * error + coupling,
            {**measures, "answers": answers.item(), "projection": error.item()},
        )

    @torch.no_grad()
    def validate() -> Measures:
        measures: Measures = {}
        for name, world in {"new": World(), "pairs": World(held_out=True), "wide": WIDE}.items():
            rng, right, asked = np.random.default_rng(80), Counter[str](), Counter[str]()
            for _ in range(plan.size(8, 1)):
                batch: Seen = store.encode(rng, number, [world])
                features = batch.features.float()
                outputs = joint.look(
                    features, features.new_zeros(number, 256), features.new_full((number, 1), CELL_COUNT)
                )
                questions = batch.ask(rng, dict.fromkeys((*TYPES, DESCRIBE), 1.0), 10)
                _, r, n = joint.answer(joint.model.language_projection(outputs), questions)
                right.update(r)
                asked.update(n)
            measures |= {f"{name}_{kind}": round(right[kind] / asked[kind], 3) for kind in sorted(asked)}
            kinds = [kind for kind in asked if kind != DESCRIBE]
            measures[f"{name}_all"] = round(sum(right[kind] / asked[kind] for kind in kinds) / len(kinds), 4)
        return measures

    course.run(losses, validate, validate_every=100)
