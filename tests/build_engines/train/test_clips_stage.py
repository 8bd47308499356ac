"""Training on clips and groups of images: what is frozen, how questions are packed and asked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from build_engines.model.checkpoint import Checkpoint
from build_engines.scenes.clips import Story, draw_story, way_of
from build_engines.scenes.questions import Question
from build_engines.scenes.world import World
from build_engines.train.averaging import FOR_CLIPS, average, forget_clips
from build_engines.train.clip_evaluation import parts_of, told
from build_engines.train.clip_store import (
    Prefixed,
    Shelf,
    backwards,
    draw_clips,
    look_at_clip,
    look_at_four,
    look_at_group,
    regrouped,
)
from build_engines.train.clips_stage import Symbols, Watcher, answer_clips, learn_clips
from build_engines.train.events import CODES, EventTable, told_clips
from build_engines.train.publishing import finished_parts, parts_before_clips
from build_engines.train.stages import Plan
from build_engines.train.symbols import SlotTable
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


def test_questions_about_one_image_are_answered_as_before(tiny_training: Path, checkpoint: Checkpoint) -> None:
    """The stage changes none of the model's own weights. Those for clips are others, in a file of their own."""
    plan = Plan(tiny_training, tiny=True)
    before, after = finished_parts(plan, "allocator"), finished_parts(plan, "clips")
    for ours, theirs in ((before.model, after.model), (before.allocator, after.allocator)):
        kept = ours.state_dict()
        assert all(torch.equal(kept[name], weight) for name, weight in theirs.state_dict().items())
    assert after.clip_language is not None
    own = before.model.language_model.state_dict()
    assert any(not torch.equal(own[name], weight) for name, weight in after.clip_language.state_dict().items())
    assert checkpoint.clip_language is not None
    written = checkpoint.clip_language.state_dict()
    assert all(torch.equal(written[name], w.half().float()) for name, w in after.clip_language.state_dict().items())
    assert str(checkpoint.card["knows_clips"]).startswith("Clips")


def test_the_stage_goes_on_from_weights_that_know_clips(tiny_training: Path, tmp_path: Path) -> None:
    start = parts_before_clips(Plan(tmp_path, tiny=True, start=tiny_training / "checkpoint"))
    after = finished_parts(Plan(tiny_training, tiny=True), "clips")
    assert start.clip is not None
    assert start.clip_language is not None
    assert after.clip_language is not None
    learnt = after.clip_language.state_dict()
    assert all(torch.equal(w, learnt[name].half().float()) for name, w in start.clip_language.state_dict().items())


def test_the_resampler_learned(tiny_training: Path) -> None:
    after = finished_parts(Plan(tiny_training, tiny=True), "clips")
    assert after.clip is not None
    assert (after.clip.positions.weight[0] != 0).any()  # zero at the start
    records = [json.loads(line) for line in (tiny_training / "log.jsonl").read_text().splitlines()]
    train = [record["train"] for record in records if record["stage"] == "clips"]
    assert {"clip_loss", "several_loss", "told_clip"} <= set(train[0])


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


@pytest.mark.parametrize("frames", [4, 9])
def test_every_question_about_a_clip_trains_the_resampler(checkpoint: Checkpoint, frames: int) -> None:
    frozen, watcher = parts_of(checkpoint)
    rng = np.random.default_rng(3)
    clips = [clip for clip in (look_at_clip(frozen, rng, World(), frames) for _ in range(3)) if clip]
    watcher.resampler.requires_grad_(True).train()
    width = checkpoint.visual_width
    symbols = Symbols(SlotTable(width), EventTable(width))
    loss, measures = learn_clips(watcher, symbols, rng, clips)
    loss.backward()
    assert f"clip_at_{frames}" in measures
    for name in ("positions.weight", "query_tokens", "marks"):
        gradient = watcher.resampler.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name
    watcher.resampler.eval()
    right, kinds = answer_clips(watcher, clips)
    assert len(right) == len(kinds) == sum(len(clip.questions) for clip in clips)


def a_story() -> Story:
    """A story in which one object moves, one vanishes, and one stays."""
    rng = np.random.default_rng(2)
    while True:
        story = draw_story(rng, World())
        kinds = {event.kind for event in story.events}
        if {"moved", "vanished"} <= kinds and len(story.things) > len(story.events):
            return story


def test_symbols_tell_what_happens_to_each_object_and_when() -> None:
    story = a_story()
    told = told_clips([story])
    moved, gone = (next(event for event in story.events if event.kind == kind) for kind in ("moved", "vanished"))
    way = CODES.index(way_of(moved, story.things[moved.index]))
    codes, times = told.codes[0], told.times[0]
    assert (codes[:32] == way).any()
    assert (codes[32:] == way).any()
    assert (codes[:32] == CODES.index("vanished")).any()
    assert not (codes[32:] == CODES.index("vanished")).any()
    (place,) = (codes[:32] == CODES.index("vanished")).nonzero()[:1, 0].tolist()
    assert any(times[place].item() == pytest.approx(2 * event.start - 1, abs=1e-5) for event in story.events)
    assert gone.kind == "vanished"
    for half, time in ((slice(0, 32), 0.0), (slice(32, 64), 1.0)):
        assert int(told.filled[0, half].sum()) == sum(thing is not None for thing in story.scene(time))
    assert not told.codes[~told.filled].any()


