"""Keep what the stage `clips` learns from: clips and groups of images.

The encoder, the allocator and the Q-Former are frozen. All that they say is therefore computed once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from build_engines.model.allocation import CELL_COUNT, GROUP, MOST_TOKENS, cells_of
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.attention import bias_where_hidden
from build_engines.model.qformer import QFormer
from build_engines.scenes.clips import CLIP_KINDS, WHEN, Event, Story, ask_clip, ask_story, draw_clip
from build_engines.scenes.questions import DESCRIBE, Question
from build_engines.scenes.render import compressed
from build_engines.scenes.several import SEVERAL_KINDS, ask_groups, ask_several, draw_several
from build_engines.scenes.world import WIDE, Thing, World
from build_engines.train import replicas
from build_engines.train.language_stage import WEIGHTS, denies_a_held_out_pair, draw_questions
from build_engines.train.looks import Eye, Looks
from build_engines.train.relevance import question_tensors
from service.media.clip import spaced

QUESTIONS = 8  # of a clip, a group or an image
# Questions that take longer to learn are asked more often.
SLOWLY = {"order": 4.0, "count": 3.0, "came": 2.0, "way": 2.0, WHEN: 2.0, "vanished": 1.5, "appeared": 1.0}
CLIP_WEIGHTS = SLOWLY | {"happened": 0.8, "moved": 0.6, "recoloured": 0.5, "before": 0.5}
SEVERAL_WEIGHTS = {"only": 2.5, "together": 2.5, "same": 2.0, "more": 1.0, "images": 1.0, "both": 0.7, "which": 0.4}
FRAMES = {4: 0.12, 6: 0.08, 8: 0.5, 12: 0.08, 16: 0.16, 32: 0.06}  # of a clip in training, and their shares
DRAWN_FRAMES = {4: 0.06, 8: 0.64, 16: 0.24, 32: 0.06}  # of a kept clip
# Of clips of which some frames are taken. Four frames of eight can be too far apart to tell what came first.
TAKEN_FROM = {4: (4, 16, 32), 6: (8, 16, 32), 8: (8, 16, 32), 12: (16, 32), 16: (16, 32), 32: (32,)}
APART_SHARE = 0.2  # of the groups whose images do not belong together
LAST_SHARE = 0.25  # of the groups whose questions are about the last image alone, as in a conversation
LAST_WEIGHTS = WEIGHTS | {DESCRIBE: 0.5}
IMAGES = {2: 0.6, 3: 0.25, 4: 0.15}  # of a group
WORLDS = (World(), WIDE)
LOSSY_SHARE = 0.5  # of all pictures, which were compressed


@dataclass(frozen=True)
class Frozen:
    """The parts that do not learn, without gradients."""

    eye: Eye
    allocator: RelevanceAllocator
    qformer: QFormer
    tokenizer: object

    @torch.no_grad()
    def weigh(self, looks: Looks, questions: list[Question]) -> Tensor:
        """Relevance of each cell of each picture to each question, [questions, pictures, 64]."""
        ids, mask = question_tensors(self.tokenizer, questions)
        places = self.allocator.participatory.places(looks.features.float())
        rows = []
        for row in range(len(questions)):
            asked = (one[row].unsqueeze(0).expand(len(looks), -1) for one in (ids, mask))
            rows.append(self.allocator.balance(looks.maps[:, 0], looks.maps[:, 1], places, *asked).cells)
        return torch.stack(rows)

    @torch.no_grad()
    def see(self, looks: Looks, question: Question, budget: tuple[int, int, int, int]) -> Tensor:
        """The visual tokens of each picture for a question, [pictures, 32 * groups, H]."""
        number, features = len(looks), looks.features.float()
        ids, mask = question_tensors(self.tokenizer, [question] * number)
        places = self.allocator.participatory.places(features)
        weighed = self.allocator.balance(looks.maps[:, 0], looks.maps[:, 1], places, ids, mask)
        detail = None if looks.detail is None else looks.detail.float()
        spent = self.allocator.spend(features, weighed, torch.tensor([budget] * number, dtype=torch.int32), detail)
        longest = int((spent.vision_mask > 0).sum(1).max())
        tokens, seen = spent.vision_tokens[:, :longest], spent.vision_mask[:, :longest]
        groups = [(seen > 0) if group == 0 else (seen == group + 1) for group in range(budget[2] // GROUP)]
        outputs = [self.qformer.read(tokens, bias_where_hidden(one[:, None, None, :])) for one in groups]
        return self.qformer.language_projection(torch.cat(outputs, dim=1))


@dataclass(frozen=True)
class ClipLook:
    """A clip of T frames, with Q questions about it.

    cls [T, D]; pooled [T, 64, D]; relevance [Q, T, 64] of each cell to each question; times float32 [T]. story: None
    for a clip that was not drawn here.
    """

    cls: Tensor
    pooled: Tensor
    relevance: Tensor
    times: Tensor
    questions: list[Question]
    story: Story | None = None

    def at(self, frames: Sequence[int]) -> ClipLook:
        """Some of the frames, in order."""
        index = list(frames)
        times = self.times[index]
        return replace(
            self, cls=self.cls[index], pooled=self.pooled[index], relevance=self.relevance[:, index], times=times
        )

    def asked_anew(self, rng: np.random.Generator) -> ClipLook:
        """With other questions, whose relevance is that of the old ones; half of the clips are shown backwards."""
        story, look = self.story, self
        if story is None:
            raise ValueError("only a drawn clip can be asked anew")
        if rng.random() < 0.5:
            story, look = backwards(story), self.at(range(len(self.times) - 1, -1, -1))
            look = replace(look, times=1 - look.times)
        return replace(
            look, story=story, questions=draw_kinds(rng, CLIP_WEIGHTS, lambda kind: ask_story(rng, story, kind))
        )


@dataclass(frozen=True)
class GroupLook:
    """Four images that belong together: their objects, and the visual tokens of each, [4, 32, H]."""

    scenes: list[tuple[Thing, ...]]
    visual_tokens: Tensor


@dataclass(frozen=True)
class Prefixed:
    """Questions behind visual tokens [P, H], chosen for the first question."""

    visual_tokens: Tensor
    questions: list[Question]


def draw_kinds(
    rng: np.random.Generator, weights: dict[str, float], ask: Callable[[str], Question | None]
) -> list[Question]:
    """Up to `QUESTIONS` different questions."""
    kinds, share = list(weights), np.array(list(weights.values()))
    found: dict[str, Question] = {}
    for choice in rng.choice(len(kinds), 3 * QUESTIONS, p=share / share.sum()):
        question = ask(kinds[choice])
        if question is not None and not denies_a_held_out_pair(question):
            found.setdefault(question.text, question)
        if len(found) == QUESTIONS:
            break
    return list(found.values())


def pictures(eye: Eye, pixels: Sequence[np.ndarray]) -> Looks:
    return eye.look(list(pixels), [[] for _ in pixels], [np.zeros((0, 16, 16), np.float32) for _ in pixels], False)


def lossy(rng: np.random.Generator, pixels: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compress all of them alike, or none."""
    if rng.random() >= LOSSY_SHARE:
        return list(pixels)
    seed = int(rng.integers(2**32))
    return [compressed(one, np.random.default_rng(seed)) for one in pixels]


