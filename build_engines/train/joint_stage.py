"""Stage `joint`: the whole chain on answers, under random budgets, with the earlier stages' losses kept beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from build_engines.model.allocation import Allocation
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.scenes.questions import DESCRIBE, TYPES
from build_engines.scenes.world import NONE, World
from build_engines.train.architecture import new_model
from build_engines.train.course import Course, Measures
from build_engines.train.language import answer_loss, decoder_of
from build_engines.train.language_stage import draw_questions
from build_engines.train.packing import Packer
from build_engines.train.queries import (
    SlotReadout,
    allocate,
    looker,
    random_relevance,
    refinements,
    slot_loss,
)
from build_engines.train.relevance import relevance_loss
from build_engines.train.stages import Plan, device, faster, mixed, muon_and_adam, tensor
from build_engines.train.symbols import slot_tensors
from build_engines.train.tokens import new_tokenizer
from build_engines.train.vision import Perception, draw_views, normalised, perception_loss

STEPS = 1500
BATCH, MICRO_BATCH = 16, 16  # per replica
WEIGHTS = {
    "colour": 0.8,
    "shape": 1.2,
    "count": 2.2,
    "exist": 1.2,
    "relation": 1.5,
    "size": 1.3,
    "read": 1.5,
    DESCRIBE: 0.25,
}
WORLDS = [World(), World(), World(), World(fewest=5, most=10, unnamed_share=0.25, character_share=0.7)]
TEXT_TOKENS = 176  # per image: about nine questions


class Joint:
    """The chain and its training-only parts."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(4)
        self.tokenizer = new_tokenizer()
        self.model = new_model(self.tokenizer, plan.config(self.tokenizer))
        width = self.model.config.vision_config.hidden_size
        self.participatory = ParticipatoryKnowing(len(self.tokenizer), width)
        self.perception = Perception(width)
        self.readout = SlotReadout(self.model.config.qformer_config.hidden_size)
        for module in self.modules.values():
            module.to(device())
        self.model.set_attn_implementation("eager")
        self.allocation = Allocation().to(device())
        self.packer = Packer(self.tokenizer, TEXT_TOKENS)
        self._see = faster(lambda pixels: self.model.vision_model(pixel_values=pixels).last_hidden_state, plan)
        self._look = faster(looker(self.model), plan)
        self.decode = faster(decoder_of(self.model.language_model), plan)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {
            "model": self.model,
            "participatory": self.participatory,
            "perception": self.perception,
            "readout": self.readout,
        }

    def start_from(self, plan: Plan) -> None:
        """The weights that the earlier stages left."""
        vision, language, qformer = (plan.finished(stage) for stage in ("vision", "language", "qformer"))
        self.model.vision_model.load_state_dict(vision["encoder"])
        self.perception.load_state_dict(vision["perception"])
        self.model.language_model.load_state_dict(language["language"])
        self.model.qformer.load_state_dict(qformer["qformer"])
        self.model.query_tokens.data.copy_(qformer["queries"]["0"])
        self.model.language_projection.load_state_dict(qformer["projection"])
        self.readout.load_state_dict(qformer["readout"])
        self.participatory.load_state_dict(qformer["participatory"])

    def see(self, pixels: Tensor) -> Tensor:
        """[B, 224, 224, 3] uint8 -> features [B, 257, D] float32."""
        with mixed():
            features: Tensor = self._see(normalised(pixels))
        return features.float()

    def look(self, features: Tensor, relevance: Tensor, refined: Tensor) -> Tensor:
        """The Q-Former's outputs [B, 32, D] float32, over the tokens that the relevance [B, 256] chooses."""
        tokens, mask = allocate(self.allocation, features, relevance, refined)
        with mixed():
            seen: Tensor = self._look(self.model.query_tokens.expand(len(tokens), -1, -1), tokens, mask)
        return seen.float()


