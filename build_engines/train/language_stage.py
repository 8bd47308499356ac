"""Stage `language`: the decoder learns the task on symbols, without an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from build_engines.scenes.questions import ANSWERS, DESCRIBE, TYPES, Question, ask, rephrase
from build_engines.scenes.world import HELD_OUT_PAIRS, WIDE, Thing, World, sample_scene
from build_engines.train.architecture import new_model
from build_engines.train.course import Course, Measures
from build_engines.train.language import answer_loss, decoder_of
from build_engines.train.packing import Pack, Packer
from build_engines.train.stages import Plan, device, faster, mixed, muon_and_adam, tensor
from build_engines.train.starting import fit_table, said_by
from build_engines.train.symbols import SlotTable, slot_tensors
from build_engines.train.tokens import new_tokenizer

STEPS = 4800
BATCH = 16  # images, about 14 questions each
START_STEPS, START_RATE = 1584, 0.5  # from a published checkpoint; the latter of the learning rates
NOISE = 0.05  # on the slots' vectors, because the Q-Former's will not be exact
WEIGHTS = {"colour": 0.6, "shape": 0.7, "count": 4.0, "exist": 1.2, "relation": 2.0, "size": 1.2, "read": 0.6}


def draw_questions(
    rng: np.random.Generator, things: list[Thing], weights: dict[str, float], number: int, loosely: bool = False
) -> list[Question]:
    """Draw up to `number` different questions about one scene. loosely: also in common other words."""
    kinds, share = list(weights), np.array(list(weights.values()))
    found: dict[str, Question] = {}
    for choice in rng.choice(len(kinds), 2 * number, p=share / share.sum()):
        question = ask(rng, things, kinds[choice])
        if question is not None and not denies_a_held_out_pair(question):
            said = rephrase(rng, question) if loosely else question
            found[said.text] = said
        if len(found) == number:
            break
    return list(found.values())


def denies_a_held_out_pair(question: Question) -> bool:
    """Whether the question denies a held-out pair.

    A near miss may name a pair that training never shows. It could only ever be answered with no or 0.
    """
    return question.answer in ("no", "0") and any(
        f"{colour} {shape}" in question.text for colour, shape in HELD_OUT_PAIRS
    )


def train_language(plan: Plan) -> None:
    torch.manual_seed(2)
    tokenizer = new_tokenizer()
    language = new_model(tokenizer, plan.config(tokenizer)).language_model.to(device())
    language.set_attn_implementation("eager")
    table = SlotTable(language.config.hidden_size).to(device())
    embeddings = language.get_input_embeddings().weight.data
    rate = 1.0
    if plan.start:
        published, rate = plan.published(), START_RATE
        language.load_state_dict(published.model.language_model.state_dict())
        fit_table(table, said_by(published, plan))
    else:
        table.start_from_words({a: embeddings[tokenizer.encode(f" {a}", add_special_tokens=False)[0]] for a in ANSWERS})
    packer = Packer(tokenizer)
    decode = faster(decoder_of(language), plan)
    decoder = language.model.decoder
    others = [
        p
        for part in (decoder.embed_tokens, decoder.embed_positions, decoder.final_layer_norm, table)
        for p in part.parameters()
    ]
    course = Course(
        plan,
        "language",
        plan.steps(START_STEPS if plan.start else STEPS),
        {"language": language, "table": table},
        muon_and_adam([decoder.layers], others, muon=0.01 * rate, adam=2e-3 * rate),
        decay_share=1.0 if plan.start else 0.35,
    )
    course.resume()

    def draw(rng: np.random.Generator, world: World, weights: dict[str, float], loosely: bool) -> tuple[Tensor, Pack]:
        scenes = [sample_scene(rng, world) for _ in range(plan.size(BATCH, 2))]
        prefix = table(*slot_tensors(scenes))
        return prefix, packer.pack([draw_questions(rng, things, weights, 16, loosely) for things in scenes])

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        early = max(0.0, 1.0 - 2.0 * course.step / course.steps)
        world, weights = WIDE if course.step % 2 else World(), WEIGHTS | {DESCRIBE: 0.5, "position": 0.2 + 3.0 * early}
        prefix, pack = draw(rng, world, weights, True)
        prefix = prefix + NOISE * tensor(rng.standard_normal(prefix.shape, np.float32))
        with mixed():
            loss, right, number = answer_loss(language, decode, prefix, pack)
        yield loss, {kind: right[kind] / number[kind] for kind in number}

    @torch.no_grad()
    def validate() -> Measures:
        measures: Measures = {}
        for name, world in {"new": World(), "pairs": World(held_out=True), "wide": WIDE}.items():
            rng, right, number = np.random.default_rng(78), Counter[str](), Counter[str]()
            for _ in range(plan.size(8, 1)):
                prefix, pack = draw(rng, world, dict.fromkeys((*TYPES, DESCRIBE, "position"), 1.0), False)
                with mixed():
                    _, r, n = answer_loss(language, decode, prefix, pack)
                right.update(r)
                number.update(n)
            measures |= {f"{name}_{kind}": round(right[kind] / number[kind], 3) for kind in sorted(number)}
        return measures

    course.run(losses, validate, validate_every=100)
