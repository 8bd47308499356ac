"""Stage `clips`: a copy of the language model learns clips and several images, and the clip resampler learns with it.

All else is frozen, the language model too. A question about one image is therefore answered as before. The copy's
weights are kept beside the checkpoint's own (`checkpoint.CLIP_LANGUAGE`). With one set of weights for both, clips cost
1.5 points of the right answers about new scenes. A step has three parts:

- clips of 4 to 32 frames through the resampler;
- groups of two to four images, each seen by the Q-Former, one after the other in the prompt;
- clips and groups that are told by symbols (`symbols.py`): the language model sees each only once.

The questions of a part are packed behind one prefix, whose tokens were chosen for one of them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import OPTForCausalLM

from build_engines.model import fingerprint
from build_engines.model.allocation import CELL_COUNT, MOST_TOKENS
from build_engines.model.clip import ClipResampler
from build_engines.model.clip_allocation import POSITIONS, ClipAllocation
from build_engines.model.qformer import QFormer
from build_engines.scenes.clips import Story, ask_story, draw_story
from build_engines.scenes.questions import Question
from build_engines.scenes.several import ask_groups, draw_groups
from build_engines.scenes.world import Thing, World
from build_engines.train import keeping, replicas
from build_engines.train.architecture import QUERIES
from build_engines.train.clip_store import (
    CLIP_WEIGHTS,
    DRAWN_FRAMES,
    IMAGES,
    SEVERAL_WEIGHTS,
    WORLDS,
    ClipLook,
    Frozen,
    Prefixed,
    Shelf,
    draw_clips,
    draw_kinds,
    look_at_clip,
    look_at_four,
    look_at_group,
    regrouped,
)
from build_engines.train.course import Course, Measures
from build_engines.train.events import EventTable, told_clips
from build_engines.train.language import Decode, answer_states, decoder_of, row_losses
from build_engines.train.looks import Eye
from build_engines.train.packing import Pack, Packer
from build_engines.train.publishing import parts_before_clips
from build_engines.train.stages import Plan, device, faster, mixed, muon_and_adam
from build_engines.train.starting import fit_table, said_by
from build_engines.train.symbols import SlotTable, slot_tensors
from build_engines.train.tokens import new_tokenizer

STEPS = 3100
CLIPS, ASKED_CLIPS, GROUPS, SYMBOLS = 18, 5, 3, 9  # a step, per replica
SYMBOL_NOISE = 0.1  # the standard deviation of a visual token from its symbol's vector
STORED_CLIPS, STORED_GROUPS = 640, 320  # per replica
RENEW_CLIPS, RENEW_GROUPS = 5, 15  # steps
TEXT_TOKENS = 144  # behind one prefix
CHECK_STEPS = 2700
CHECKED_CLIPS, CHECKED_GROUPS = 40, 40
CHECKED_FRAMES = (8, 4, 16)
RATE_LANGUAGE, RATE_RESAMPLER = (0.004, 1e-3), (0.01, 1e-3)  # of Muon and of Adam
RATE_NEW = 4e-3  # of the positions in time and the marks
CONTINUED = 0.5  # of the rates, for a checkpoint that has learnt clips already


@dataclass(frozen=True)
class Watcher:
    """The parts of the model that answers about clips and groups of images."""

    language: OPTForCausalLM
    decode: Decode  # in training, where every pack has the same length
    exact: Decode
    resampler: ClipResampler
    allocation: ClipAllocation
    packer: Packer

    def watch(self, clips: list[ClipLook], relevance: Tensor, budget: tuple[int, int]) -> Tensor:
        """Visual tokens [B, 64, H] of clips of the same number of frames. relevance [B, T, 64]."""
        pooled = torch.stack([clip.pooled for clip in clips]).float()
        cls = torch.stack([clip.cls for clip in clips]).float()
        asked = torch.tensor([budget] * len(clips), device=pooled.device)
        with torch.no_grad():
            kept = self.allocation(relevance.float(), pooled, clips[0].times, asked)
        tokens = self.resampler.tokens(cls, pooled, clips[0].times, kept)
        with mixed() if self.resampler.training else nullcontext():
            visual_tokens: Tensor = self.resampler(tokens)
        return visual_tokens.float()

    def losses(self, prefix: Tensor, images: list[list[Question]]) -> tuple[Tensor, Tensor, Tensor, Pack]:
        """Cross-entropy and weight [n] of the answers' tokens; whether each answer is right; the pack."""
        pack = self.packer.pack(images, prefix.shape[1])
        with mixed():
            states, rows, columns = answer_states(self.language, self.decode, prefix, pack)
        logits = functional.linear(states, self.language.model.decoder.embed_tokens.weight)
        truth = pack.targets[rows, columns]
        entropy = functional.cross_entropy(logits, truth, reduction="none")
        _, group, lengths = torch.unique(
            torch.stack([rows, pack.owner[rows, columns]]), dim=1, return_inverse=True, return_counts=True
        )
        weight = lengths[group].float().pow(-0.6)
        wrong = entropy.new_zeros(len(lengths)).index_add_(0, group, (logits.argmax(-1) != truth).float())
        return entropy, weight / weight.sum(), wrong == 0, pack