def train_joint(plan: Plan) -> None:
    joint = Joint(plan)
    model = joint.model
    rest = [model.qformer.layernorm, model.language_projection, joint.readout, joint.perception, joint.participatory]
    course = Course(
        plan.out,
        "joint",
        plan.steps(STEPS),
        joint.modules,
        joint_optimizers(joint, rest),
        decay_share=0.6,
    )
    if not course.resume():
        joint.start_from(plan)

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        micro = plan.size(MICRO_BATCH, 4)
        parts = plan.size(BATCH, 4) // micro
        for _ in range(parts):
            views = draw_views(rng, micro, WORLDS, 0.6)
            unnamed = [any(t.colour == NONE for t in things) for things in views.scenes]
            questions = [
                [] if odd else draw_questions(rng, things, WEIGHTS, 12, loosely=True)
                for odd, things in zip(unnamed, views.scenes, strict=True)
            ]
            features = joint.see(views.pixels)
            patch_loss, seen = perception_loss(joint.perception(features[:, 1:]), views.labels)
            coupling, asked_for, coupled = relevance_loss(
                joint.participatory, joint.tokenizer, rng, features, views.coverage, questions
            )
            relevance = random_relevance(rng, views.coverage)
            guided = tensor((rng.random(micro) < 0.5) & ~np.array(unnamed))
            relevance = torch.where(guided[:, None], asked_for, relevance)
            outputs = joint.look(features, relevance, refinements(rng, micro))
            slots, read = slot_loss(joint.readout(outputs), slot_tensors(views.scenes))
            with mixed():
                answers, right, number = answer_loss(
                    model.language_model, joint.decode, model.language_projection(outputs), joint.packer.pack(questions)
                )
            loss = answers + 0.15 * patch_loss + 0.15 * slots + coupling
            measures = {kind: right[kind] / number[kind] for kind in number}
            measures |= {f"patch_{name}": value for name, value in seen.items()} | read | coupled
            yield loss / parts, {**measures, "answers": answers.item()}

    @torch.no_grad()
    def validate() -> Measures:
        measures: Measures = {}
        number_of_views = plan.size(16, 4)
        for name, world in {"new": World(), "pairs": World(held_out=True)}.items():
            rng, right, number = np.random.default_rng(80), Counter[str](), Counter[str]()
            for _ in range(plan.size(8, 1)):
                views = draw_views(rng, number_of_views, [world], 1.0)
                questions = [draw_questions(rng, t, dict.fromkeys((*TYPES, DESCRIBE), 1.0), 16) for t in views.scenes]
                features = joint.see(views.pixels)
                outputs = joint.look(
                    features, features.new_zeros(number_of_views, 256), features.new_full((number_of_views, 1), 64.0)
                )
                with mixed():
                    _, r, n = answer_loss(
                        model.language_model,
                        joint.decode,
                        model.language_projection(outputs),
                        joint.packer.pack(questions),
                    )
                right.update(r)
                number.update(n)
            measures |= {f"{name}_{kind}": round(right[kind] / number[kind], 3) for kind in sorted(number)}
            asked = [kind for kind in number if kind != DESCRIBE]
            measures[f"{name}_all"] = round(sum(right[kind] / number[kind] for kind in asked) / len(asked), 4)
        return measures

    course.run(losses, validate, validate_every=150)


def joint_optimizers(joint: Joint, rest: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """Gentle rates: every part already knows its work."""
    model = joint.model
    encoder, language = model.vision_model, model.language_model.model.decoder
    others = [p for module in rest for p in module.parameters()]
    others += [model.query_tokens, *encoder.embeddings.parameters(), *encoder.post_layernorm.parameters()]
    others += [*language.embed_tokens.parameters(), *language.embed_positions.parameters()]
    others += [*language.final_layer_norm.parameters()]
    bodies = [encoder.encoder, model.qformer.encoder, language.layers]
    return muon_and_adam(bodies, others, muon=0.005, adam=8e-4)
