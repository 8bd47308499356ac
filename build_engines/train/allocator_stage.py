"""Stage `allocator`: where to look more closely, and a Q-Former that makes the most of it.

The encoder and the language model stay as they are; of the latter only the learned positions move, because prefixes of
64 to 128 visual tokens put words where none ever stood. Participatory knowing (its masks stay as an auxiliary loss),
opponent processing, the closer view and the Q-Former are trained on answers, one allocation for each question, through
the discrete choice (`relaxation.py`), under random budgets; at the end particularize is settled (`settling.py`). Every
way of choosing that the allocator is compared with gets the same share of the questions, so that the Q-Former is as
used to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Blip2ForConditionalGeneration

from build_engines.model.allocation import CELL_COUNT
from build_engines.model.allocator import RelevanceAllocator, Weighed
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.closer import CloserView
from build_engines.model.knowing import ParticipatoryKnowing, mean_meaning
from build_engines.model.qformer import QFormer
from build_engines.model.relaxation import Choice, choose, gates_of, region_gates
from build_engines.scenes.held_out import NEW, PAIRS, SMALL
from build_engines.scenes.questions import DESCRIBE, TYPES, Question
from build_engines.scenes.world import GRID, SMALL_PRINT, World
from build_engines.train import replicas
from build_engines.train.adapters import adapt
from build_engines.train.architecture import QUERIES, new_model
from build_engines.train.course import Course, Measures
from build_engines.train.evaluation import Arm, Chain, Exam, answer, held_out_exam, summarise
from build_engines.train.joint_stage import WEIGHTS
from build_engines.train.language import decoder_of, row_losses
from build_engines.train.looks import Eye, Looks, LookStore
from build_engines.train.packing import Packer
from build_engines.train.queries import SlotReadout, slot_loss
from build_engines.train.relevance import SHOWN, question_tensors
from build_engines.train.selection import GUIDED, TENSIONS, TRAINED, select_each
from build_engines.train.settling import SHARES, Curves, settle
from build_engines.train.spending import LARGE_BUDGETS, ROOM, UNIFORM_BUDGETS, Price, ceiling, draw_budgets
from build_engines.train.stages import Plan, device, mixed, muon_and_adam, tensor
from build_engines.train.store import questions_about
from build_engines.train.symbols import SlotTable, slot_tensors
from build_engines.train.tokens import new_tokenizer

STEPS = 1500
PLAIN = [World(), World(), World(unnamed_share=0.4)]
CLOSE = [SMALL_PRINT, SMALL_PRINT, SMALL_PRINT, World(), World()]
STORED_PLAIN, STORED_CLOSE = 1500, 800  # scenes, per replica
IMAGES_PLAIN, IMAGES_CLOSE, ASKED = 10, 4, 5  # a step, per replica; questions an image
SMALL_PRINT_WEIGHTS = {
    "read": 6.0,
    "colour": 0.7,
    "shape": 0.7,
    "count": 1.0,
    "exist": 0.7,
    "relation": 0.7,
    "size": 0.7,
}
FAR_SHARE = 0.25  # of the questions about scenes with a closer view that do without it
ADAPTIVE_SHARE = 0.5  # of the guided questions that spend as particularize says; the others have a fixed budget
FOCUSED_IMAGES = 2  # a step, whose questions are read with 2 to 4 groups of queries
HALVED_SHARE = 0.05  # of the other questions that hand on the first 16 queries only
FEW_QUERIES = 16
TARGET_TOKENS = 106.0  # mean over the question types, on plain scenes
NOISE = 0.4  # Gumbel temperature at the start; it falls to zero
DEAD_POSITIONS = 96  # from here on the language model's positions were never trained
VALIDATED = 60  # scenes of each split
SETTLED_PLAIN, SETTLED_CLOSE, SETTLED_ASKED = 1200, 400, 4  # stored scenes at scale 1, questions about each
SETTLED_AT_ONCE = 10
VALIDATION_FROM = 100_000  # held-out scenes that no report uses
CHECK_STEPS = 125


@dataclass
class Rows:
    """Questions about a batch of looks: row i asks question i about image owner[i] and gets its cells by its policy."""

    looks: Looks
    owner: Tensor
    questions: list[Question]
    policies: list[str]
    budget: Tensor  # int32 [R, 4]
    closely: bool

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def guided(self) -> Tensor:
        """bool [R]."""
        return torch.tensor([policy == GUIDED for policy in self.policies], device=self.owner.device)

    def truth(self) -> Tensor:
        """float [R, 256]: the patches that show what is asked about."""
        coverage = self.looks.coverage
        shares = [
            coverage[scene][list(question.asked)].max(0).reshape(GRID * GRID)
            for scene, question in zip(self.owner.tolist(), self.questions, strict=True)
        ]
        return tensor((np.stack(shares) > SHOWN).astype(np.float32))


class Looking:
    """The chain behind the encoder and its training-only parts."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(5)
        self.large_budgets = plan.large_budgets
        self.tokenizer = new_tokenizer()
        self.model: Blip2ForConditionalGeneration = new_model(self.tokenizer, plan.config(self.tokenizer))
        width = self.model.config.vision_config.hidden_size
        self.participatory = ParticipatoryKnowing(len(self.tokenizer), width)
        self.balancing = OpponentProcessing(self.participatory.coupling_width)
        self.closer = CloserView(width)
        self.readout = SlotReadout(self.model.config.qformer_config.hidden_size)
        self.table = SlotTable(self.model.config.text_config.hidden_size)
        for module in (*self.modules.values(), self.table):
            module.to(device())
        self.model.set_attn_implementation("sdpa")
        self.model.requires_grad_(False)
        self.allocator = RelevanceAllocator(self.participatory, self.balancing, self.closer).to(device())
        self.qformer = QFormer(self.model)
        self.qformer.requires_grad_(True)
        self.positions = self.model.language_model.model.decoder.embed_positions
        self.positions.requires_grad_(True)
        self.adapter_rank, self.adapters = plan.adapter_rank, list[nn.Parameter]()
        self.packer = Packer(self.tokenizer)
        self._decode = decoder_of(self.model.language_model)

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {
            "model": self.model,
            "participatory": self.participatory,
            "balancing": self.balancing,
            "closer": self.closer,
            "readout": self.readout,
        }

    def start_from(self, plan: Plan) -> None:
        """The weights that the stage `joint` left. Dead positions start as those of the words of a 32-token prefix."""
        joint = plan.finished("joint")
        for name in ("model", "participatory", "readout"):
            self.modules[name].load_state_dict(joint[name])
        self.table.load_state_dict(plan.finished("language")["table"])
        rows = self.positions.weight.data
        start = len(rows) - self.model.config.text_config.max_position_embeddings  # OPT counts from 2
        words = rows[start + QUERIES : start + DEAD_POSITIONS].clone()
        rows[start + DEAD_POSITIONS : start + 4 * QUERIES] = words[:QUERIES]
        rows[start + 4 * QUERIES : start + 4 * QUERIES + len(words)] = words
        if self.adapter_rank:
            self.adapters = adapt(self.model.language_model, self.adapter_rank)
            self.positions.requires_grad_(True)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The Q-Former moves gently: it was good already. What is new moves fast."""
        model = self.model
        seeing = [self.qformer.layernorm, model.language_projection, self.readout, self.positions]
        gentle = muon_and_adam(
            [model.qformer.encoder],
            [model.query_tokens, *(p for module in seeing for p in module.parameters())],
            muon=0.003,
            adam=4e-4,
        )
        groups = [
            {"params": list(self.participatory.parameters()), "lr": 4e-4},
            {"params": list(self.balancing.parameters()), "lr": 2e-3},
            {"params": list(self.closer.parameters()), "lr": 2e-3},
        ]
        if self.adapters:
            groups.append({"params": self.adapters, "lr": 5e-4})
        return [*gentle, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)]

    def gradient_norms(self) -> Measures:
        """Of each part, before clipping."""
        out, half = self.balancing.out, self.balancing.out.out_features // 2
        parts = {
            "participatory": [p.grad for p in self.participatory.parameters()],
            "weights": [out.weight.grad[:half], out.bias.grad[:half]],
            "tensions": [out.weight.grad[half:], out.bias.grad[half:]],
            "balancing": [p.grad for p in self.balancing.parameters()],
            "closer": [p.grad for p in self.closer.parameters()],
            "qformer": [p.grad for p in self.qformer.parameters()],
        }
        return {
            f"gradient_{name}": torch.stack([g.norm() for g in found if g is not None]).norm().item()
            for name, found in parts.items()
            if any(g is not None for g in found)
        }

    def weigh(self, rows: Rows) -> Weighed:
        """As `RelevanceAllocator.weigh`, with each image's places made once for all its questions."""
        ids, mask = question_tensors(self.tokenizer, rows.questions)
        places = self.participatory.places(rows.looks.features.float())
        maps = rows.looks.maps[rows.owner]
        return self.allocator.balance(maps[:, 0], maps[:, 1], places[rows.owner], ids, mask)

    def choose(self, rows: Rows, weighed: Weighed, noise: Tensor, temperature: float) -> tuple[Choice, Tensor]:
        """What is refined, and what ranks the cells [R, 64]; only guided rows teach the allocator."""
        cells, tensions = select_each(rows.policies, weighed, noise)
        guided = rows.guided[:, None]
        cells = torch.where(guided, cells, cells.detach())
        tensions = torch.where(guided, tensions, tensions.detach())
        made = choose(
            self.allocator.allocation, cells, tensions, rows.budget, closer=rows.closely, temperature=temperature
        )
        return made, cells

    def read(self, rows: Rows, choice: Choice, cells: Tensor, groups: int = 1) -> Tensor:
        """The Q-Former's outputs, float32 [R, 32 * groups, its width]."""
        features = rows.looks.features.float()
        detail = self.closer(features, rows.looks.detail.float()) if rows.closely else None
        # Tokens are an image's, gates a question's.
        candidates = self.allocator.allocation.sources(features, detail)
        gates = gates_of(self.allocator.allocation, choice)
        regions = self.allocator.focus(cells.detach(), torch.full_like(rows.budget[:, :1], groups))
        with mixed():
            outputs = [self.qformer.read(candidates, gates=gates, owner=rows.owner)]
            for region in range(1, groups):
                inside = region_gates(self.allocator.allocation, gates, regions, region)
                outputs.append(self.qformer.read(candidates, gates=inside, owner=rows.owner))
        return torch.cat(outputs, dim=1).float()

    def answer(self, outputs: Tensor, questions: list[Question]) -> tuple[Tensor, Tensor]:
        """The loss [R] and whether the answer is right, bool [R]."""
        prefix = self.model.language_projection(outputs)
        rows = self.packer.rows(questions, prefix.shape[1])
        with mixed():
            return row_losses(self.model.language_model, self._decode, prefix, rows)


