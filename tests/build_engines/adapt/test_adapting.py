"""A tiny random checkpoint of each family is adapted, by the command, and what it writes is built."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from build_engines.adapt import run
from build_engines.adapt.__main__ import main
from build_engines.adapt.data import Data
from build_engines.adapt.features import detail_of
from build_engines.adapt.run import Job, asked_models, publish
from build_engines.adapt.train import Schedule
from build_engines.convert import __main__ as build
from build_engines.model.adapted import DISTILLED, FIXED, Adapted
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.checkpoint import Checkpoint
from service.core.card import ModelCard
from service.media.decoder import ImageLimits
from tests.support.once import Once
from tests.support.tiny_checkpoints import save_blip2_opt, save_instructblip_vicuna

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # torch and accelerate warn about themselves

SAVED: dict[str, Callable[[Path], None]] = {
    "blip2-opt": save_blip2_opt,
    "instructblip-vicuna": save_instructblip_vicuna,
}
OPT = pytest.mark.parametrize("family", ["blip2-opt"], indirect=True)  # one family says it for both
VICUNA = pytest.mark.parametrize("family", ["instructblip-vicuna"], indirect=True)
STEPS = 20
COMMON = ["--batch", "4", "--questions", "2", "--steps", str(STEPS), "--threads", "1", "--closer-share", "0.5"]


@dataclass(frozen=True)
class Family:
    checkpoint: Path
    data: Path
    out: Path

    def arguments(self, out: Path, *more: str) -> list[str]:
        return [str(self.checkpoint), "--data", str(self.data), "--out", str(out), *COMMON, *more]


def write_data(folder: Path) -> None:
    """Ten pictures of noise, half of them large enough for a closer view, and one file that is no picture."""
    folder.mkdir()
    generator, lines = np.random.default_rng(3), []
    for number in range(10):
        side = 448 if number % 2 else 224
        coarse = generator.integers(0, 256, (14, 14, 3), np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.NEAREST).save(folder / f"{number}.png")
        lines += [f"{number}.png\twhat is red?\tred", f"{number}.png\twhich colour has the big circle\tblue"]
    (folder / "broken.jpg").write_bytes(b"no picture")
    lines.append("broken.jpg\twhat?\tred")
    (folder / "questions.txt").write_text("\n".join(lines))


def adapted(name: str, once: Once) -> Family:
    """Adapt a checkpoint of this family once in a run of the tests. Nobody changes it."""
    # A folder of its own, which is not renamed after the adaptation: the lessons are those of the data's paths.
    data = once.made("data-to-adapt-to", lambda folder: write_data(folder / "data")) / "data"

    def adapt(folder: Path) -> None:
        SAVED[name](folder / "checkpoint")
        found = Family(folder / "checkpoint", data, folder / "out")
        assert main(found.arguments(found.out)) == 0

    made = once.made(f"adapted-{name}", adapt)
    return Family(made / "checkpoint", data, made / "out")


@pytest.fixture(scope="module", params=SAVED)
def family(request: pytest.FixtureRequest, once: Once) -> Family:
    return adapted(request.param, once)


def test_the_result_says_how_it_came_about(family: Family) -> None:
    told = json.loads((family.out / "report.json").read_text())
    assert told["teacher"] == "likelihood"
    assert told["data"] == {"form": "plain", "images": 11, "questions": 20, "skipped": 1}
    assert "broken.jpg\tnot an image" in (family.out / "skipped.txt").read_text()
    zero_shot = {"zero-shot"} if "instruct" in family.out.parent.name else set()
    assert set(told["arms"]) == {"guided", "random", "uniform", "fixed"} | zero_shot
    assert told["arms"]["guided"][-1]["agreement"]["value"] == 1.0  # 256 vision tokens are the full view
    adapted = Adapted.read(family.out)
    assert adapted.state in (DISTILLED, FIXED)
    assert adapted.default_vision_tokens == tuple(told["default_vision_tokens"])
    assert (family.out / "measured.png").stat().st_size > 1000
    assert "gradient_participatory" in (family.out / "work" / "log.jsonl").read_text()


def test_a_built_repository_has_it_and_keeps_the_encoders_features(family: Family, tmp_path: Path) -> None:
    """A random checkpoint gains nothing from noise. Here the allocator is used as if it had."""
    adapted = tmp_path / "adapted"
    adapted.mkdir()
    for name in ("allocator.safetensors", "adapted.json"):
        (adapted / name).write_bytes((family.out / name).read_bytes())
    dataclasses.replace(Adapted.read(adapted), state=DISTILLED, default_vision_tokens=(96, 256)).write(adapted)
    out = tmp_path / "repository"
    assert build.main([str(family.checkpoint), "--allocator", str(adapted), "--out", str(out), "--until", "card"]) == 0
    told = ModelCard.from_json((tmp_path / "repository.build" / "card" / "card.json").read_text())
    assert (told.allocator, told.allocator_trained, told.closer_view) == (DISTILLED, True, True)
    assert told.unasked_vision_tokens("low") == (96, 256)
    assert told.unasked_vision_tokens("high") == (96, 400)
    plain = Checkpoint.load(family.checkpoint)
    assert told.fingerprint == plain.vision_fingerprint()
    assert told.visual_fingerprint != plain.visual_fingerprint()


@OPT
def test_an_allocator_of_another_encoder_is_refused(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataclasses.replace(Adapted.read(family.out), encoder="0" * 16).write(tmp_path)
    (tmp_path / "allocator.safetensors").write_bytes((family.out / "allocator.safetensors").read_bytes())
    arguments = ["--allocator", str(tmp_path), "--out", str(tmp_path / "repository"), "--until", "card"]
    assert build.main([str(family.checkpoint), *arguments]) == 3
    assert "was adapted to another encoder" in capsys.readouterr().err
    assert build.main([str(family.checkpoint), "--allocator", str(tmp_path / "none"), *arguments[2:]]) == 2
    assert "holds no adapted allocator" in capsys.readouterr().err


def another(folder: Path, part: str) -> None:
    """Make of this checkpoint one with another prompt, another tokenizer, or other weights of this name's beginning."""
    if part == "prompt":
        (folder / "model_card.json").write_text('{"prompt": "{question} Answer:"}')
    elif part == "tokenizer":
        told = json.loads((folder / "tokenizer.json").read_text())
        words = told["model"]["vocab"]
        words["e"], words["o"] = words["o"], words["e"]
        (folder / "tokenizer.json").write_text(json.dumps(told))
    else:
        weights = load_file(folder / "model.safetensors")
        for name in weights:
            if name.startswith(part):
                weights[name] = weights[name] * 1.5
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@OPT
@pytest.mark.parametrize("part", ["language_model.", "rank"])
def test_the_work_of_other_models_is_not_continued(family: Family, tmp_path: Path, part: str) -> None:
    """In the folder of an earlier adaptation, with another checkpoint over the same encoder, or with another rank."""
    out, checkpoint = tmp_path / "out", tmp_path / "checkpoint"
    shutil.copytree(family.out, out)
    shutil.copytree(family.checkpoint, checkpoint)
    teacher, training = out / "work" / "teacher.json", out / "work" / "training.pt"
    before = [json.loads(teacher.read_text())["key"], torch.load(training)["key"]]
    if part != "rank":
        another(checkpoint, part)
    job = dataclasses.replace(family, checkpoint=checkpoint)
    assert main(job.arguments(out, *(["--lora-rank", "2"] if part == "rank" else []))) == 0
    after = [json.loads(teacher.read_text())["key"], torch.load(training)["key"]]
    assert [ours == theirs for ours, theirs in zip(before, after, strict=True)] == [part == "rank", False]