def look_at_clip(frozen: Frozen, rng: np.random.Generator, world: World, frames: int) -> ClipLook | None:
    """Draw a clip and look at it, with as many questions of each kind. None if it gives none."""
    clip = draw_clip(rng, world, frames)
    questions = draw_kinds(rng, dict.fromkeys(CLIP_KINDS, 1.0), lambda kind: ask_clip(rng, clip, kind))
    if not questions:
        return None
    return replace(clip_look(frozen, lossy(rng, clip.pixels), clip.times, questions), story=clip.story)


def backwards(story: Story) -> Story:
    """The same clip from its end to its start."""
    things, events = list(story.things), []
    for event in story.events:
        kind = {"appeared": "vanished", "vanished": "appeared"}.get(event.kind, event.kind)
        after = None
        if event.after is not None:
            things[event.index], after = event.after, things[event.index]
        events.append(Event(kind, event.index, 1 - event.end, 1 - event.start, after))
    return replace(story, things=tuple(things), events=tuple(sorted(events, key=lambda one: one.start)))


def clip_look(frozen: Frozen, pixels: Sequence[np.ndarray], times: np.ndarray, questions: list[Question]) -> ClipLook:
    looks = pictures(frozen.eye, pixels)
    return ClipLook(
        looks.features[:, 0].half(),
        cells_of(looks.features[:, 1:].float()).mean(2).half(),
        frozen.weigh(looks, questions).half(),
        torch.from_numpy(times.astype(np.float32)),
        questions,
    )