class Lesson:
    """What one step asks: questions, policies and budgets, and what is learned from the answers."""

    def __init__(self, looking: Looking, rng: np.random.Generator, price: Price, temperature: float) -> None:
        self.looking, self.rng, self.price, self.temperature = looking, rng, price, temperature
        self.thirds = LARGE_BUDGETS if looking.large_budgets else UNIFORM_BUDGETS
        self.measures: Measures = {}

    def ask(self, looks: Looks, weights: dict[str, float], asked: int, closely: bool, groups: int = 1) -> Rows:
        """Up to `asked` questions about each image, with their policies and budgets drawn."""
        owner, questions = [], []
        for scene, things in enumerate(looks.scenes):
            found = questions_about(self.rng, things, weights, asked)
            owner += [scene] * len(found)
            questions += found
        # Equal shares, whatever the number: a shuffled round of all policies. With the closer view, which is for the
        # asked object alone, every other one is guided.
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
        """The loss of these rows, and everything that is told of them in `measures`."""
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
        """Some rows hand on the first queries only; descriptions are long and go by themselves."""
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
        """What their tokens cost the rows that spend as particularize says."""
        extra = self.looking.allocator.allocation.extra(weighed.tensions[:, :1], rows.budget, rows.closely)[:, 0]
        adaptive = rows.guided & (rows.budget[:, 0] < rows.budget[:, 1])
        return self.price.price * (extra * adaptive).mean() / ROOM

    def _report(self, rows: Rows, outputs: Tensor, which: Tensor) -> Tensor:
        """The slots stay: they keep what was learned from symbols. Not for guided rows (`which` is bool [R]): a slot
        wants to know of every object, whatever is asked, and would teach the allocator to look everywhere."""
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
    """Cross-entropy of participatory knowing [R, 256] against what is asked about; shown patches count threefold, as
    they are few."""
    return functional.binary_cross_entropy(relevance.clamp(1e-5, 1 - 1e-5), truth, weight=1 + 2 * truth)