def shares_right(right: Tensor, pack: Pack, name: str) -> Measures:
    """Share of exactly right answers, by type."""
    number, good = Counter[str](), Counter[str]()
    for question, fine in zip([q for kept in pack.kept for q in kept], right.tolist(), strict=True):
        number[question.type] += 1
        good[question.type] += fine
    return {f"{name}_{kind}": good[kind] / number[kind] for kind in number}


def train_clips(plan: Plan) -> None:
    start = parts_before_clips(plan)
    model, allocator = start.model.to(device()), start.allocator.to(device())
    tokenizer = new_tokenizer()
    torch.manual_seed(9)
    resampler = (start.clip or ClipResampler(QFormer(model))).to(device()).requires_grad_(True)
    language = (start.clip_language or copy.deepcopy(model.language_model)).to(device()).requires_grad_(True)
    model.requires_grad_(False)
    model.set_attn_implementation("eager")
    language.set_attn_implementation("eager")
    eye = Eye.training(model.vision_model, plan)
    frozen = Frozen(eye, allocator.requires_grad_(False), QFormer(model), tokenizer)
    exact = decoder_of(language)
    watcher = Watcher(
        language, faster(exact, plan), exact, resampler, ClipAllocation().to(device()), Packer(tokenizer, TEXT_TOKENS)
    )
    events = EventTable(language.config.hidden_size).to(device())
    new = [resampler.positions.weight, resampler.marks]
    body = language.model.decoder
    others = [p for part in (body.embed_tokens, body.embed_positions, body.final_layer_norm) for p in part.parameters()]
    seeing = [resampler.query_tokens, *resampler.layernorm.parameters(), *resampler.language_projection.parameters()]
    taught, seen = (CONTINUED if part else 1.0 for part in (start.clip_language, start.clip))
    optimizers = [
        *muon_and_adam([body.layers], others, *(taught * rate for rate in RATE_LANGUAGE)),
        *muon_and_adam([resampler.layers], seeing, *(seen * rate for rate in RATE_RESAMPLER)),
        torch.optim.AdamW(new, lr=seen * RATE_NEW, betas=(0.9, 0.98), weight_decay=0.0),
        torch.optim.AdamW(events.parameters(), lr=RATE_NEW, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    modules = {"language": language, "resampler": resampler, "events": events}
    course = Course(plan, "clips", plan.steps(STEPS), modules, optimizers, decay_share=0.3)
    course.resume()
    if course.finished:
        return
    shelves = Shelves(plan, frozen, fingerprint.of_modules(model.vision_model, allocator, frozen.qformer))
    symbols = Symbols(fitted_symbols(plan, language.config.hidden_size).requires_grad_(False), events)

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        if course.step % RENEW_CLIPS == 0:
            shelves.clips.renew(rng)
        if course.step % RENEW_GROUPS == 0:
            shelves.groups.renew(rng)
        yield learn_clips(watcher, symbols, rng, draw_clips(rng, shelves.clips, plan.size(CLIPS, 2)))
        images = int(rng.choice(list(IMAGES), p=list(IMAGES.values())))
        groups = [regrouped(rng, shelves.groups.kept[4], images) for _ in range(plan.size(GROUPS, 2))]
        yield learn_groups(watcher, [group for group in groups if group.questions])
        yield learn_symbols(watcher, symbols, rng, plan.size(SYMBOLS, 2), of_clips=course.step % 2 == 0)

    exams = Exams(plan, frozen)
    course.run(losses, lambda: exams.validate(watcher), plan.size(CHECK_STEPS, 2))


def learn_clips(
    watcher: Watcher, symbols: Symbols, rng: np.random.Generator, clips: list[ClipLook]
) -> tuple[Tensor, Measures]:
    """Make visual tokens of clips, and ask all questions about the first `ASKED_CLIPS`.

    The cells are chosen for one question, or for all together.
    """
    chosen = []
    for clip in clips:
        row = int(rng.integers(len(clip.relevance)))
        chosen.append(clip.relevance[row] if rng.random() < 0.7 else clip.relevance.amax(0))
    most = MOST_TOKENS if rng.random() < 0.7 else int(rng.integers(112, MOST_TOKENS))
    prefix = watcher.watch(clips, torch.stack(chosen), (CELL_COUNT, most))
    told, measures = symbols.events.loss(
        prefix, symbols.table, told_clips([clip.story for clip in clips if clip.story])
    )
    asked = clips[:ASKED_CLIPS]
    entropy, weight, right, pack = watcher.losses(prefix[: len(asked)], [clip.questions for clip in asked])
    loss = (entropy * weight).sum()
    measures |= shares_right(right, pack, "clip") | {"clip_loss": loss.item()}
    return loss + told, measures | {f"clip_at_{len(clips[0].times)}": right.float().mean().item()}


def learn_symbols(
    watcher: Watcher, symbols: Symbols, rng: np.random.Generator, number: int, of_clips: bool
) -> tuple[Tensor, Measures]:
    """Ask about clips or groups that nobody has drawn: symbols tell them, as many as one wants."""
    images = int(rng.choice(list(IMAGES), p=list(IMAGES.values())))
    stories: list[Story] = []
    scenes: list[list[Thing]] = []
    asked: list[list[Question]] = []
    while len(asked) < number:
        if of_clips:
            story = draw_story(rng, World())
            questions = draw_kinds(rng, CLIP_WEIGHTS, lambda kind, story=story: ask_story(rng, story, kind))
            stories += [story] if questions else []
        else:
            shown = draw_groups(rng, World(), images)
            questions = draw_kinds(rng, SEVERAL_WEIGHTS, lambda kind, shown=shown: ask_groups(rng, shown, kind))
            scenes += shown if questions else []
        asked += [questions] if questions else []
    if of_clips:
        prefix = symbols.events(symbols.table, told_clips(stories))
    else:
        prefix = symbols.table(*slot_tensors(scenes)).unflatten(0, (number, images)).flatten(1, 2)
    prefix = prefix + SYMBOL_NOISE * torch.randn_like(prefix)
    entropy, weight, right, pack = watcher.losses(prefix, asked)
    name = "told_clip" if of_clips else "told_several"
    return (entropy * weight).sum(), shares_right(right, pack, name) | {name: right.float().mean().item()}


@dataclass(frozen=True)
class Symbols:
    """The vectors of objects, which stay as they are, and of events, which are learned."""

    table: SlotTable
    events: EventTable


def fitted_symbols(plan: Plan, width: int) -> SlotTable:
    """The symbols' vectors, of the stage `language` or fitted to the published checkpoint's visual tokens."""
    table = SlotTable(width).to(device())
    if plan.start is None or (plan.out / "language.pt").exists():
        table.load_state_dict(plan.finished("language")["table"])
        return table
    path, published = plan.out / "clips_symbols.pt", plan.published()
    key = f"{published.visual_fingerprint()} {width}"
    if (saved := keeping.load(path, key)) is not None:
        table.load_state_dict(saved)
        return table
    fit_table(table, said_by(published, plan))
    if replicas.rank() == 0:
        keeping.save(path, key, table.state_dict())
    return table


def learn_groups(watcher: Watcher, groups: list[Prefixed]) -> tuple[Tensor, Measures]:
    prefix = torch.stack([group.visual_tokens for group in groups]).float()
    entropy, weight, right, pack = watcher.losses(prefix, [group.questions for group in groups])
    loss = (entropy * weight).sum()
    number = prefix.shape[1] // QUERIES
    measures = shares_right(right, pack, "several") | {f"several_of_{number}": right.float().mean().item()}
    return loss, measures | {"several_loss": loss.item()}


class Shelves:
    """What is kept: clips by their frames, and groups of four images."""

    def __init__(self, plan: Plan, frozen: Frozen, weights: str) -> None:
        """weights: names those of `frozen`. What others said is not loaded."""

        def world(rng: np.random.Generator) -> World:
            return WORLDS[int(rng.integers(len(WORLDS)))]

        self.clips = Shelf(lambda rng, frames: look_at_clip(frozen, rng, world(rng), frames), DRAWN_FRAMES)
        self.groups = Shelf(lambda rng, _: look_at_four(frozen, rng, world(rng)), {4: 1.0})
        path = plan.out / f"clips_kept_{replicas.rank()}.pt"
        clips, groups = plan.size(STORED_CLIPS, 4), plan.size(STORED_GROUPS, 4)
        key = f"{weights} {clips} {groups}"
        if (saved := keeping.load(path, key)) is not None:
            self.clips.kept, self.groups.kept = saved
            return
        rng = np.random.default_rng((9, replicas.rank()))
        self.clips.fill(rng, clips, "clips of")
        self.groups.fill(rng, groups, "groups of")
        keeping.save(path, key, (self.clips.kept, self.groups.kept))


class Exams:
    """What the stage is validated on: clips and groups of its own seeds."""

    def __init__(self, plan: Plan, frozen: Frozen) -> None:
        self._plan, self._frozen = plan, frozen
        self._clips: dict[int, list[ClipLook]] = {}
        self._groups: dict[int, list[Prefixed]] = {}

    @torch.no_grad()
    def validate(self, watcher: Watcher) -> Measures:
        self._prepare()
        watcher.resampler.eval()
        measures: Measures = {}
        for frames, clips in self._clips.items():
            right, kinds = answer_clips(watcher, clips)
            measures[f"new_clip_{frames}"] = round(float(right.mean()), 4)
            if frames == POSITIONS:
                measures |= by_kind(right, kinds, "clip")
        for images, groups in self._groups.items():
            right, kinds = answer_groups(watcher, groups)
            measures[f"new_several_{images}"] = round(float(right.mean()), 4)
            if images == 2:
                measures |= by_kind(right, kinds, "several")
        watcher.resampler.train()
        return measures

    def _prepare(self) -> None:
        if self._clips:
            return
        plan, frozen = self._plan, self._frozen
        for frames in CHECKED_FRAMES:
            rng = np.random.default_rng((99, 1))
            drawn = (look_at_clip(frozen, rng, World(), frames) for _ in range(plan.size(CHECKED_CLIPS, 2)))
            self._clips[frames] = [clip for clip in drawn if clip]
        for images in IMAGES:
            rng = np.random.default_rng((99, 2))
            drawn = (look_at_group(frozen, rng, World(), images) for _ in range(plan.size(CHECKED_GROUPS, 2)))
            self._groups[images] = [group for group in drawn if group]


def by_kind(right: np.ndarray, kinds: list[str], name: str) -> Measures:
    return {
        f"{name}_{kind}": round(float(right[[one == kind for one in kinds]].mean()), 3) for kind in sorted(set(kinds))
    }


@torch.no_grad()
def answer_clips(
    watcher: Watcher, clips: list[ClipLook], budget: tuple[int, int] = (CELL_COUNT, MOST_TOKENS), at_once: int = 32
) -> tuple[np.ndarray, list[str]]:
    """Ask each question on its own, as a request does: whether each answer is right, and its type."""
    asked = [(clip, row) for clip in clips for row in range(len(clip.questions))]
    right = []
    for start in range(0, len(asked), at_once):
        part = asked[start : start + at_once]
        relevance = torch.stack([clip.relevance[row] for clip, row in part])
        prefix = watcher.watch([clip for clip, _ in part], relevance, budget)
        rows = watcher.packer.rows([clip.questions[row] for clip, row in part], prefix.shape[1])
        right.append(row_losses(watcher.language, watcher.exact, prefix, rows)[1].cpu().numpy())
    return np.concatenate(right), [clip.questions[row].type for clip, row in asked]


@torch.no_grad()
def answer_groups(watcher: Watcher, groups: list[Prefixed]) -> tuple[np.ndarray, list[str]]:
    """As `answer_clips`. Every question of a group is asked behind the same visual tokens."""
    right = []
    for group in groups:
        prefix = group.visual_tokens.float().expand(len(group.questions), -1, -1)
        rows = watcher.packer.rows(group.questions, prefix.shape[1])
        right.append(row_losses(watcher.language, watcher.exact, prefix, rows)[1].cpu().numpy())
    return np.concatenate(right), [question.type for group in groups for question in group.questions]