def look_at_group(frozen: Frozen, rng: np.random.Generator, world: World, images: int) -> Prefixed | None:
    """Draw a group of images and look at them for one of the questions. None if they give none."""
    scenes = draw_several(rng, world, images)
    questions = draw_kinds(rng, dict.fromkeys(SEVERAL_KINDS, 1.0), lambda kind: ask_several(rng, scenes, kind))
    if not questions:
        return None
    looks = pictures(frozen.eye, [lossy(rng, [scene.pixels])[0] for scene in scenes])
    return Prefixed(
        frozen.see(looks, questions[0], (CELL_COUNT, MOST_TOKENS, GROUP, GROUP)).flatten(0, 1).half(), questions
    )


def look_at_four(frozen: Frozen, rng: np.random.Generator, world: World) -> GroupLook:
    """Draw four images that belong together, and look at each for a question about all of them."""
    scenes = draw_several(rng, world, 4)
    looks = pictures(frozen.eye, [lossy(rng, [scene.pixels])[0] for scene in scenes])
    questions = draw_kinds(rng, SEVERAL_WEIGHTS, lambda kind: ask_several(rng, scenes, kind))
    seen = frozen.see(looks, questions[0], (CELL_COUNT, MOST_TOKENS, GROUP, GROUP))
    return GroupLook([scene.things for scene in scenes], seen.half())


def regrouped(rng: np.random.Generator, kept: Sequence[GroupLook], images: int) -> Prefixed:
    """So many images of one group, or of several, in a random order, with new questions."""
    chosen = [kept[int(rng.integers(len(kept)))]] * images
    if rng.random() < APART_SHARE:
        chosen = [kept[int(place)] for place in rng.integers(len(kept), size=images)]
    places = [int(place) for place in rng.permutation(4)[:images]]
    scenes = [group.scenes[place] for group, place in zip(chosen, places, strict=True)]
    tokens = torch.cat([group.visual_tokens[place] for group, place in zip(chosen, places, strict=True)])
    if rng.random() < LAST_SHARE:
        return Prefixed(tokens, draw_questions(rng, list(scenes[-1]), LAST_WEIGHTS, QUESTIONS))
    return Prefixed(tokens, draw_kinds(rng, SEVERAL_WEIGHTS, lambda kind: ask_groups(rng, scenes, kind)))


class Shelf:
    """Entries in groups of equal size: clips by their frames, questions by their visual tokens."""

    def __init__(self, make: Callable[[np.random.Generator, int], object | None], sizes: dict[int, float]) -> None:
        """make(rng, size) gives a new entry or None; sizes: with their shares."""
        self._make, self._sizes = make, sizes
        self.kept: dict[int, list] = {size: [] for size in sizes}
        self._turn = dict.fromkeys(sizes, 0)

    def fill(self, rng: np.random.Generator, number: int, name: str) -> None:
        """Make about `number` entries, at least one of each size."""
        for size, share in self._sizes.items():
            wanted = max(2, round(share * number))
            bar = tqdm(total=wanted, desc=f"{name} {size}", mininterval=10.0, disable=replicas.rank() > 0)
            while len(self.kept[size]) < wanted:
                if (entry := self._make(rng, size)) is not None:
                    self.kept[size].append(entry)
                    bar.update()
            bar.close()

    def size(self, rng: np.random.Generator) -> int:
        share = np.array(list(self._sizes.values()))
        return list(self._sizes)[int(rng.choice(len(share), p=share / share.sum()))]

    def renew(self, rng: np.random.Generator) -> None:
        """Replace the oldest entry of a size."""
        size = self.size(rng)
        if (entry := self._make(rng, size)) is not None:
            self.kept[size][self._turn[size]] = entry
            self._turn[size] = (self._turn[size] + 1) % len(self.kept[size])

    def draw(self, rng: np.random.Generator, number: int, size: int) -> list:
        kept = self.kept[size]
        return [kept[i] for i in rng.choice(len(kept), min(number, len(kept)), replace=False)]


def draw_clips(rng: np.random.Generator, shelf: Shelf, number: int) -> list[ClipLook]:
    """Clips of equally many frames, some of them of longer ones, with new questions."""
    share = np.array(list(FRAMES.values()))
    frames = list(FRAMES)[int(rng.choice(len(share), p=share / share.sum()))]
    kept = [clip for size in TAKEN_FROM[frames] for clip in shelf.kept.get(size, ())]
    chosen = [kept[i] for i in rng.choice(len(kept), min(number, len(kept)), replace=False)]
    asked = [clip.at(spaced(len(clip.times), frames)).asked_anew(rng) for clip in chosen]
    return [clip for clip in asked if clip.questions]
