"""Stage `allocator`: train the allocator and a Q-Former that makes the most of its tokens.

The encoder and the language model stay frozen. Only the language model's learned positions move, because prefixes of 64
to 128 visual tokens put words at positions that had none. Participatory knowing (its masks stay as an auxiliary loss),
opponent processing, the closer view and the Q-Former are trained on answers. Each question has its own allocation,
through the discrete choice (`relaxation.py`), under random budgets. At the end particularize is fitted (`settling.py`),
then the positions after 64 visual tokens (`prefixes.py`). Every policy that the allocator is compared with gets the
same share of the questions, so that the Q-Former is trained equally on each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from build_engines.model import fingerprint
from build_engines.model.allocation import CELL_COUNT
from build_engines.model.knowing import mean_meaning
from build_engines.scenes.held_out import NEW, PAIRS, SMALL
from build_engines.scenes.questions import TYPES
from build_engines.scenes.world import SMALL_PRINT, WIDE, WIDE_SMALL_PRINT, World
from build_engines.train import keeping, replicas
from build_engines.train.architecture import QUERIES
from build_engines.train.course import Course, Measures
from build_engines.train.evaluation import Arm, Chain, Exam, answer, held_out_exam, summarise
from build_engines.train.joint_stage import WEIGHTS
from build_engines.train.lesson import Lesson
from build_engines.train.looking import Looking
from build_engines.train.looks import Eye, LookStore
from build_engines.train.prefixes import settle_positions
from build_engines.train.relevance import question_tensors
from build_engines.train.selection import GUIDED
from build_engines.train.settling import SHARES, Curves, settle
from build_engines.train.settling import STEPS as SETTLING_STEPS
from build_engines.train.spending import Price, ceiling
from build_engines.train.stages import Plan, device

STEPS = 1500
START_STEPS = 225  # from a published checkpoint
PLAIN = [World(), WIDE, World(unnamed_share=0.4), WIDE, World(), replace(WIDE, unnamed_share=0.4)]
CLOSE = [SMALL_PRINT, WIDE_SMALL_PRINT, SMALL_PRINT, WIDE, WIDE_SMALL_PRINT, World(), WIDE_SMALL_PRINT, WIDE]
STORED_PLAIN, STORED_CLOSE = 1500, 800  # scenes, per replica
START_PLAIN, START_CLOSE = 720, 400  # from a published checkpoint
IMAGES_PLAIN, IMAGES_CLOSE, ASKED = 10, 4, 5  # a step, per replica; questions an image
FOCUSED_IMAGES = 1  # of the plain ones, with questions read by 2 to 4 groups of queries
SMALL_PRINT_WEIGHTS = dict.fromkeys(("colour", "shape", "exist", "relation", "size"), 0.7) | {"count": 1.0, "read": 6.0}
FAR_SHARE = 0.25  # of the steps: questions about scenes with a closer view do not use it
TARGET_TOKENS = 106.0  # mean over the question types, on plain scenes, until particularize is fitted
NOISE = 0.4  # Gumbel temperature at the start; it falls to zero
VALIDATED = 60  # scenes of each split
VALIDATION_FROM = 100_000  # held-out scenes that no report uses
CHECK_STEPS = 125
SETTLED_PLAIN, SETTLED_CLOSE, SETTLED_ASKED = 1200, 400, 4  # stored scenes at scale 1, questions about each
SETTLED_AT_ONCE = 10
POSITION_STEPS = 160


def train_allocator(plan: Plan) -> None:
    looking = Looking(plan)
    looking.start_from(plan)
    steps = plan.steps(START_STEPS if plan.start else STEPS)
    course = Course(
        plan, "allocator", steps, looking.modules, looking.optimizers(), decay_share=0.7,
        state={"price": 0.03, "spent": {}, "settled": False}, norms=looking.gradient_norms,
    )  # fmt: skip
    course.resume()
    if course.finished and course.state.get("settled"):
        return
    eye = Eye.training(looking.model.vision_model, plan)
    plain = LookStore(eye, PLAIN, False, (5, replicas.rank(), 0))
    close = LookStore(eye, CLOSE, True, (5, replicas.rank(), 1))
    stored = (START_PLAIN, START_CLOSE) if plan.start else (STORED_PLAIN, STORED_CLOSE)
    sizes = {"plain": (plain, plan.size(stored[0], 4)), "close": (close, plan.size(stored[1], 2))}
    fill(plan, sizes, fingerprint.of_modules(looking.model.vision_model))
    images, close_images = plan.size(IMAGES_PLAIN, 3), plan.size(IMAGES_CLOSE, 2)

    def losses(rng: np.random.Generator) -> Iterator[tuple[Tensor, Measures]]:
        price = Price(TARGET_TOKENS, course.state["price"], course.state["spent"])
        lesson = Lesson(looking, rng, price, NOISE * (1 - course.step / course.steps))
        plain.renew(rng, 1)
        if course.step % 3 == 0:
            close.renew(rng, 1)
        batch = plain.draw(rng, images)
        main, focused = batch.take(range(FOCUSED_IMAGES, images)), batch.take(range(FOCUSED_IMAGES))
        groups = int(rng.integers(2, 5))
        near = close.draw(rng, close_images)
        far = rng.random() < FAR_SHARE
        for looks, weights, closely, used in (
            (main, WEIGHTS, False, 1), (focused, WEIGHTS, False, groups), (near, SMALL_PRINT_WEIGHTS, not far, 1),
        ):  # fmt: skip
            rows = lesson.ask(looks, weights, plan.size(ASKED, 2), closely, used)
            if not len(rows):  # a scene with only unnamed hues
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
        settle(looking.balancing, Curves.joined(curves), plan.size(SETTLING_STEPS, tiny=20))
        settle_positions(looking, plain.kept, plan.steps(POSITION_STEPS))
        course.state |= {"settled": True}
        course.log({"valid": validate(), "state": course.state})
        course.save()


@torch.no_grad()
def measured(looking: Looking, store: LookStore, scenes: int, closely: bool) -> Curves:
    """Measure the losses of questions about stored scenes at each share of the room.

    All types are equally frequent; with a closer view, most questions are about small print.
    """
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


def fill(plan: Plan, stores: dict[str, tuple[LookStore, int]], encoder: str) -> None:
    """Load looks of an earlier start of the same run, or encode new ones, which takes minutes.

    encoder: names its weights; looks of others are not loaded. Looks renewed since then are lost.
    """
    path = plan.out / f"looks_{replicas.rank()}.pt"
    key = f"{encoder} {[size for _, size in stores.values()]}"
    if (saved := keeping.load(path, key)) is not None:
        for name, (store, _) in stores.items():
            store.load(saved[name])
        return
    for store, size in stores.values():
        store.fill(size, 4 if size % 4 == 0 else 1)
    keeping.save(path, key, {name: store.state() for name, (store, _) in stores.items()})


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
