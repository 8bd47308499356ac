"""Training the allocator: gradients, equal shares of arms, and spending by need."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from build_engines.model.allocation import cells_of
from build_engines.model.balancing import OpponentProcessing
from build_engines.scenes.held_out import NEW, SMALL
from build_engines.scenes.questions import Question
from build_engines.scenes.world import SMALL_PRINT, World
from build_engines.train.__main__ import main
from build_engines.train.adapters import adapt, merged
from build_engines.train.alternatives import main as alternatives
from build_engines.train.architecture import new_model
from build_engines.train.evaluation import Arm, Chain, answer, held_out_exam, paired, resampled, summarise
from build_engines.train.joint_stage import WEIGHTS
from build_engines.train.lesson import Lesson
from build_engines.train.looking import Looking, Rows
from build_engines.train.looks import Eye, Looks, LookStore
from build_engines.train.packing import Packer
from build_engines.train.prefixes import settle_positions
from build_engines.train.selection import POLICIES, TRAINED, centre_weight, on_asked
from build_engines.train.settling import SHARES, Curves, gains, needed, returns, settle
from build_engines.train.spending import LARGE_BUDGETS, WHOLE_SHARE, Price, draw_budgets
from build_engines.train.stages import Plan
from build_engines.train.tokens import EOS, new_tokenizer

pytestmark = pytest.mark.slow

PARTS = ("participatory", "weights", "tensions", "balancing", "closer", "qformer")


@pytest.fixture(scope="module")
def chain(tiny_training: Path) -> Chain:
    return Chain.load(tiny_training / "checkpoint")


@pytest.fixture(scope="module")
def looking(tiny_training: Path) -> Looking:
    looking = Looking(Plan(tiny_training, compiled=False, tiny=True))
    looking.start_from(Plan(tiny_training, tiny=True))
    return looking


def looks_of(looking: Looking, world: World, number: int, closely: bool) -> Looks:
    eye = Eye.training(looking.model.vision_model, Plan(Path(), compiled=False, tiny=True))
    return eye.draw(np.random.default_rng(1), [world] * number, closely)


def test_the_log_tells_the_gradient_norm_of_every_part(tiny_training: Path) -> None:
    records = [json.loads(line) for line in (tiny_training / "log.jsonl").read_text().splitlines()]
    told = [record["train"] for record in records if record["stage"] == "allocator" and "train" in record]
    assert told
    for part in PARTS:
        assert any(row.get(f"gradient_{part}", 0.0) > 0 for row in told), part


def test_a_killed_stage_goes_on(tiny_training: Path, tmp_path: Path) -> None:
    """Mark the finished checkpoint as unfinished one step earlier, then resume and publish it."""
    out = tmp_path / "killed"
    shutil.copytree(tiny_training, out)
    saved = torch.load(out / "allocator.pt", weights_only=False)
    fresh = Looking(Plan(out, compiled=False, tiny=True)).optimizers()
    saved |= {"finished": False, "step": saved["step"] - 1, "optimizers": [one.state_dict() for one in fresh]}
    torch.save(saved, out / "allocator.pt")
    shutil.rmtree(out / "checkpoint")
    arguments = ["--out", str(out), "--tiny", "--eager", "--threads", "1", "--stages", "allocator", "--resume"]
    assert main(arguments) == 0
    assert torch.load(out / "allocator.pt", weights_only=False)["finished"]
    assert (out / "checkpoint" / "allocator.safetensors").exists()


@pytest.mark.parametrize("closely", [False, True])
def test_answers_teach_the_scorer_and_the_balancer(looking: Looking, closely: bool) -> None:
    """Gradients through the discrete choice alone: no mask, no price, no auxiliary loss."""
    looks = looks_of(looking, SMALL_PRINT if closely else World(), 2, closely)
    lesson = Lesson(looking, np.random.default_rng(2), Price(106.0), 0.4)
    asked = lesson.ask(looks, WEIGHTS, 4, closely)
    most = 400 if closely else 256
    budget = torch.tensor([[64, most, 32, 32]], dtype=torch.int32).expand(len(asked), -1)
    rows = Rows(looks, asked.owner, asked.questions, ["guided"] * len(asked), budget, closely)
    torch.nn.init.normal_(looking.balancing.out.weight, std=0.1)
    looking.model.zero_grad()
    looking.allocator.zero_grad()
    weighed = looking.weigh(rows)
    weighed.tensions.retain_grad()
    weighed.weights.retain_grad()
    choice, cells = looking.choose(rows, weighed, torch.rand(len(rows), 64), 0.2)
    losses, _ = looking.answer(looking.read(rows, choice, cells), rows.questions)
    losses.sum().backward()
    norms = looking.gradient_norms()
    assert all(norms[f"gradient_{part}"] > 0 for part in PARTS if part != "closer")
    assert (weighed.tensions.grad.abs().sum(0) > 0).all()
    assert (weighed.weights.grad.abs().sum(0) > 0).all()
    assert all(p.grad is None for p in looking.model.vision_model.parameters())
    frozen = looking.model.language_model.model.decoder.layers
    assert all(p.grad is None for p in frozen.parameters())
    assert looking.positions.weight.grad.abs().sum() > 0


def test_only_guided_rows_teach_the_allocator(looking: Looking) -> None:
    looks = looks_of(looking, World(), 2, False)
    lesson = Lesson(looking, np.random.default_rng(2), Price(106.0), 0.4)
    asked = lesson.ask(looks, WEIGHTS, 4, False)
    rows = Rows(looks, asked.owner, asked.questions, ["perspectival"] * len(asked), asked.budget, False)
    looking.allocator.zero_grad()
    choice, cells = looking.choose(rows, looking.weigh(rows), torch.rand(len(rows), 64), 0.2)
    looking.answer(looking.read(rows, choice, cells), rows.questions)[0].sum().backward()
    assert not any(p.grad is not None and p.grad.abs().sum() > 0 for p in looking.allocator.parameters())


def test_what_training_reads_is_what_is_served(looking: Looking) -> None:
    """Gates over all candidates, shared by an image's questions, equal the packed tokens."""
    looks = looks_of(looking, SMALL_PRINT, 2, True)
    lesson = Lesson(looking, np.random.default_rng(3), Price(106.0), 0.0)
    asked = lesson.ask(looks, WEIGHTS, 3, True)
    budget = torch.tensor([[64, 400, 32, 32]], dtype=torch.int32).expand(len(asked), -1)
    rows = Rows(looks, asked.owner, asked.questions, ["guided"] * len(asked), budget, True)
    weighed = looking.weigh(rows)
    choice, cells = looking.choose(rows, weighed, torch.rand(len(rows), 64), 0.0)
    open_way = looking.read(rows, choice, cells)
    features, detail = looks.features.float(), looking.closer(looks.features.float(), looks.detail.float())
    tokens, mask = looking.allocator.allocation.pack(features[rows.owner], choice.levels, None, detail[rows.owner])
    packed = looking.qformer.read(tokens, torch.where(mask > 0, 0.0, -1e9)[:, None, None, :])
    assert torch.allclose(open_way, packed, atol=0.05)  # bfloat16