@OPT
@pytest.mark.parametrize("part", ["qformer.", "language_model.", "tokenizer", "prompt"])
def test_a_teacher_is_told_apart_by_all_that_it_asks(family: Family, tmp_path: Path, part: str) -> None:
    shutil.copytree(family.checkpoint, tmp_path / "checkpoint")
    asked = asked_models(Checkpoint.load(tmp_path / "checkpoint", language=False))
    assert asked == asked_models(Checkpoint.load(family.checkpoint))
    another(tmp_path / "checkpoint", part)
    assert asked_models(Checkpoint.load(tmp_path / "checkpoint", language=False)) != asked


@OPT
@pytest.mark.parametrize("part", ["tokenizer", "qformer."])
def test_an_allocator_of_another_tokenizer_or_qformer_is_refused(family: Family, tmp_path: Path, part: str) -> None:
    adapted, checkpoint = tmp_path / "adapted", tmp_path / "checkpoint"
    adapted.mkdir()
    for name in ("allocator.safetensors", "adapted.json"):
        (adapted / name).write_bytes((family.out / name).read_bytes())
    told = dataclasses.replace(Adapted.read(adapted), state=DISTILLED)
    told.write(adapted)
    if part == "qformer.":  # its weights after LoRA, which fit no other Q-Former
        Checkpoint.load(family.checkpoint, adapted)
        save_file({}, adapted / "qformer.safetensors")
    shutil.copytree(family.checkpoint, checkpoint)
    another(checkpoint, part)
    with pytest.raises(ValueError, match=f"was adapted to another {'tok' if part == 'tokenizer' else 'Q-Former'}"):
        Checkpoint.load(checkpoint, adapted)
    before = dataclasses.asdict(told)  # as earlier versions wrote it
    del before["question_tokenizer"], before["qformer"]
    (adapted / "adapted.json").write_text(json.dumps(before))
    for each in (family.checkpoint, checkpoint):
        assert Checkpoint.load(each, adapted).participatory is not None


