"""Every training stage runs, a killed run resumes, and transformers loads the checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.scenes.questions import ANSWERS, TYPES, Question
from build_engines.scenes.world import HELD_OUT_PAIRS, World, sample_scene
from build_engines.train.__main__ import BY_DEFAULT, STAGES, main
from build_engines.train.course import Course, Measures, OtherSettingsError, check_settings
from build_engines.train.language_stage import draw_questions
from build_engines.train.packing import Packer
from build_engines.train.run import processes
from build_engines.train.stages import Plan
from build_engines.train.starting import fit_table, said_by
from build_engines.train.symbols import SlotTable, slots_of
from build_engines.train.tokens import EOS, PROMPT, new_tokenizer

pytestmark = pytest.mark.slow


def test_no_training_question_names_a_held_out_pair() -> None:
    rng = np.random.default_rng(3)
    named = [f"{colour} {shape}" for colour, shape in HELD_OUT_PAIRS]
    for _ in range(400):
        for question in draw_questions(rng, sample_scene(rng, World()), dict.fromkeys(TYPES, 1.0), 12):
            assert not any(name in question.text for name in named), question.text


def test_every_stage_leaves_a_checkpoint_a_log_and_a_curve(tiny_training: Path) -> None:
    stages = [json.loads(line)["stage"] for line in (tiny_training / "log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == ["language", "vision", "qformer", "joint", "allocator", "clips"]
    assert STAGES[:-1] == BY_DEFAULT  # clips cost questions about one image something
    assert (tiny_training / "learning_curve.png").stat().st_size > 10_000
    card = json.loads((tiny_training / "checkpoint" / "model_card.json").read_text())
    assert set(card["accuracy_in_pytorch"]) == {"new", "held_out_pairs", "small_print"}
    assert 0 <= card["closer_view_at"] <= 1
    assert card["visual_tokens"] == [32, 128]


@pytest.fixture(scope="module")
def continued(tiny_training: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run that goes on from the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("continued")
    start = str(tiny_training / "checkpoint")
    every = ",".join(STAGES)
    assert main(["--out", str(folder), "--start", start, "--stages", every, "--tiny", "--eager", "--threads", "1"]) == 0
    return folder


def test_a_run_goes_on_from_a_published_checkpoint(tiny_training: Path, continued: Path) -> None:
    """At low rates and in three steps, the weights stay near those that it started from."""
    before, after = (
        Blip2ForConditionalGeneration.from_pretrained(folder / "checkpoint", dtype=torch.float32).state_dict()
        for folder in (tiny_training, continued)
    )
    torch.manual_seed(9)
    for name, weight in before.items():
        if weight.ndim < 2 or weight.std() == 0:
            continue
        moved, apart = (after[name] - weight).norm(), (torch.randn_like(weight) * weight.std() - weight).norm()
        assert moved < 0.5 * apart, name
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    card = json.loads((continued / "checkpoint" / "model_card.json").read_text())
    assert card["training_command"].endswith("--start checkpoint")


def test_the_symbols_are_fitted_to_what_a_checkpoint_says(tiny_training: Path) -> None:
    plan = Plan(tiny_training, tiny=True, start=tiny_training / "checkpoint")
    said = said_by(plan.published(), plan)
    torch.manual_seed(0)
    table = SlotTable(said.prefixes.shape[-1])

    def error() -> float:
        return (table(*said.slots) - said.prefixes)[said.slots[2]].square().mean().item()

    before = error()
    fit_table(table, said)
    assert error() < 0.5 * before


def test_transformers_reads_the_checkpoint_and_answers(tiny_training: Path) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(tiny_training / "checkpoint", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_training / "checkpoint")
    prompt = "<image>" * 32 + "<s>" + PROMPT.format(question="what colour is the star?")
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(
        pixel_values=torch.zeros(1, 3, 224, 224),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=3,
        do_sample=False,
    )
    assert ids.shape[1] < out.shape[1] <= ids.shape[1] + 3


def test_a_begun_run_is_not_overwritten(tiny_training: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tiny_training), "--tiny"])
    assert "--resume" in capsys.readouterr().err


def _course(plan: Plan) -> tuple[Course, nn.Linear]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    matrices, rest = [model.weight], [model.bias]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]
    return Course(plan, "toy", 20, {"model": model}, optimizers, warmup=3, checkpoint_s=0.0), model


def _train(directory: Path, stop_after: int | None = None) -> nn.Linear:
    course, model = _course(Plan(directory))
    course.resume()

    def losses(rng: np.random.Generator) -> list[tuple[torch.Tensor, Measures]]:
        inputs = torch.from_numpy(rng.standard_normal((8, 4)).astype(np.float32))
        noisy = inputs + 0.1 * torch.randn_like(inputs)
        return [((model(noisy) - inputs.flip(1)).square().mean(), {})]

    course.run(losses, dict, validate_every=5, stop_after=stop_after)
    return model


def test_a_killed_run_resumes_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole")
    _train(tmp_path / "killed", stop_after=7)
    resumed = _train(tmp_path / "killed")
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)
    assert not list(tmp_path.glob("*/*.partial"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"scale": 0.5}, "with --scale 1.0, and this run has --scale 0.5: give the same options"),
        ({"start": Path("reference")}, "with --start none, and this run has --start /"),
        ({"tiny": True, "adapter_rank": 8}, "with --tiny False, --adapter-rank 0, and"),
    ],
)
def test_a_stage_goes_on_only_with_the_settings_that_it_was_begun_with(
    tmp_path: Path, changed: dict[str, object], told: str
) -> None:
    _train(tmp_path, stop_after=2)
    plan = Plan(tmp_path)
    check_settings(replace(plan, compiled=False), "toy", 1)
    with pytest.raises(OtherSettingsError, match=told):
        _course(replace(plan, **changed))[0].resume()
    with pytest.raises(OtherSettingsError, match=told):
        check_settings(replace(plan, **changed), "toy", 1)


def test_an_unfinished_stage_keeps_its_number_of_processes(tmp_path: Path) -> None:
    _train(tmp_path, stop_after=2)
    with pytest.raises(OtherSettingsError, match=r"processes .* 1, and this run has processes .* 2"):
        check_settings(Plan(tmp_path), "toy", 2)
    _train(tmp_path)
    check_settings(Plan(tmp_path), "toy", 2)


def test_only_the_later_stages_have_several_processes() -> None:
    plan = Plan(Path("unused"))
    assert [processes(plan, "vision", threads) for threads in (1, 2, 8)] == [1, 1, 1]
    if not torch.cuda.is_available():
        assert [processes(plan, "joint", threads) for threads in (1, 2, 8)] == [1, 2, 2]


def test_a_run_of_other_settings_is_refused_before_it_trains(
    tiny_training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tiny_training / "joint.pt", tmp_path)
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path), "--stages", "joint,allocator", "--resume", "--tiny", "--scale", "0.5"])
    assert "joint.pt was begun with --scale 1.0, and this run has --scale 0.5" in capsys.readouterr().err
    assert not (tmp_path / "log.jsonl").exists()


def test_every_answer_is_one_token_and_any_text_survives() -> None:
    tokenizer = new_tokenizer()
    assert len(tokenizer) <= 640
    for answer in ANSWERS:
        assert len(tokenizer.encode(f" {answer}", add_special_tokens=False)) == 1
    text = "straße, 漢字 & \N{ROCKET}"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.encode("What COLOUR?") == tokenizer.encode("what colour?")


def test_packed_questions_are_blind_to_each_other() -> None:
    questions = [Question(f"is there a {colour} ring?", "yes", "exist", (0,)) for colour in ("red", "blue")]
    pack = Packer(new_tokenizer(), 64).pack([questions])
    first, second = (torch.nonzero(pack.owner[0] == index).flatten() + 32 for index in (0, 1))
    mask = pack.mask[0, 0]
    assert not mask[second][:, first].any()
    assert not mask[first][:, second].any()
    assert mask[second][:, :32].all()
    assert pack.positions[0, first[0]] == pack.positions[0, second[0]] == 32
    assert (pack.targets[0] == EOS).sum() == 2


def test_every_object_gets_a_slot_near_its_centre() -> None:
    rng = np.random.default_rng(12)
    for _ in range(100):
        things = sample_scene(rng, World())
        slots = slots_of(things)
        assert slots.filled.sum() == len(things)
        cells = np.flatnonzero(slots.filled)
        assert np.all(np.abs((cells % 8 + 0.5) * 28 - (slots.places[cells, 0] + 1) * 112) < 60)


def test_relevance_ignores_padding() -> None:
    torch.manual_seed(0)
    knowing = ParticipatoryKnowing(50, 16)
    features = torch.randn(2, 257, 16)
    ids, mask = torch.randint(5, 50, (2, 32)), torch.zeros(2, 32, dtype=torch.int64)
    mask[:, :6] = 1
    other = torch.where(mask > 0, ids, (ids + 1) % 50)
    relevance = knowing(features, ids, mask)
    assert relevance.shape == (2, 256)
    assert torch.equal(relevance, knowing(features, other, mask))
    assert not torch.equal(relevance[0], relevance[1])