def train_allocator(plan: Plan) -> None:
    looking = Looking(plan)
    looking.start_from(plan)
    course = Course(
        plan.out, "allocator", plan.steps(STEPS), looking.modules, looking.optimizers(), decay_share=0.7,
        state={"price": 0.03, "spent": {}, "settled": False}, norms=looking.gradient_norms,
    )  # fmt: skip
    course.resume()
    if course.finished and course.state.get("settled"):
        return
    eye = Eye.training(looking.model.vision_model, plan)
    plain = LookStore(eye, PLAIN, False, (5, replicas.rank(), 0))
    close = LookStore(eye, CLOSE, True, (5, replicas.rank(), 1))
    fill(plan, {"plain": (plain, plan.size(STORED_PLAIN, 4)), "close": (close, plan.size(STORED_CLOSE, 2))})
    images, close_images = plan.size(IMAGES_PLAIN, 3), plan.size(IMAGES_CLOSE, 2)

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        price = Price(TARGET_TOKENS, course.state["price"], course.state["spent"])
        lesson = Lesson(looking, rng, price, NOISE * (1 - course.step / course.steps))
        plain.renew(rng, 1)
        if course.step % 3 == 0:
            close.renew(rng, 1)
        batch = plain.draw(rng, images)
        main, focused = batch.take(range(1, images)), batch.take([0])
        groups = int(rng.integers(2, 5))
        near = close.draw(rng, close_images)
        far = rng.random() < FAR_SHARE
        for looks, weights, closely, used in (
            (main, WEIGHTS, False, 1), (focused, WEIGHTS, False, groups), (near, SMALL_PRINT_WEIGHTS, not far, 1),
        ):  # fmt: skip
            rows = lesson.ask(looks, weights, plan.size(ASKED, 2), closely, used)
            if not len(rows):  # a scene of nothing but unnamed hues
                continue
            share = len(looks) / (images + close_images)
            yield lesson.learn(rows, used) * share, lesson.measures
            lesson.measures = {}
        course.state = {"price": price.price, "spent": price.spent, "settled": False}

    exams: dict[str, Exam] = {}

    def validate() -> Measures:
        chain = Chain(eye, looking.allocator, looking.qformer, looking.model.language_model, looking.tokenizer)
        if not exams:
            for split in (NEW, PAIRS, SMALL):
                exams[split] = held_out_exam(chain, split, plan.size(VALIDATED, 2), split == SMALL, VALIDATION_FROM)
        return validation(chain, exams)

    course.run(losses, validate, plan.size(CHECK_STEPS, 2))
    if replicas.rank() == 0:
        curves = [
            measured(looking, plain, plan.steps(SETTLED_PLAIN), False),
            measured(looking, close, plan.steps(SETTLED_CLOSE), True),
        ]
        settle(looking.balancing, Curves.joined(curves))
        course.state |= {"settled": True}
        course.log({"valid": validate(), "state": course.state})
        course.save()