def test_the_way_of_events_into_visual_tokens_is_learned() -> None:
    torch.manual_seed(0)
    table, events = SlotTable(24).requires_grad_(False), EventTable(24)
    rng = np.random.default_rng(6)
    told = told_clips([draw_story(rng, World()) for _ in range(24)])
    optimizer = torch.optim.Adam(events.parameters(), lr=0.02)
    for _ in range(150):
        loss, measures = events.loss(events(table, told), table, told)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert measures["apart"] == pytest.approx(0.0, abs=1e-6)
    assert measures["event"] > 0.9
    assert events.loss(torch.zeros(24, 64, 24), table, told)[1]["apart"] > 0.1


def test_a_clip_shown_backwards_tells_the_same_story_from_its_end() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        story = draw_story(rng, World())
        turned = backwards(story)
        for time in np.linspace(0.01, 0.99, 11):
            for ours, theirs in zip(story.scene(time), turned.scene(1 - time), strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    assert (ours.x, ours.y) == pytest.approx((theirs.x, theirs.y))
                    assert ours.colour == theirs.colour
        assert backwards(turned).things == story.things


def test_kept_clips_are_asked_anew_with_fewer_frames(checkpoint: Checkpoint) -> None:
    frozen, _ = parts_of(checkpoint)
    rng = np.random.default_rng(3)
    shelf = Shelf(lambda rng, frames: look_at_clip(frozen, rng, World(), frames), {16: 0.5, 32: 0.5})
    shelf.fill(rng, 4, "clips")
    for _ in range(12):
        clips = draw_clips(rng, shelf, 2) if all(shelf.kept[size] for size in (16, 32)) else []
        assert len({len(clip.times) for clip in clips}) <= 1
        for clip in clips:
            assert clip.times[0] == 0
            assert clip.times[-1] == 1
            assert (clip.times.diff() > 0).all()
            assert clip.relevance.shape[1:] == clip.pooled.shape[:2]


def test_a_group_has_the_visual_tokens_of_each_image_in_turn(checkpoint: Checkpoint) -> None:
    frozen, _ = parts_of(checkpoint)
    group = look_at_group(frozen, np.random.default_rng(8), World(), 3)
    assert isinstance(group, Prefixed)
    assert group.visual_tokens.shape == (96, checkpoint.visual_width)
    assert not torch.equal(group.visual_tokens[:32], group.visual_tokens[32:64])


def test_kept_images_make_new_groups(checkpoint: Checkpoint) -> None:
    frozen, _ = parts_of(checkpoint)
    rng = np.random.default_rng(8)
    four = look_at_four(frozen, rng, World())
    assert four.visual_tokens.shape == (4, 32, checkpoint.visual_width)
    for images in (2, 3, 4):
        group = regrouped(rng, [four], images)
        parts = group.visual_tokens.unflatten(0, (images, 32))
        places = [next(i for i in range(4) if torch.equal(part, four.visual_tokens[i])) for part in parts]
        assert len(set(places)) == images
        assert group.questions


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
        if not file.name.startswith("clip"):
            (before / file.name).write_bytes(file.read_bytes())
    average(before, after, 0.5, tmp_path / "out")
    for name in FOR_CLIPS:
        ours, theirs = (load_file(folder / name) for folder in (tmp_path / "out", after))
        assert all(torch.equal(ours[weight], theirs[weight]) for weight in theirs)


def test_averaging_leaves_out_what_belongs_to_the_weights_before(tiny_training: Path, tmp_path: Path) -> None:
    before = tiny_training / "checkpoint"
    after = tmp_path / "after"
    after.mkdir()
    for file in before.iterdir():
        if file.name not in FOR_CLIPS:
            (after / file.name).write_bytes(file.read_bytes())
    average(before, after, 0.5, tmp_path / "out")
    forget_clips(tmp_path / "out")
    assert not any((tmp_path / "out" / name).exists() for name in FOR_CLIPS)
    card = json.loads((tmp_path / "out" / "model_card.json").read_text())
    assert "knows_clips" not in card
    assert set(card["parameters"]) == {"model", "participatory", "balancing", "closer"}
    assert Checkpoint.load(tmp_path / "out").clip is None


def test_weights_for_clips_of_another_size_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for file in checkpoint.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = (tmp_path / "clip.safetensors").read_bytes()
    (tmp_path / "clip.safetensors").write_bytes((tmp_path / "allocator.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"clip\.safetensors does not fit the checkpoint's Q-Former"):
        Checkpoint.load(tmp_path)
    (tmp_path / "clip.safetensors").write_bytes(own)
    (tmp_path / "clip_language.safetensors").write_bytes(own)
    with pytest.raises(ValueError, match=r"clip_language\.safetensors does not fit the checkpoint's language model"):
        Checkpoint.load(tmp_path)


def test_a_report_tells_each_kind_and_all() -> None:
    report = told(np.array([True, False, True]), ["way", "way", "count"])
    assert {kind: (row["n"], row["accuracy"]) for kind, row in report.items()} == {
        "count": (1, 1.0), "way": (2, 0.5), "all": (3, 0.6667),
    }  # fmt: skip
