"""Train an allocator so that a budget of vision tokens gives what the full view gives.

The encoder and the language model stay frozen, and so does the Q-Former unless LoRA is asked for. A step reads the
kept features, so it costs the allocator and the Q-Former, and with a likelihood teacher the language model. The first
half of the training is relevance alone, which takes neither.
`accelerate` runs it on one process or on many (`torchrun`, DDP). Every step draws the whole batch from its own seed,
and each process takes its share of it, so that one process and several compute the same step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from build_engines.adapt.adapters import without
from build_engines.adapt.chain import Language, Questions, Reader
from build_engines.adapt.data import Asked
from build_engines.adapt.features import FeatureStore, detail_of
from build_engines.adapt.teacher import Lessons, full_view
from build_engines.model.allocation import CELL_COUNT, MAX_VISION_TOKENS, MOST_TOKENS
from build_engines.model.allocator import RelevanceAllocator, Weighed
from build_engines.model.relaxation import choose, gates_of

QUERIES = 32
UNIFORM, LARGE = (1.0, 1.0, 1.0), (2.0, 3.0, 5.0)  # weights of the thirds of the budgets; 2:3:5 is TokenFLEX's
TOKEN_WEIGHT = 0.1  # of the visual tokens' loss beside that of the answers
GREATEST = 0.9  # relevance of a question's most relevant patch, in the median
WARMUP = 0.05  # of the steps
CLIPPED = 2.0
PATIENCE = timedelta(days=1)  # for the process that computes what all others wait for, such as the features


@dataclass(frozen=True)
class Schedule:
    """The size of a training. Images and questions are those of all processes together."""

    steps: int = 600  # of the whole allocator
    relevance_steps: int = 1200  # before these, of relevance alone, which stays as it is then
    images: int = 12  # a step
    asked: int = 3  # questions an image
    closer_images: int = 4  # a step, with the closer view
    map_images: int = 48  # a step of relevance
    rate: float = 1.5e-3
    thirds: tuple[float, float, float] = UNIFORM
    seed: int = 5
    checkpoint_s: float = 60.0


@dataclass
class Batch:
    """R questions about B images. Row i asks about image owner[i]."""

    features: Tensor  # [B, 257, D]
    maps: Tensor  # [B, 2, 256]
    detail: Tensor | None  # [B, 1024, D]
    owner: Tensor  # int64 [R]
    texts: list[str]
    answers: list[list[int]]
    sure: Tensor  # [R]: weight of the answer
    importance: Tensor  # [R, 256]
    budget: Tensor  # int32 [R, 4]
    only_map: bool = False  # whether relevance alone is learned
    noise: Tensor | None = None  # [R, 64] in [0, 1]: ranks the cells of every second question, for adapters


class Student(nn.Module):
    """The allocator in front of the frozen Q-Former. Its parameters are those that are trained."""

    def __init__(
        self, allocator: RelevanceAllocator, reader: Reader, language: Language | None, questions: Questions,
        adapters: Sequence[nn.Parameter] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.allocator = allocator
        self.adapters = nn.ParameterList(adapters)
        self.reader, self.language, self.questions = reader, language, questions  # not modules: frozen

    def forward(self, batches: Sequence[Batch]) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step, and its parts."""
        total, parts = torch.zeros(()), {}
        for batch in batches:
            loss, told = self.learn(batch)
            total = total.to(loss) + loss
            parts |= told
        return total / len(batches), parts

    def learn(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        question = self.question(batch)
        weighed = self.weigh(batch, question)
        if batch.only_map:
            loss = divergence(weighed.scores[:, 2], batch.importance)
            return loss, {"map": loss.item()}
        loss, parts = torch.zeros_like(batch.sure).sum(), {}
        name = "plain" if batch.detail is None else "closer"
        visual = self.read(batch, weighed, question)
        if batch.detail is None:
            with torch.no_grad():
                whole = self.whole(batch, question)
            # Over each question's own variance: the share of a process gives what the whole batch gives.
            error = ((visual - whole).square().mean((1, 2)) / whole.var((1, 2)).clamp(min=1e-12)).mean()
            loss = loss + (1.0 if self.language is None else TOKEN_WEIGHT) * error
            parts[f"{name}_tokens"] = error.item()
        if self.language is not None:
            spoken = self.language.speak(visual, batch.texts, batch.answers)
            answered = (spoken.losses * batch.sure).mean()
            loss = loss + answered
            parts |= {f"{name}_answers": answered.item(), f"{name}_agree": spoken.right.float().mean().item()}
        return loss, parts

    def question(self, batch: Batch) -> tuple[Tensor, Tensor]:
        ids, mask = self.questions.tensors(batch.texts)
        return ids.to(batch.features.device), mask.to(batch.features.device)

    def weigh(self, batch: Batch, question: tuple[Tensor, Tensor]) -> Weighed:
        """As `RelevanceAllocator.weigh`, computing each image's places once for all its questions."""
        if self.allocator.zero_shot is not None:
            maps = batch.maps[batch.owner]
            known = self.allocator.zero_shot(batch.features[batch.owner], *question)
            return self.allocator.from_known(maps[:, 0], maps[:, 1], known)
        places = None
        if self.allocator.participatory is not None:
            places = self.allocator.participatory.places(batch.features)[batch.owner]
        maps = batch.maps[batch.owner]
        return self.allocator.balance(maps[:, 0], maps[:, 1], places, *question)

    def read(self, batch: Batch, weighed: Weighed, question: tuple[Tensor, Tensor]) -> Tensor:
        """Visual tokens [R, 32, H] within the budgets."""
        allocation = self.allocator.allocation
        closely = batch.detail is not None
        cells, tensions = weighed.cells, weighed.tensions
        if batch.noise is not None:  # the Q-Former must get used to any choice, or the comparison would not be fair
            guided = (torch.arange(len(cells), device=cells.device) % 2 == 0)[:, None]
            cells, tensions = torch.where(guided, cells, batch.noise), torch.where(guided, tensions, tensions.detach())
        choice = choose(self.allocator, cells, tensions, batch.budget, closer=closely)
        tokens = allocation.sources(batch.features, self.allocator.detail(batch.features, batch.detail))
        return self.reader.visual(tokens, gates_of(allocation, choice), batch.owner, question)

    @torch.no_grad()
    def settle_level(self, drawer: Drawer, most: int = 960) -> None:
        """Shift relevance so that the most relevant patch is GREATEST in the median: which patches lead stays the same.

        `divergence` teaches which patches, and leaves the level open. Settling twice changes nothing.
        """
        if self.allocator.participatory is not None:
            greatest = torch.logit(torch.from_numpy(self.relevance(drawer.first(most)).max(1)))
            self.allocator.participatory.bias += torch.logit(torch.tensor(GREATEST)) - greatest.median()

    @torch.no_grad()
    def relevance(self, drawer: Drawer, at_once: int = 64) -> np.ndarray:
        """What each of the drawer's questions is about, float32 [Q, 256] in [0, 1]."""
        found = []
        for first in range(0, len(drawer.asked), at_once):
            rows = range(first, min(first + at_once, len(drawer.asked)))
            batch = drawer.batch(rows, [CELL_COUNT] * len(rows), False)
            found.append(self.weigh(batch, self.question(batch)).scores[:, 2].cpu().numpy())
        return np.concatenate(found)

    def whole(self, batch: Batch, question: tuple[Tensor, Tensor]) -> Tensor:
        """Visual tokens [R, 32, H] of the full view."""
        tokens = self.allocator.allocation.sources(batch.features)
        with without(self.reader.qformer) if len(self.adapters) else nullcontext():
            return self._whole(batch, tokens, question)

    def _whole(self, batch: Batch, tokens: Tensor, question: tuple[Tensor, Tensor]) -> Tensor:
        if self.reader.reads_question:
            return self.reader.visual(tokens, full_view(len(batch.owner)).to(tokens), batch.owner, question)
        images = torch.arange(len(tokens), device=tokens.device)  # all questions about an image share them
        return self.reader.visual(tokens, full_view(len(tokens)).to(tokens), images, question)[batch.owner]


def divergence(relevance: Tensor, importance: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence, nats, of relevance from importance, both [R, 256] in [0, 1].

    Each is taken as a distribution over the patches: the odds of relevance, and the square of importance. So a patch
    that matters for one answer by chance costs little, and what matters most for every answer about a thing leads.
    """
    odds = torch.logit(relevance.clamp(1e-6, 1 - 1e-6))
    target = importance.square()
    return functional.kl_div(
        odds.log_softmax(1), target / target.sum(1, keepdim=True).clamp(min=1e-20), reduction="batchmean"
    )


@dataclass
class Drawer:
    """Draw batches from kept features and the teacher's lessons."""

    store: FeatureStore
    asked: Sequence[Asked]
    lessons: Lessons
    schedule: Schedule
    device: torch.device
    adapters: bool = False  # whether every second question has its cells ranked by chance

    def __post_init__(self) -> None:
        self._of: dict[int, list[int]] = {}
        for number, one in enumerate(self.asked):
            self._of.setdefault(one.image, []).append(number)
        self._images = sorted(self._of)
        self._closer = [image for image in self._images if image in self.store.closer]
        self._nearer = {
            image: near
            for image in self._closer
            if (near := [number for number in self._of[image] if self.lessons.nearer[number]])
        }

    def first(self, most: int) -> Drawer:
        """A drawer of the first questions."""
        rows = range(min(most, len(self.asked)))
        return replace(self, asked=[self.asked[row] for row in rows], lessons=self.lessons.of(rows))

    def draw(self, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """This process's share of a step's batches."""
        rng = np.random.default_rng((self.schedule.seed, step))
        only_map = step < self.schedule.relevance_steps
        found = []
        for images, number, closely in (
            [(self._images, self.schedule.map_images, False)]
            if only_map
            else [
                (self._images, self.schedule.images, False),
                (list(self._nearer) or self._closer, self.schedule.closer_images, True),
            ]
        ):
            if images and number:
                total = -(-number // ranks) * ranks
                chosen = [images[i] for i in rng.integers(len(images), size=total)]
                rows = [self._question(rng, image, closely) for image in chosen for _ in range(self.schedule.asked)]
                budgets = draw_budgets(rng, len(rows), closely, self.schedule.thirds)
                here = slice(rank * total // ranks, (rank + 1) * total // ranks)
                mine = slice(here.start * self.schedule.asked, here.stop * self.schedule.asked)
                noise = torch.from_numpy(rng.random((len(rows), CELL_COUNT), np.float32)[mine]).to(self.device)
                batch = self.batch(rows[mine], budgets[mine], closely)
                found.append(replace(batch, only_map=only_map, noise=noise if self.adapters else None))
        return found

    def _question(self, rng: np.random.Generator, image: int, closely: bool) -> int:
        """A question about this image; with the closer view, every second one is answered from nearer."""
        near = self._nearer.get(image, [])
        return int(rng.choice(near if closely and near and rng.random() < 0.5 else self._of[image]))

    def batch(self, rows: Sequence[int], budgets: Sequence[int], closely: bool) -> Batch:
        """The questions of these numbers, each with its fixed budget of vision tokens."""
        images = sorted({self.asked[row].image for row in rows})
        features, maps = self.store.take(images)
        spent = torch.tensor(list(budgets), dtype=torch.int32)
        visual = torch.full_like(spent, QUERIES)
        # An answer from nearer cannot be given from the whole view, and is sure with the closer one.
        sure = [float(closely) if self.lessons.nearer[row] else self.lessons.weight(row) for row in rows]
        return Batch(
            features.to(self.device),
            maps.to(self.device),
            detail_of(self.store.take_crops(images)).to(self.device) if closely else None,
            torch.tensor([images.index(self.asked[row].image) for row in rows], device=self.device),
            [self.asked[row].text for row in rows],
            [self.lessons.answers[row] for row in rows],
            torch.tensor(sure, device=self.device),
            torch.from_numpy(self.lessons.importance[list(rows)].astype(np.float32)).to(self.device),
            torch.stack([spent, spent, visual, visual], dim=1).to(self.device),
        )


def draw_budgets(rng: np.random.Generator, number: int, closely: bool, thirds: tuple[float, float, float]) -> list[int]:
    """Vision tokens from 64 to the most, by weights of the thirds."""
    most = MAX_VISION_TOKENS if closely else MOST_TOKENS
    place = (rng.choice(3, number, p=np.array(thirds) / sum(thirds)) + rng.random(number)) / 3
    return [int(tokens) for tokens in np.round(CELL_COUNT + place * (most - CELL_COUNT))]


def accelerator_of() -> Accelerator:
    """The processes of this training: one, or those that `torchrun` or `accelerate launch` started."""
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)  # the closer view has no turn in some steps
    patient = InitProcessGroupKwargs(timeout=PATIENCE)
    return Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[unused, patient])


class Training:
    """A training that continues after a kill."""

    def __init__(
        self, accelerator: Accelerator, student: Student, schedule: Schedule, out: Path, lessons: str = ""
    ) -> None:
        """lessons: what is learned from, and by which adapters. A checkpoint of others, or of another schedule, is not
        continued.
        """
        self.accelerator, self.student, self.schedule, self.out = accelerator, student, schedule, out
        self.step = 0
        self._key = f"{lessons} {replace(schedule, checkpoint_s=0)}"
        self._path = out / "training.pt"
        allocator = student.allocator
        groups = [
            {"params": list(part.parameters()), "lr": schedule.rate}
            for part in (allocator.participatory, allocator.balancing, allocator.closer)
            if part is not None
        ]
        if len(student.adapters):
            groups.append({"params": list(student.adapters), "lr": schedule.rate / 3})
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self._rates = [group["lr"] for group in groups]
        self._resume()
        self._model, self._optimizer = accelerator.prepare(student, self._optimizer)
        self._board = board(out) if accelerator.is_main_process else None

    @property
    def finished(self) -> bool:
        return self.step >= self.schedule.relevance_steps + self.schedule.steps

    def _resume(self) -> None:
        if not self._path.exists():
            return
        saved = torch.load(self._path, map_location="cpu", weights_only=True)
        if saved.get("key") != self._key:
            return
        self.student.load_state_dict(saved["student"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]

    def save(self) -> None:
        """Save atomically: a kill leaves the previous or the new checkpoint."""
        if not self.accelerator.is_main_process:
            return
        partial = self._path.with_suffix(".partial")
        told = {
            "key": self._key, "student": self.student.state_dict(), "optimizer": self._optimizer.state_dict(),
            "step": self.step,
        }  # fmt: skip
        torch.save(told, partial)
        os.replace(partial, self._path)

    def run(self, drawer: Drawer, stop_after: int | None = None, relevance: bool = False) -> None:
        """Train to the end, or to the end of relevance. stop_after: end after this many steps, as a kill would."""
        main, schedule = self.accelerator.is_main_process, self.schedule
        last = schedule.relevance_steps + (0 if relevance else schedule.steps)
        bar = tqdm(
            total=last, initial=self.step, desc="relevance" if relevance else "training", unit="step", mininterval=2,
            disable=not main,
        )  # fmt: skip
        saved_at, done = time.monotonic(), 0
        while self.step < last and done != stop_after:
            self._set_rates()
            batches = drawer.draw(self.step, self.accelerator.process_index, self.accelerator.num_processes)
            loss, parts = self._model(batches)
            self.accelerator.backward(loss)
            self._leave_untrained()
            norms = self.norms()
            self.accelerator.clip_grad_norm_(self._model.parameters(), CLIPPED)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.step, done = self.step + 1, done + 1
            if main:
                self._log({"loss": loss.item(), **parts, **norms})
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.update()
            if self.step == last or time.monotonic() - saved_at > schedule.checkpoint_s:
                self.save()
                saved_at = time.monotonic()
        bar.close()
        self.accelerator.wait_for_everyone()

    def _set_rates(self) -> None:
        """A rise, and a fall to zero along half a cosine, for relevance and then for the whole."""
        schedule = self.schedule
        alone = self.step < schedule.relevance_steps
        done = (
            self.step / schedule.relevance_steps if alone else (self.step - schedule.relevance_steps) / schedule.steps
        )
        share = min(1.0, (done + 1e-3) / WARMUP) * 0.5 * (1 + float(np.cos(np.pi * done)))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share

    def _leave_untrained(self) -> None:
        """Drop the gradients of what this step does not train: relevance has its own steps, and its level is settled.

        The gradient of the answers would come to relevance through the choice of tokens, and is mostly noise there.
        AdamW would count DDP's zero gradients.
        """
        allocator, alone = self.student.allocator, self.step < self.schedule.relevance_steps
        relevance = [] if allocator.participatory is None else list(allocator.participatory.parameters())
        own = {id(parameter) for parameter in relevance}
        for parameter in self.student.parameters():
            if (id(parameter) in own) != alone:
                parameter.grad = None
        if allocator.participatory is not None:
            allocator.participatory.bias.grad = None

    def norms(self) -> dict[str, float]:
        """Gradient norm of each part, before clipping."""
        allocator, found = self.student.allocator, {}
        parts = {name: getattr(allocator, name) for name in ("participatory", "balancing", "closer")}
        parts["adapters"] = self.student.adapters
        for name, part in parts.items():
            gradients = [p.grad for p in part.parameters() if p.grad is not None] if part is not None else []
            if gradients:
                found[f"gradient_{name}"] = torch.stack([g.norm() for g in gradients]).norm().item()
        return found

    def _log(self, told: dict[str, float]) -> None:
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps({"step": self.step} | {k: float(f"{v:.5g}") for k, v in told.items()}) + "\n")
        if self._board is not None:
            for name, value in told.items():
                self._board.add_scalar(name, value, self.step)


def board(out: Path) -> Any:
    """TensorBoard's writer, or None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (optional)
    except ImportError:
        return None
    return SummaryWriter(out / "tensorboard")