def test_every_arm_gets_an_equal_share(looking: Looking) -> None:
    looks = looks_of(looking, World(), 3, False)
    lesson = Lesson(looking, np.random.default_rng(4), Price(106.0), 0.0)
    drawn = Counter(policy for _ in range(60) for policy in lesson.ask(looks, WEIGHTS, 5, False).policies)
    assert set(drawn) == set(TRAINED)
    assert max(drawn.values()) < 1.3 * min(drawn.values())


def test_budgets_are_drawn_over_the_whole_range() -> None:
    rng = np.random.default_rng(5)
    even, large = (draw_budgets(rng, 3000, False, thirds) for thirds in ((1.0, 1.0, 1.0), LARGE_BUDGETS))
    assert even.min() >= 64
    assert even.max() <= 256
    partly = 1 - WHOLE_SHARE
    assert abs(float((even < 128).float().mean()) - partly / 3) < 0.04
    assert abs(float((large >= 192).float().mean()) - (WHOLE_SHARE + partly / 2)) < 0.04


def test_a_gain_is_found_in_losses_that_diminish() -> None:
    shape = returns(torch.tensor(SHARES))
    assert shape[0] == 0
    assert shape[-1] == pytest.approx(1.0)
    assert torch.allclose(
        gains(torch.stack([0.9 - 0.6 * shape, 0.1 + 0.0 * shape])), torch.tensor([0.6, 0.0]), atol=1e-5
    )


