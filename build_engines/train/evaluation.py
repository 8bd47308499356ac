"""Evaluate a chain on held-out scenes in PyTorch.

Any policy for vision tokens, any budget and fixed tensions can be evaluated.

    chain = Chain.load(Path("reference"))
    exam = held_out_exam(chain, "new", 1000)
    adaptive = answer(chain, exam, Arm())
    print(summarise(adaptive)["all"], paired(adaptive, answer(chain, exam, Arm(vision_tokens=(256, 256)))))

The scenes' features are computed once for an exam, in FP32. Everything after them is the served chain's own code.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, OPTForCausalLM, PreTrainedTokenizerFast

from build_engines.evaluation.intervals import Z_95, wilson
from build_engines.model.allocation import GROUP, MAX_VISION_TOKENS
from build_engines.model.allocator import RelevanceAllocator, Weighed
from build_engines.model.attention import bias_where_hidden
from build_engines.model.checkpoint import Checkpoint
from build_engines.model.focus import query_groups
from build_engines.model.qformer import InstructQFormer, QFormer
from build_engines.model.vision import VisionEncoder
from build_engines.scenes.held_out import COMMITTED, DIRECTORY, NEW, PAIRS, QUALITY, SMALL, held_out_scenes
from build_engines.scenes.questions import DESCRIBE, Question
from build_engines.scenes.world import GRID, Thing
from build_engines.train.language import decoder_of, row_losses
from build_engines.train.looks import CLOSER, Eye, Looks
from build_engines.train.packing import Packer
from build_engines.train.relevance import question_tensors
from build_engines.train.selection import GUIDED, TENSIONS, on_asked, select
from build_engines.train.stages import device, tensor

BATCH = 64  # questions
SCENES_AT_ONCE = 16
RESAMPLES = 4000


@dataclass(frozen=True)
class Chain:
    """The served model: encoder, allocator, Q-Former and language model."""

    eye: Eye
    allocator: RelevanceAllocator
    qformer: QFormer | InstructQFormer
    language: OPTForCausalLM
    tokenizer: PreTrainedTokenizerFast
    read_by_qformer: Callable[[list[Question]], tuple[Tensor, Tensor]] | None = None  # ids and mask, if it reads them

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Load a checkpoint directory of the reference model: the rounded weights, computed in FP32."""
        checkpoint = Checkpoint.load(directory)
        encoder: VisionEncoder = checkpoint.vision_encoder().to(device())
        return cls(
            Eye(encoder),
            checkpoint.allocator().to(device()),
            checkpoint.qformer().to(device()),
            checkpoint.model.language_model.to(device()),
            AutoTokenizer.from_pretrained(directory),
        )

    def question(self, asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
        """ids and mask, [B, 32], for the allocator and a Q-Former that reads the question."""
        return (self.read_by_qformer or partial(question_tensors, self.tokenizer))([one.question for one in asked])


@dataclass(frozen=True)
class Asked:
    """A question about scene number `scene` of an exam."""

    scene: int
    question: Question


@dataclass(frozen=True)
class Exam:
    """Encoded held-out scenes, and all questions about them."""

    looks: Looks
    asked: list[Asked]

    def things(self, index: int) -> list[Thing]:
        """The objects that the answer to question number `index` depends on."""
        one = self.asked[index]
        return [self.looks.scenes[one.scene][i] for i in one.question.asked]


@dataclass(frozen=True)
class Arm:
    """One way to spend vision tokens.

    Least and most are as in a request; two equal numbers are a fixed budget. tensions: values that replace the
    allocator's, by name, such as {"diversify": 0.0}. closer: use the closer view, which the exam must hold, and up to
    400 tokens. queries: how many of a group's 32 go to the decoder; 16 means every second one. once: the first
    question about an image chooses the tokens of all.
    """

    policy: str = GUIDED  # one of selection.POLICIES
    vision_tokens: tuple[int, int] = (64, 256)
    visual_tokens: tuple[int, int] = (32, 32)
    closer: bool = False
    queries: int = GROUP
    tensions: Mapping[str, float] = field(default_factory=dict)
    once: bool = False


@dataclass(frozen=True)
class Answers:
    """Results for the n questions of an exam, in its order."""

    exam: Exam
    right: np.ndarray  # bool [n]: greedy answer, exact match
    vision_tokens: np.ndarray  # int [n], without CLS
    visual_tokens: np.ndarray  # int [n]
    on_asked: np.ndarray  # bool [n]: the most relevant cell of the balanced map shows an object asked about
    levels: np.ndarray  # int8 [n, 64]
    tensions: np.ndarray  # float [n, 3], before any replacement
    weights: np.ndarray  # float [n, 3]

    @property
    def types(self) -> np.ndarray:
        """str [n]."""
        return np.array([one.question.type for one in self.exam.asked])

    @property
    def scenes(self) -> np.ndarray:
        """int [n]: the number of each question's scene."""
        return np.array([one.scene for one in self.exam.asked])


def held_out_exam(chain: Chain, split: str, number: int, closely: bool = False, first: int = 0) -> Exam:
    """Encode `number` scenes of a split (`held_out_scenes`), after WebP compression as for shipped ones.

    `first` is the number of the first scene. Scenes below `COMMITTED[split]` are the committed ones; training validates
    on those from 100,000.

    closely: render scenes of 448 pixels, with the closer view.
    """
    looks, asked = [], []
    scenes = list(held_out_scenes(split, number, first, CLOSER if closely else None))
    for start in range(0, number, SCENES_AT_ONCE):
        part = scenes[start : start + SCENES_AT_ONCE]
        pixels = [_as_shipped(scene.pixels) for scene in part]
        looks.append(chain.eye.look(pixels, [s.things for s in part], [s.coverage for s in part], closely))
    for index, scene in enumerate(scenes):
        asked += [Asked(index, question) for question in scene.questions]
    return Exam(Looks.joined(looks), asked)


def committed_exam(chain: Chain, split: str, closely: bool = False, limit: int | None = None) -> Exam:
    """Encode the committed scenes of a split, pixel for pixel. limit: only the first few."""
    scenes = list(held_out_scenes(split, limit or COMMITTED[split]))
    looks = []
    for start in range(0, len(scenes), SCENES_AT_ONCE):
        part = scenes[start : start + SCENES_AT_ONCE]
        pixels = [np.asarray(Image.open(DIRECTORY / scene.name).convert("RGB")) for scene in part]
        looks.append(chain.eye.look(pixels, [s.things for s in part], [s.coverage for s in part], closely))
    asked = [Asked(index, question) for index, scene in enumerate(scenes) for question in scene.questions]
    return Exam(Looks.joined(looks), asked)


def _as_shipped(pixels: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=QUALITY)
    return np.asarray(Image.open(buffer).convert("RGB"))


@torch.no_grad()
def answer(chain: Chain, exam: Exam, arm: Arm, seed: int = 0) -> Answers:
    """Ask every question under one arm. seed: for the random policy."""
    noise = torch.Generator().manual_seed(seed)
    return in_parts(exam, BATCH, arm.once, lambda asked, deciding: _answer(chain, exam, asked, deciding, arm, noise))


def in_parts(
    exam: Exam, size: int, once: bool, ask: Callable[[list[Asked], list[Asked]], tuple[np.ndarray, ...]]
) -> Answers:
    """Ask all questions, `size` at a time. ask(asked, deciding) -> the columns of Answers for the questions `asked`.

    `deciding` are the questions that choose the tokens: `asked`, or with `once` the first question about each's scene.
    """
    first = {one.scene: one for one in reversed(exam.asked)}
    parts = []
    for start in range(0, len(exam.asked), size):
        asked = exam.asked[start : start + size]
        parts.append(ask(asked, [first[one.scene] for one in asked] if once else asked))
    return Answers(exam, *(np.concatenate([part[i] for part in parts]) for i in range(len(parts[0]))))


class View(NamedTuple):
    """What the allocator knows about each of B questions before it spends a token."""

    features: Tensor  # [B, 257, D]
    detail: Tensor | None  # [B, 1024, D], the closer view's tokens
    weighed: Weighed


def view(chain: Chain, exam: Exam, asked: list[Asked], *, closer: bool) -> View:
    """Weigh the questions' images. Raises ValueError for a closer view that the exam does not hold."""
    looks, scenes = exam.looks, [one.scene for one in asked]
    features, maps = looks.features[scenes].float(), looks.maps[scenes]
    detail = None
    if closer:
        if looks.detail is None:
            raise ValueError("this exam has no closer view: make it with closely=True")
        detail = chain.allocator.detail(features, looks.detail[scenes].float())
    ids, mask = chain.question(asked)
    if chain.allocator.zero_shot is not None:
        known = chain.allocator.zero_shot(features, ids, mask)
        return View(features, detail, chain.allocator.from_known(maps[:, 0], maps[:, 1], known))
    participatory = chain.allocator.participatory
    places = None if participatory is None else participatory.places(features)
    return View(features, detail, chain.allocator.balance(maps[:, 0], maps[:, 1], places, ids, mask))


def read(
    chain: Chain, tokens: Tensor, seen: Tensor, groups: Tensor, asked: list[Asked], queries: int = GROUP
) -> np.ndarray:
    """Answer B questions from their vision tokens -> bool [B]: an exact match.

    tokens [B, 1 + N, D] and seen int32 [B, 1 + N] as `Allocation.pack` makes them; groups int32 [B, 1]: groups of
    queries; queries: how many of a group's 32 go to the decoder.
    """
    longest = int((seen > 0).sum(1).max())
    tokens, seen = tokens[:, :longest], seen[:, :longest]
    packer, every = Packer(chain.tokenizer), GROUP // queries
    right = np.zeros(len(asked), bool)
    for used in groups.unique().tolist():
        rows = (groups[:, 0] == used).nonzero()[:, 0]
        some = [asked[i] for i in rows.tolist()]
        visual = [_read(chain, tokens[rows], seen[rows], group, some)[:, ::every] for group in range(used)]
        prefix = torch.cat(visual, dim=1)
        questions = [one.question for one in some]
        _, exact = row_losses(
            chain.language, decoder_of(chain.language), prefix, packer.rows(questions, prefix.shape[1])
        )
        right[rows.cpu().numpy()] = exact.cpu().numpy()
    return right


def peak_on_asked(exam: Exam, asked: list[Asked], weighed: Weighed) -> np.ndarray:
    """bool [B]: whether the most relevant cell shows an object asked about."""
    coverage = exam.looks.coverage
    truth = np.stack([coverage[o.scene][list(o.question.asked)].max(0).reshape(GRID * GRID) for o in asked])
    found: np.ndarray = on_asked(weighed.cells, tensor(truth)).cpu().numpy()
    return found


def _answer(
    chain: Chain, exam: Exam, asked: list[Asked], deciding: list[Asked], arm: Arm, noise: torch.Generator
) -> tuple[np.ndarray, ...]:
    """Ask the questions `asked` over the tokens that the questions `deciding` choose."""
    allocator, allocation = chain.allocator, chain.allocator.allocation
    features, detail, weighed = view(chain, exam, deciding, closer=arm.closer)
    cells, tensions = select(arm.policy, weighed, torch.rand(len(asked), 64, generator=noise).to(features))
    tensions = tensions.clone()
    for name, value in arm.tensions.items():
        tensions[:, TENSIONS.index(name)] = value
    particularize = tensions[:, :1]
    budget = tensor(np.tile(np.array([*arm.vision_tokens, *arm.visual_tokens], np.int32), (len(asked), 1)))
    groups = query_groups(particularize, budget)
    regions = allocator.focus(cells)
    extra = allocation.extra(particularize, budget, arm.closer)
    levels = allocation.spend(cells, tensions, extra, regions.peaks, arm.closer)
    tokens, seen = allocation.pack(features, levels, regions.read_by(groups), detail)
    return (
        read(chain, tokens, seen, groups, asked, arm.queries),
        ((seen > 0).sum(1) - 1).cpu().numpy(),  # without CLS
        (groups[:, 0] * arm.queries).cpu().numpy(),
        peak_on_asked(exam, asked, weighed),
        levels.to(torch.int8).cpu().numpy(),
        weighed.tensions.cpu().numpy(),
        weighed.weights.cpu().numpy(),
    )


def _read(chain: Chain, tokens: Tensor, mask: Tensor, group: int, asked: Sequence[Asked]) -> Tensor:
    """Visual tokens [B, 32, H] of group 0 (which reads all tokens) or of a focus group."""
    qformer = chain.qformer
    visible = (mask > 0) if group == 0 else (mask == group + 1)
    longest = int(visible.sum(1).max())
    front = torch.argsort(~visible, dim=1, stable=True)[:, :longest]
    tokens = tokens.gather(1, front[..., None].expand(-1, -1, tokens.shape[2]))
    bias = bias_where_hidden(visible.gather(1, front)[:, None, None, :])
    if isinstance(qformer, InstructQFormer):
        hidden = qformer.read(tokens, chain.question(asked), bias)
    else:
        hidden = qformer.read(tokens, bias)
    return qformer.language_projection(hidden)


def summarise(answers: Answers) -> dict[str, dict[str, Any]]:
    """Summarise by question type, and over all types except descriptions.

    Per type: n, accuracy with its Wilson interval, mean vision tokens with their 95 % interval (normal), mean visual
    tokens, and how often the most relevant cell shows an object asked about.
    """
    types = answers.types
    groups = {kind: types == kind for kind in sorted(set(types.tolist()))} | {"all": types != DESCRIBE}
    return {kind: _summary(answers, rows) for kind, rows in groups.items() if rows.any()}


def _summary(answers: Answers, rows: np.ndarray) -> dict[str, Any]:
    right, spent = answers.right[rows], answers.vision_tokens[rows].astype(float)
    low, high = wilson(int(right.sum()), len(right))
    margin = Z_95 * spent.std() / np.sqrt(len(spent))
    return {
        "n": len(right),
        "accuracy": round(float(right.mean()), 4),
        "interval": [round(low, 4), round(high, 4)],
        "vision_tokens": round(float(spent.mean()), 1),
        "vision_tokens_interval": [round(float(spent.mean() - margin), 1), round(float(spent.mean() + margin), 1)],
        "visual_tokens": round(float(answers.visual_tokens[rows].mean()), 1),
        "on_asked": round(float(answers.on_asked[rows].mean()), 4),
    }


def paired(one: Answers, other: Answers, rows: np.ndarray | None = None) -> dict[str, Any]:
    """How much more often `one` is right than `other` on the same questions.

    The questions are those of `rows`, bool [n], or all except descriptions. The 95 % interval is from a bootstrap over
    scenes, because questions about one scene are not independent.
    """
    rows = one.types != DESCRIBE if rows is None else rows
    gain = one.right[rows].astype(float) - other.right[rows]
    return {"difference": round(float(gain.mean()), 4), "interval": resampled(gain, one.scenes[rows])}


def resampled(values: np.ndarray, scenes: np.ndarray) -> list[float]:
    """The 95 % interval of the mean of values [n], drawing scenes int [n] with replacement (Efron 1979)."""
    _, scene = np.unique(scenes, return_inverse=True)
    total, number = np.bincount(scene, values), np.bincount(scene)
    draws = np.random.default_rng(0).multinomial(len(total), np.full(len(total), 1 / len(total)), RESAMPLES)
    means = (draws @ total) / (draws @ number)
    return [round(float(edge), 4) for edge in np.quantile(means, (0.025, 0.975))]


COMMITTED_ARMS = {
    NEW: {"256_tokens": Arm(vision_tokens=(256, 256)), "adaptive": Arm(), "112_tokens": Arm(vision_tokens=(112, 112)),
          "112_tokens_random": Arm("random", (112, 112))},
    PAIRS: {"256_tokens": Arm(vision_tokens=(256, 256)), "adaptive": Arm()},
    SMALL: {"adaptive": Arm(), "closer": Arm(vision_tokens=(64, MAX_VISION_TOKENS), closer=True)},
}  # fmt: skip


def committed_report(chain: Chain, limit: int | None = None) -> dict[str, Any]:
    """Evaluate the committed scenes, by split and arm, in the form of `summarise`.

    limit: this many scenes of each split. The closer view's arm is skipped if the chain has no closer view.
    """
    report: dict[str, Any] = {}
    for split, arms in COMMITTED_ARMS.items():
        exam = committed_exam(chain, split, split == SMALL and chain.allocator.closer is not None, limit)
        report[split] = {
            name: summarise(answer(chain, exam, arm))
            for name, arm in arms.items()
            if not arm.closer or exam.looks.detail is not None
        }
    return report
