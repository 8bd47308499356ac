"""Train a small InstructBLIP from the reference model, to try `glimpse adapt` and `--zero-shot` on a real one.

    python -m benchmarks.instruct --out instruct
    python -m benchmarks.adapting_pictures --out pictures --pictures 5000
    glimpse adapt instruct --data pictures --out adapted

As InstructBLIP's authors did (Dai et al. 2023, arXiv:2305.06500), it starts from a BLIP-2 and trains the Q-Former and
its projection alone, on answers from the full view. The reference model already tells everything about a scene in 32
visual tokens, so that its Q-Former has no need of the question. Therefore the language model sees only some of the
visual tokens of every second image: each of them must then tell what is asked for.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from build_engines.adapt.chain import Questions, prompts_of
from build_engines.model.checkpoint import Checkpoint
from build_engines.model.qformer import InstructQFormer
from build_engines.scenes.questions import TYPES, Question
from build_engines.scenes.world import WIDE, World
from build_engines.train.architecture import QUERIES
from build_engines.train.course import Course, Measures
from build_engines.train.language import decoder_of, row_losses
from build_engines.train.packing import Packer
from build_engines.train.stages import Plan, set_threads
from build_engines.train.store import Seen, Store

WORLDS = [World(), WIDE]
STORED, FRESH = 1200, 6  # scenes
IMAGES, ASKED = 16, 4  # a step; questions an image
RATE = 5e-4  # AdamW's. With 1.5e-3, or with Muon, the Q-Former first forgets what it knew
FEWEST, MOST = 2, 16  # visual tokens that the language model sees of those images
VALIDATED = 96  # scenes
OWN = ("vision_config", "qformer_config", "text_config")
PARTS = {"qformer.layernorm.": "qformer.embeddings.layernorm."}  # BLIP-2's name, InstructBLIP's name
COPIED = {"intermediate_query.": "intermediate.", "output_query.": "output."}  # the words' layers start as the queries'


def instructed(reference: Path, out: Path) -> None:
    """Write the reference model as an InstructBLIP that has learnt nothing yet about the question.

    Its Q-Former reads words by the language model's embeddings and tokenizer.
    """
    old = Blip2ForConditionalGeneration.from_pretrained(reference, dtype=torch.float32)
    parts = {name: getattr(old.config, name).to_dict() for name in OWN}
    for name in ("vision_config", "qformer_config"):
        parts[name].pop("model_type")
    tokenizer = AutoTokenizer.from_pretrained(reference)
    new = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            **parts, num_query_tokens=old.config.num_query_tokens, image_token_index=old.config.image_token_index
        )
    )
    weights = dict(old.state_dict())
    for name in list(weights):
        for before, after in (PARTS | COPIED).items():
            if name.startswith("qformer.") and before in name:
                weights[name.replace(before, after)] = weights[name]
    told = new.state_dict()
    words = old.language_model.get_input_embeddings().weight.detach()
    weights["qformer.embeddings.word_embeddings.weight"] = words * (0.05 / words.std())
    places = told["qformer.embeddings.position_embeddings.weight"]
    weights["qformer.embeddings.position_embeddings.weight"] = 0.02 * torch.randn(
        places.shape, generator=torch.Generator().manual_seed(0)
    )
    new.load_state_dict({name: weights[name] for name in told})
    new.generation_config = old.generation_config
    out.mkdir(parents=True, exist_ok=True)
    new.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _reading(tokenizer).save_pretrained(out / "qformer_tokenizer")
    shutil.copy(reference / "preprocessor_config.json", out)
    card = json.loads((reference / "model_card.json").read_text())
    kept = ("prompt", "end_id", "image_size", "image_mean", "image_std", "fit")
    told_of = {"name": "small-instructblip", "architecture": type(new).__name__} | {name: card[name] for name in kept}
    (out / "model_card.json").write_text(json.dumps(told_of, indent=2) + "\n")


def _reading(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same words between a first and a last token, as [CLS] and [SEP] stand around BERT's."""
    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    first, last = tokenizer.bos_token, tokenizer.eos_token
    own.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        special_tokens=[(first, tokenizer.bos_token_id), (last, tokenizer.eos_token_id)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token=first, eos_token=last, pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
    )  # fmt: skip