@torch.no_grad()
def measured(looking: Looking, store: LookStore, scenes: int, closely: bool) -> Curves:
    """What questions about stored scenes lose at each share of the room; every type alike, most about small print where
    there is a closer view."""
    rng, parts = np.random.default_rng((6, closely)), []
    lesson = Lesson(looking, rng, Price(TARGET_TOKENS), 0.0)
    weights = SMALL_PRINT_WEIGHTS if closely else dict.fromkeys(TYPES, 1.0)
    for start in range(0, min(scenes, len(store.kept)), SETTLED_AT_ONCE):
        looks = store.kept.take(range(start, min(scenes, len(store.kept), start + SETTLED_AT_ONCE)))
        rows = lesson.ask(looks, weights, SETTLED_ASKED, closely)
        rows = replace(rows, policies=[GUIDED] * len(rows))
        weighed = looking.weigh(rows)
        losses = []
        for share in SHARES:
            spent = round(CELL_COUNT + share * (ceiling(closely) - CELL_COUNT))
            budget = torch.tensor([spent, spent, QUERIES, QUERIES], dtype=torch.int32, device=device())
            fixed = replace(rows, budget=budget.expand(len(rows), -1))
            choice, cells = looking.choose(fixed, weighed, weighed.cells, 0.0)
            losses.append(looking.answer(looking.read(fixed, choice, cells), rows.questions)[0])
        ids, mask = question_tensors(looking.tokenizer, rows.questions)
        kinds = torch.tensor([TYPES.index(question.type) for question in rows.questions], device=device())
        parts.append(
            Curves(
                weighed.scores,
                mean_meaning(looking.participatory.meanings(ids, mask), mask),
                torch.stack(losses, dim=1),
                torch.full((len(rows),), float(ceiling(closely) - CELL_COUNT), device=device()),
                kinds,
                torch.full((len(rows),), closely, device=device()),
            )
        )
    return Curves.joined(parts)