def test_particularize_settles_where_tokens_are_worth_their_price() -> None:
    """Questions of meaning 0 gain much from more tokens, those of meaning 1 nothing.

    No cell is relevant, so the prior is to spend nothing. All else keeps its value.
    """
    torch.manual_seed(1)
    number, kinds = 400, torch.arange(400) % 2
    meanings = functional.one_hot(kinds, 4).float() + 0.1 * torch.randn(number, 4)
    helped, indifferent = torch.tensor([1.0, 0.6, 0.2, 0.1]), torch.full((4,), 0.3)
    losses = torch.where(kinds[:, None] == 0, helped, indifferent) + 0.05 * torch.randn(number, 4)
    room, closely = torch.full((number,), 192.0), torch.zeros(number, dtype=torch.bool)
    curves = Curves(0.45 * torch.rand(number, 3, 256), meanings, losses, room, kinds, closely)
    balancing = OpponentProcessing(4)
    before = balancing(curves.scores, meanings)
    settle(balancing, curves)
    weights, tensions = balancing(curves.scores, meanings)
    assert tensions[kinds == 0, 0].mean() > 0.2 + tensions[kinds == 1, 0].mean()
    assert torch.allclose(weights, before.weights, atol=0.05)
    assert torch.allclose(tensions[:, 1:], before.tensions[:, 1:], atol=0.05)


def test_every_relevant_cell_needs_its_patches() -> None:
    scores = torch.zeros(2, 3, 256)
    scores[1, 2, :4], scores[1, 0] = 0.9, 1.0  # two cells of the upper row; the other maps do not count
    assert needed(scores).tolist() == pytest.approx([0.0, 2 * 3 / 192])


def test_the_price_follows_what_is_spent() -> None:
    dear, cheap = Price(100.0), Price(100.0)
    for _ in range(20):
        dear.observe(["count", "colour"], [200.0, 90.0])
        cheap.observe(["count", "colour"], [90.0, 70.0])
    assert dear.price > Price(100.0).price > cheap.price


def test_every_policy_spends_its_budget(chain: Chain) -> None:
    exam = held_out_exam(chain, NEW, 2)
    for policy in POLICIES:
        answers = answer(chain, exam, Arm(policy, (112, 112)))
        assert (answers.vision_tokens == 112).all(), policy
        assert answers.right.shape == (len(exam.asked),)
    full = summarise(answer(chain, exam, Arm(vision_tokens=(256, 256))))
    assert full["all"]["n"] == len(exam.asked)
    assert full["all"]["vision_tokens"] == 256


def test_evaluation_sees_groups_queries_and_the_closer_view(chain: Chain) -> None:
    exam = held_out_exam(chain, SMALL, 1, closely=True)
    wide = answer(chain, exam, Arm(visual_tokens=(96, 96), vision_tokens=(64, 400), closer=True))
    assert (wide.visual_tokens == 96).all()
    assert (wide.vision_tokens >= 64).all()
    assert (wide.vision_tokens <= 400).all()
    few = answer(chain, exam, Arm(queries=16, tensions={"particularize": 1.0}))
    assert (few.visual_tokens == 16).all()
    assert (few.vision_tokens == 256).all()
    assert paired(few, few)["difference"] == 0
    with pytest.raises(ValueError, match="closely"):
        answer(chain, held_out_exam(chain, NEW, 1), Arm(closer=True))


def test_the_most_relevant_cell_is_on_what_is_asked_about_or_not() -> None:
    coverage = torch.zeros(2, 256)
    coverage[:, 16 * 4 + 6] = 0.5  # in cell (2, 3)
    cells = torch.zeros(2, 64)
    cells[0, 8 * 2 + 3], cells[1, 0] = 0.9, 0.9
    assert on_asked(cells, coverage).tolist() == [True, False]
    assert cells_of(coverage).amax(2)[0, 8 * 2 + 3] == 0.5


