"""One step of the stage `allocator`: draw questions, policies and budgets, and compute the loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from build_engines.model.allocation import CELL_COUNT
from build_engines.model.allocator import Weighed
from build_engines.scenes.questions import DESCRIBE
from build_engines.train.architecture import QUERIES
from build_engines.train.course import Measures
from build_engines.train.looking import Looking, Rows
from build_engines.train.looks import Looks
from build_engines.train.queries import slot_loss
from build_engines.train.selection import GUIDED, TENSIONS, TRAINED
from build_engines.train.spending import LARGE_BUDGETS, ROOM, UNIFORM_BUDGETS, Price, ceiling, draw_budgets
from build_engines.train.stages import device, tensor
from build_engines.train.store import questions_about
from build_engines.train.symbols import slot_tensors

ADAPTIVE_SHARE = 0.5  # of the guided questions, which spend as particularize says; the others have a fixed budget
HALVED_SHARE = 0.05  # of the questions with one group, which use the first 16 queries only
FEW_QUERIES = 16


class Lesson:
    """Draw one step's questions, policies and budgets, and learn from the answers."""

    def __init__(self, looking: Looking, rng: np.random.Generator, price: Price, temperature: float) -> None:
        self.looking, self.rng, self.price, self.temperature = looking, rng, price, temperature
        self.thirds = LARGE_BUDGETS if looking.large_budgets else UNIFORM_BUDGETS
        self.measures: Measures = {}

    def ask(self, looks: Looks, weights: dict[str, float], asked: int, closely: bool, groups: int = 1) -> Rows:
        """Draw up to `asked` questions about each image, with their policies and budgets."""
        owner, questions = [], []
        for scene, things in enumerate(looks.scenes):
            found = questions_about(self.rng, things, weights, asked)
            owner += [scene] * len(found)
            questions += found
        # All policies get equal shares at any number of questions: a round of all policies is shuffled. With the closer
        # view, every second question is guided, because that view serves only the asked object.
        turn = int(self.rng.integers(len(TRAINED)))
        policies = [TRAINED[(turn + i) % len(TRAINED)] for i in range(len(questions))]
        if closely:
            policies = [GUIDED if i % 2 else policy for i, policy in enumerate(policies)]
        policies = [policies[i] for i in self.rng.permutation(len(policies))]
        fixed = draw_budgets(self.rng, len(questions), closely, self.thirds)
        adaptive = torch.from_numpy(self.rng.random(len(questions)) < ADAPTIVE_SHARE)
        adaptive &= torch.tensor([policy == GUIDED for policy in policies], dtype=torch.bool)
        least = torch.where(adaptive, float(CELL_COUNT), fixed)
        most = torch.where(adaptive, float(ceiling(closely)), fixed)
        visual = torch.full_like(fixed, QUERIES * groups)
        budget = torch.stack([least, most, visual, visual], dim=1).int().to(device())
        return Rows(looks, tensor(np.array(owner, np.int64)), questions, policies, budget, closely)

    def learn(self, rows: Rows, groups: int = 1) -> Tensor:
        """The loss of these rows. Adds their statistics to `measures`."""
        looking, guided = self.looking, rows.guided
        weighed = looking.weigh(rows)
        noise = tensor(self.rng.random((len(rows), CELL_COUNT)).astype(np.float32))
        choice, cells = looking.choose(rows, weighed, noise, self.temperature)
        outputs = looking.read(rows, choice, cells, groups)
        losses, right = self._answer(outputs, rows, groups)
        loss = losses.mean() + mask_loss(weighed.scores[:, 2], rows.truth())
        loss = loss + self._cost(rows, weighed)
        if not guided.all():
            loss = loss + self._report(rows, outputs[:, :QUERIES], ~guided)
        if rows.looks.detail is None:
            wanted = CELL_COUNT + weighed.tensions[:, 0].detach() * (ceiling(False) - CELL_COUNT)
            self.price.observe([question.type for question in rows.questions], wanted.tolist())
        self._tell("closely" if rows.closely else "plain" if groups == 1 else "focused", rows, right, weighed)
        return loss

    def _answer(self, outputs: Tensor, rows: Rows, groups: int) -> tuple[Tensor, Tensor]:
        """Answer the rows. Some use the first queries only; descriptions are long and run separately."""
        halved = self.rng.random(len(rows)) < HALVED_SHARE if groups == 1 else np.zeros(len(rows), bool)
        long = np.array([question.type == DESCRIBE for question in rows.questions])
        losses, right = outputs.new_zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool, device=outputs.device)
        for part in (~halved & ~long, halved & ~long, long):
            index = np.flatnonzero(part)
            if len(index):
                chosen = outputs[index, :FEW_QUERIES] if halved[index[0]] and not long[index[0]] else outputs[index]
                where = tensor(index)
                loss, exact = self.looking.answer(chosen, [rows.questions[i] for i in index])
                losses, right = losses.index_copy(0, where, loss), right.index_copy(0, where, exact)
        return losses, right

    def _cost(self, rows: Rows, weighed: Weighed) -> Tensor:
        """Token cost of the rows that spend as particularize says."""
        extra = self.looking.allocator.allocation.extra(weighed.tensions[:, :1], rows.budget, rows.closely)[:, 0]
        adaptive = rows.guided & (rows.budget[:, 0] < rows.budget[:, 1])
        return self.price.price * (extra * adaptive).mean() / ROOM

    def _report(self, rows: Rows, outputs: Tensor, which: Tensor) -> Tensor:
        """Slot losses, which keep what was learned from symbols. `which` is bool [R].

        Guided rows are excluded: a slot needs every object, whatever is asked, and would teach the allocator to look
        everywhere.
        """
        index = which.nonzero()[:, 0]
        slots = tuple(part[rows.owner[index]] for part in slot_tensors(rows.looks.scenes))
        reported, _ = slot_loss(self.looking.readout(outputs[index]), slots)
        target = self.looking.table(*slots).detach()
        weight = torch.where(slots[2], 4.0, 1.0)[..., None] / target.var()
        error = ((self.looking.model.language_projection(outputs[index]) - target).square() * weight).mean()
        return 0.2 * reported + 0.3 * error

    def _tell(self, name: str, rows: Rows, right: Tensor, weighed: Weighed) -> None:
        exact = right.float()
        self.measures[name] = exact.mean().item()
        for part, chosen in (("guided", rows.guided), ("other", ~rows.guided)):
            if chosen.any():
                self.measures[f"{name}_{part}"] = exact[chosen].mean().item()
        reading = torch.tensor([question.type == "read" for question in rows.questions], device=exact.device)
        if (chosen := reading & rows.guided).any():
            self.measures[f"{name}_guided_read"] = exact[chosen].mean().item()
        said = weighed.tensions.detach().mean(0).tolist()
        self.measures |= {f"{name}_{tension}": value for tension, value in zip(TENSIONS, said, strict=True)}


def mask_loss(relevance: Tensor, truth: Tensor) -> Tensor:
    """Cross-entropy of participatory knowing [R, 256] against the objects asked about.

    Shown patches have weight three, because they are few.
    """
    return functional.binary_cross_entropy(relevance.clamp(1e-5, 1 - 1e-5), truth, weight=1 + 2 * truth)
