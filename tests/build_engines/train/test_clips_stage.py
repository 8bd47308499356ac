"""Training on clips and groups of images: what is frozen, what is forgotten, how questions are packed and asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from build_engines.model.checkpoint import Checkpoint
from build_engines.scenes.questions import Question
from build_engines.scenes.world import World
from build_engines.train.averaging import average
from build_engines.train.clip_evaluation import parts_of, told
from build_engines.train.clip_store import Prefixed, Shelf, look_again, look_at_clip, look_at_group
from build_engines.train.clips_stage import Watcher, answer_clips, learn_again, learn_clips
from build_engines.train.publishing import finished_parts
from build_engines.train.stages import Plan
from build_engines.train.tokens import EOS

pytestmark = pytest.mark.slow

ASKED = [Question(f"is there a {colour} ring?", "yes", "exist", (0,)) for colour in ("red", "blue", "green")]


@pytest.fixture(scope="module")
def checkpoint(tiny_training: Path) -> Checkpoint:
    return Checkpoint.load(tiny_training / "checkpoint")


def watcher_of(checkpoint: Checkpoint) -> Watcher:
    return parts_of(checkpoint)[1]


def test_a_checkpoint_of_the_stage_has_a_clip_resampler(checkpoint: Checkpoint) -> None:
    card = checkpoint.card
    assert checkpoint.clip is not None
    assert card["parameters"]["clip"] == sum(p.numel() for p in checkpoint.clip.parameters())
    assert checkpoint.clip_attention() is not None


def test_images_keep_their_visual_tokens(tiny_training: Path) -> None:
    """The encoder, the allocator and the Q-Former are those of the stage before, the language model is not."""
    plan = Plan(tiny_training, tiny=True)
    before, after = finished_parts(plan, "allocator"), finished_parts(plan, "clips")
    kept = before.model.state_dict()
    changed = {name for name, weight in after.model.state_dict().items() if not torch.equal(kept[name], weight)}
    assert changed
    assert all("language_model" in name or "lm_head" in name for name in changed)
    assert all(
        torch.equal(a, b) for a, b in zip(before.allocator.parameters(), after.allocator.parameters(), strict=True)
    )


def test_the_resampler_learned(tiny_training: Path) -> None:
    after = finished_parts(Plan(tiny_training, tiny=True), "clips")
    assert after.clip is not None
    assert (after.clip.positions.weight[0] != 0).any()  # zero at the start
    records = [json.loads(line) for line in (tiny_training / "log.jsonl").read_text().splitlines()]
    train = [record["train"] for record in records if record["stage"] == "clips"]
    assert {"clip_loss", "several_loss", "again_kl"} <= set(train[-1])


def test_packed_questions_are_answered_as_if_asked_alone(checkpoint: Checkpoint) -> None:
    watcher = watcher_of(checkpoint)
    torch.manual_seed(1)
    for visual in (64, 96):
        prefix = torch.randn(1, visual, checkpoint.visual_width)
        with torch.no_grad():
            pack = watcher.packer.pack([ASKED], visual)
            states = watcher.decode(
                torch.cat([prefix, watcher.language.get_input_embeddings()(pack.ids)], dim=1),
                torch.where(pack.mask, 0.0, -1e4),
                pack.positions,
            )[:, visual:]
            rows = watcher.packer.rows(ASKED, visual)
            embedded = watcher.language.get_input_embeddings()(rows.ids)
            alone = watcher.decode(
                torch.cat([prefix.expand(3, -1, -1), embedded], dim=1),
                torch.where(rows.mask, 0.0, -1e4),
                rows.positions,
            )[:, visual:]
        assert torch.allclose(states[pack.targets != -100], alone[rows.targets != -100], atol=1e-4)
        assert (pack.targets[0] == EOS).sum() == 3


def test_the_published_model_has_nothing_to_learn_from_itself(checkpoint: Checkpoint) -> None:
    frozen, watcher = parts_of(checkpoint)
    exact = replace(watcher, decode=watcher.exact)

    @torch.no_grad()
    def teach(seen: torch.Tensor, questions: list[Question]) -> tuple[list[Question], torch.Tensor]:
        *_, pack, logits = exact.losses(seen.unsqueeze(0), [questions])
        return pack.kept[0], logits

    rng = np.random.default_rng(5)
    again = [one for one in (look_again(frozen, rng, 1, teach) for _ in range(4)) if one]
    _, measures = learn_again(exact, again)
    assert measures["again_kl"] == pytest.approx(0.0, abs=1e-3)
    other = [replace(one, taught=one.taught.flip(1)) for one in again]
    assert learn_again(exact, other)[1]["again_kl"] > 0.05


@pytest.mark.parametrize("frames", [4, 9])
def test_every_question_about_a_clip_trains_the_resampler(checkpoint: Checkpoint, frames: int) -> None:
    frozen, watcher = parts_of(checkpoint)
    rng = np.random.default_rng(3)
    clips = [clip for clip in (look_at_clip(frozen, rng, World(), frames) for _ in range(3)) if clip]
    watcher.resampler.requires_grad_(True).train()
    loss, measures = learn_clips(watcher, rng, clips)
    loss.backward()
    assert f"clip_at_{frames}" in measures
    for name in ("positions.weight", "query_tokens", "marks"):
        gradient = watcher.resampler.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
    watcher.resampler.eval()
    right, kinds = answer_clips(watcher, clips)
    assert len(right) == len(kinds) == sum(len(clip.questions) for clip in clips)


def test_a_group_has_the_visual_tokens_of_each_image_in_turn(checkpoint: Checkpoint) -> None:
    frozen, _ = parts_of(checkpoint)
    group = look_at_group(frozen, np.random.default_rng(8), World(), 3)
    assert isinstance(group, Prefixed)
    assert group.visual_tokens.shape == (96, checkpoint.visual_width)
    assert not torch.equal(group.visual_tokens[:32], group.visual_tokens[32:64])


def test_a_shelf_renews_the_oldest_entry_of_a_size() -> None:
    made = iter(range(100))
    shelf = Shelf(lambda _, size: (size, next(made)), {1: 1.0})
    rng = np.random.default_rng(0)
    shelf.fill(rng, 3, "toys")
    assert shelf.kept[1] == [(1, 0), (1, 1), (1, 2)]
    shelf.renew(rng)
    shelf.renew(rng)
    assert shelf.kept[1] == [(1, 3), (1, 4), (1, 2)]
    assert len(shelf.draw(rng, 2, 1)) == 2


def test_averaging_keeps_a_part_that_only_the_later_checkpoint_has(tiny_training: Path, tmp_path: Path) -> None:
    after = tiny_training / "checkpoint"
    before = tmp_path / "before"
    before.mkdir()
    for file in after.iterdir():
        if file.name != "clip.safetensors":
            (before / file.name).write_bytes(file.read_bytes())
    average(before, after, 0.5, tmp_path / "out")
    ours, theirs = (load_file(folder / "clip.safetensors") for folder in (tmp_path / "out", after))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resampler_of_another_size_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for file in checkpoint.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "clip.safetensors").write_bytes((tmp_path / "allocator.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"clip\.safetensors does not fit the checkpoint's Q-Former"):
        Checkpoint.load(tmp_path)


def test_a_report_tells_each_kind_and_all() -> None:
    report = told(np.array([True, False, True]), ["way", "way", "count"])
    assert {kind: (row["n"], row["accuracy"]) for kind, row in report.items()} == {
        "count": (1, 1.0), "way": (2, 0.5), "all": (3, 0.6667),
    }  # fmt: skip