def test_an_allocator_that_gains_nothing_stays_with_the_full_view(family: Family, tmp_path: Path) -> None:
    told = dataclasses.replace(Adapted.read(family.out), state=FIXED, default_vision_tokens=(256, 256), qformer="other")
    told.write(tmp_path)
    plain = Checkpoint.load(family.checkpoint)
    name, weight = next((n, w) for n, w in plain.model.state_dict().items() if "crossattention.attention.key.w" in n)
    save_file({name: weight + 1}, tmp_path / "qformer.safetensors")  # earlier versions wrote what LoRA changed
    checkpoint = Checkpoint.load(family.checkpoint, tmp_path)
    assert checkpoint.qformer_fingerprint() == plain.qformer_fingerprint()
    assert checkpoint.participatory is None
    assert checkpoint.card["default_vision_tokens"] == [256, 256]


@VICUNA
def test_what_instructblip_knows_already_depends_on_the_question(family: Family, tmp_path: Path) -> None:
    checkpoint = Checkpoint.load(family.checkpoint).knowing_already()
    features = torch.randn(2, 257, 48, generator=torch.Generator().manual_seed(1))
    allocator = checkpoint.allocator()
    assert allocator.zero_shot is not None
    ids = torch.randint(1, 30, (2, 32), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    one, other = (allocator.zero_shot(features[:1], ids[i : i + 1], torch.ones_like(ids[:1])) for i in range(2))
    assert one.shape == (1, 256)
    assert one.amax() == 1
    assert not torch.allclose(one, other, atol=1e-4)
    out = tmp_path / "repository"
    assert build.main([str(family.checkpoint), "--zero-shot", "--out", str(out), "--until", "card"]) == 0
    told = ModelCard.from_json((tmp_path / "repository.build" / "card" / "card.json").read_text())
    assert (told.allocator, told.allocator_trained, told.closer_view) == ("zero-shot", True, False)


@OPT
def test_zero_shot_needs_a_qformer_that_reads_the_question(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main([str(family.checkpoint), "--zero-shot", "--out", str(tmp_path / "repository")]) == 2
    assert "needs an InstructBLIP checkpoint" in capsys.readouterr().err


@OPT
def test_a_dry_run_tells_what_it_needs_and_does_nothing(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(family.arguments(tmp_path / "out", "--dry-run")) == 0
    assert "of memory" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@OPT
def test_answers_are_another_teacher(family: Family, tmp_path: Path) -> None:
    assert main(family.arguments(tmp_path / "out", "--teacher", "answers", "--steps", "2")) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["teacher"] == "answers"


@VICUNA
def test_tokens_need_no_language_model_and_lora_changes_the_qformer(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With LoRA on the Q-Former, whose changed weights come along, here as if they had gained something."""
    measured = run.measured
    monkeypatch.setattr(run, "measured", lambda *given, **more: measured(*given, **more) | {"gains": True})
    more = ["--teacher", "tokens", "--steps", "2", "--lora-rank", "2"]
    assert main(family.arguments(tmp_path / "out", *more)) == 0
    arms = json.loads((tmp_path / "out" / "report.json").read_text())["arms"]
    assert arms["guided"][-1]["agreement"]["value"] > arms["random"][0]["agreement"]["value"]
    weights = load_file(tmp_path / "out" / "qformer.safetensors")
    own = Checkpoint.load(family.checkpoint).model.state_dict()
    moved = {name for name, weight in weights.items() if not torch.equal(weight.float(), own[name].half().float())}
    assert {name.split(".")[-2] for name in moved} == {"query", "key", "value"}


@OPT
def test_a_single_image_with_an_answer_is_refused_at_once(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(family.data, tmp_path / "data")
    (tmp_path / "data" / "questions.txt").write_text("0.png\twhat?\tred\n1.png\twhat?\n2.png\twhat?\n")
    job = dataclasses.replace(family, data=tmp_path / "data")
    assert main(job.arguments(tmp_path / "out", "--teacher", "answers")) == 2
    assert "1 of 3 images can be used, and two are needed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@OPT
def test_a_single_image_that_can_be_decoded_is_refused_before_training(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(family.data, tmp_path / "data")
    (tmp_path / "data" / "questions.txt").write_text("0.png\twhat?\nbroken.jpg\twhat?\n")
    job = dataclasses.replace(family, data=tmp_path / "data")
    assert main(job.arguments(tmp_path / "out")) == 2
    assert "1 of 2 images can be used, and two are needed" in capsys.readouterr().err
    assert not (tmp_path / "out" / "work" / "training.pt").exists()
    assert json.loads((tmp_path / "out" / "work" / "job.json").read_text()) == {"teacher": "likelihood"}


@pytest.mark.parametrize("gains", [False, True])
def test_a_fixed_result_leaves_the_qformer_as_it_was(gains: bool, tmp_path: Path) -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = torch.nn.Linear(2, 2)

    qformer = torch.nn.ModuleDict({"crossattention": torch.nn.ModuleDict({"attention": Head()})})
    qformer = torch.nn.ModuleDict({"0": qformer})
    job = Job(tmp_path, tmp_path, "tokens", Schedule(), 1, 0, 0.9, ImageLimits(), 2)
    figure = {"agreement": {"value": 1.0, "low": 1.0, "high": 1.0}, "vision_tokens": 64}
    told = {
        "gains": gains, "default_vision_tokens": [256, 256], "closer_view_at": 1.0, "teacher": "tokens",
        "data": {"images": 1, "questions": 1}, "adaptive": figure, "threshold": 0.9,
        "arms": {"guided": [figure]}, "closer": {},
    }  # fmt: skip
    student = SimpleNamespace(allocator=RelevanceAllocator(None), adapters=[torch.zeros(1)])
    parts = (Data([], []), SimpleNamespace(broken={}), student, qformer, Adapted(FIXED, "e", (0, 0)))
    job.work.mkdir()
    (tmp_path / "qformer.safetensors").write_bytes(b"of an earlier run")
    assert publish(job, *parts, told).state == (DISTILLED if gains else FIXED)  # type: ignore[arg-type]
    found = list(tmp_path.rglob("qformer.safetensors"))
    assert found == [(tmp_path if gains else job.work) / "qformer.safetensors"]
    assert set(load_file(found[0])) == {
        f"qformer.0.crossattention.attention.query.{name}" for name in ("weight", "bias")
    }


def test_the_closer_views_quarters_lie_on_one_grid() -> None:
    crops = torch.arange(4 * 257).float().reshape(1, 4, 257, 1)
    detail = detail_of(crops).reshape(32, 32)
    assert detail[0, 0] == crops[0, 0, 1, 0]
    assert detail[0, 16] == crops[0, 1, 1, 0]
    assert detail[16, 0] == crops[0, 2, 1, 0]
    assert detail[31, 31] == crops[0, 3, 256, 0]


def test_weights_are_those_of_the_training(family: Family) -> None:
    trained = torch.load(family.out / "work" / "training.pt", weights_only=True)["student"]
    published = load_file(family.out / "allocator.safetensors")
    for name, weight in published.items():
        if not name.startswith("balancing"):  # fitted after the training
            assert torch.equal(weight, trained[f"allocator.{name}"].half())