def test_the_centre_weighs_most() -> None:
    weight = centre_weight().reshape(8, 8)
    assert weight.argmax() in (27, 28, 35, 36)
    assert weight[0, 0] == 0
    assert torch.allclose(weight, weight.flip(0))


def test_the_interval_of_a_resampled_mean_holds_it() -> None:
    values = np.random.default_rng(7).random(400)
    low, high = resampled(values, np.arange(400) // 4)
    assert low < values.mean() < high
    assert high - low < 0.1


def test_a_row_is_a_prompt_and_its_answer() -> None:
    questions = [
        Question("what colour is the star?", "red", "colour", (0,)),
        Question("is there a ring?", "no", "exist", (0,)),
    ]
    row = Packer(new_tokenizer()).rows(questions, prefix=64)
    assert row.positions[0].tolist() == list(range(64 + row.ids.shape[1]))
    assert row.mask.shape[-1] == row.positions.shape[1]
    for targets in row.targets:
        told = targets[targets != -100]
        assert len(told) == 2
        assert told[-1] == EOS


def test_a_store_renews_its_oldest_scenes(looking: Looking) -> None:
    eye = Eye.training(looking.model.vision_model, Plan(Path(), compiled=False, tiny=True))
    store = LookStore(eye, [World(), SMALL_PRINT], True, (1, 2))
    store.fill(4, 2)
    before = list(store.kept.scenes)
    store.renew(np.random.default_rng(8), 2)
    assert store.kept.scenes[2:] == before[2:]
    assert store.kept.scenes[0] != before[0]
    assert store.kept.detail.shape == (4, 1024, store.kept.features.shape[2])
    assert len(store.draw(np.random.default_rng(9), 3)) == 3


def test_adapters_start_as_nothing_and_merge_into_the_matrices() -> None:
    torch.manual_seed(3)
    tokenizer = new_tokenizer()
    config = Plan(Path(), tiny=True).config(tokenizer)
    plain, adapted = (new_model(tokenizer, config).language_model for _ in range(2))
    adapted.load_state_dict(plain.state_dict())
    trained = adapt(adapted, 2)
    ids = torch.arange(5, 12)[None]
    assert torch.allclose(plain(ids).logits, adapted(ids).logits, atol=1e-5)
    for weight in trained:
        torch.nn.init.normal_(weight, std=0.1)
    assert not torch.allclose(plain(ids).logits, adapted(ids).logits, atol=1e-3)
    plain.load_state_dict(merged(adapted.state_dict()))
    assert torch.allclose(plain(ids).logits, adapted(ids).logits, atol=1e-4)


def test_alternatives_are_compared_on_the_same_questions(tiny_training: Path, tmp_path: Path) -> None:
    out = tmp_path / "training.json"
    arguments = [
        "--start",
        str(tiny_training),
        "--runs",
        str(tmp_path / "runs"),
        "--scenes",
        "1",
        "--tiny",
        "--out",
        str(out),
    ]
    assert alternatives([*arguments, "--threads", "1"]) == 0
    report = json.loads(out.read_text())
    assert set(report["ways"]) == {"as_shipped", "large_budgets_2_3_5", "lora_rank_8"}
    assert len(set(report["steps"].values())) == 1
    numbers = {way["new"]["112"]["all"]["n"] for way in report["ways"].values()}
    assert len(numbers) == 1
    assert report["ways"]["as_shipped"]["new"]["112"]["against_first"]["difference"] == 0


def test_only_the_rows_after_64_visual_tokens_are_settled(tiny_training: Path) -> None:
    looking = Looking(Plan(tiny_training, compiled=False, tiny=True))
    looking.start_from(Plan(tiny_training, tiny=True))
    looks = looks_of(looking, World(), 3, False)
    before, start = looking.positions.weight.detach().clone(), looking.first_position
    settle_positions(looking, looks, 2)
    moved = (looking.positions.weight.detach() != before).any(1).nonzero()[:, 0] - start
    assert moved.tolist() == list(range(64, 96))