class Training:
    """The Q-Former that learns, and the frozen model around it."""

    def __init__(self, directory: Path) -> None:
        self.checkpoint = Checkpoint.load(directory)
        self.model = self.checkpoint.model.requires_grad_(False)
        self.model.set_attn_implementation("eager")
        self.qformer = InstructQFormer(self.model)
        self.learning: list[nn.Module] = [self.model.qformer, self.model.language_projection]
        for module in self.learning:
            module.requires_grad_()
        self.model.query_tokens.requires_grad_()
        self._questions = Questions(prompts_of(self.checkpoint))
        self._packer = Packer(AutoTokenizer.from_pretrained(directory))
        self._decode = decoder_of(self.model.language_model)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        own = [self.model.query_tokens, *(p for module in self.learning for p in module.parameters())]
        return [torch.optim.AdamW(own, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    def ask(self, seen: Seen, rng: np.random.Generator) -> tuple[Tensor, list[Question]]:
        """Questions about each scene, all kinds alike, and each one's scene."""
        asked = seen.ask(rng, dict.fromkeys(TYPES, 1.0), ASKED)
        owner = [scene for scene, questions in enumerate(asked) for _ in questions]
        return torch.tensor(owner), [question for questions in asked for question in questions]

    def losses(
        self, seen: Seen, owner: Tensor, questions: list[Question], hidden: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """As `row_losses`. hidden: numbers of visual tokens that the language model does not see."""
        question = self._questions.tensors([question.text for question in questions])
        outputs = self.qformer.read(seen.features.float(), question, owner=owner)
        visual = self.model.language_projection(outputs)
        row = self._packer.rows(questions)
        row.mask[..., hidden] = False
        return row_losses(self.model.language_model, self._decode, visual, row)


def train(directory: Path, steps: int) -> dict[str, float]:
    """Train the checkpoint in place, and tell how much it gets right. A run that was stopped goes on."""
    training = Training(directory)
    modules = {"qformer": training.model.qformer, "projection": training.model.language_projection}
    queries = nn.ParameterDict({"0": training.model.query_tokens})
    plan = Plan(directory / "work", compiled=False)
    course = Course(plan, "instruct", steps, {**modules, "queries": queries}, training.optimizers(), decay_share=0.7)
    course.resume()
    store = Store(training.model.vision_model, plan, WORLDS, STORED, FRESH)

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        batch = store.draw(rng, IMAGES)
        half = IMAGES // 2
        hidden = rng.permutation(QUERIES)[rng.integers(FEWEST, MOST + 1) :].tolist()
        for part, unseen in ((range(half), []), (range(half, IMAGES), hidden)):
            seen = batch.take(part)
            owner, questions = training.ask(seen, rng)
            loss, right = training.losses(seen, owner, questions, unseen)
            yield loss.mean() / 2, {"right_by_few" if unseen else "right": right.float().mean().item()}

    @torch.no_grad()
    def validate() -> Measures:
        measures: Measures = {}
        for name, world in {"new": World(), "pairs": World(held_out=True)}.items():
            rng, right, number = np.random.default_rng(80), Counter[str](), Counter[str]()
            for _ in range(VALIDATED // IMAGES):
                seen = store.encode(rng, IMAGES, [world])
                owner, questions = training.ask(seen, rng)
                _, found = training.losses(seen, owner, questions)
                for question, exact in zip(questions, found.tolist(), strict=True):
                    right[question.type] += exact
                    number[question.type] += 1
            measures |= {f"{name}_{kind}": round(right[kind] / number[kind], 3) for kind in sorted(number)}
            measures[f"{name}_all"] = round(right.total() / number.total(), 4)
        return measures

    if not course.finished:
        course.run(losses, validate, validate_every=100)
    training.model.half().save_pretrained(directory)
    training.model.float()
    return validate()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint to write")
    parser.add_argument("--reference", type=Path, default=Path("reference"), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=700, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    if not (options.out / "model_card.json").exists():
        instructed(options.reference, options.out)
    print(json.dumps(train(options.out, options.steps)))


if __name__ == "__main__":
    main()