def fill(plan: Plan, stores: dict[str, tuple[LookStore, int]]) -> None:
    """Looks of an earlier start of the same run where there are any: encoding takes minutes. Looks renewed since are
    forgotten."""
    path = plan.out / f"looks_{replicas.rank()}.pt"
    if path.exists():
        saved = torch.load(path, map_location=device(), weights_only=False)
        for name, (store, _) in stores.items():
            store.load(saved[name])
        return
    for store, size in stores.values():
        store.fill(size, 4 if size % 4 == 0 else 1)
    torch.save({name: store.state() for name, (store, _) in stores.items()}, path)


SHORT = {NEW: "new", PAIRS: "pairs", SMALL: "small"}
ARMS = {
    NEW: {"64": Arm(vision_tokens=(64, 64)), "112": Arm(vision_tokens=(112, 112)), "256": Arm(vision_tokens=(256, 256)),
          "adaptive": Arm(), "random": Arm("random", (112, 112)), "uniform": Arm("uniform", (112, 112))},
    PAIRS: {"adaptive": Arm()},
    SMALL: {"low": Arm(), "high": Arm(vision_tokens=(64, 400), closer=True)},
}  # fmt: skip


def validation(chain: Chain, exams: dict[str, Exam]) -> Measures:
    measures: Measures = {}
    for split, arms in ARMS.items():
        for name, arm in arms.items():
            report, told = summarise(answer(chain, exams[split], arm)), f"{SHORT[split]}_{name}"
            measures[told] = report["all"]["accuracy"]
            if name in ("adaptive", "low", "high"):
                measures |= {f"{told}_{kind}_tokens": row["vision_tokens"] for kind, row in report.items()}
                if read := report.get("read"):
                    measures |= {f"{told}_read": read["accuracy"], f"{told}_on_asked": read["on_asked"]}
    return measures
