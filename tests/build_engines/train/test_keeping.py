"""What frozen weights said is kept in files, and never taken for what other weights say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from build_engines.model import fingerprint
from build_engines.model.qformer import QFormer
from build_engines.train import keeping
from build_engines.train.__main__ import main
from build_engines.train.clips_stage import train_clips
from build_engines.train.publishing import parts_before_clips
from build_engines.train.stages import Plan

COMMON = ["--tiny", "--eager", "--threads", "1"]


class Killed(BaseException):
    """Raised where a kill would end the program."""


class Fatal:
    """Ends the program when it is written."""

    def __reduce__(self) -> tuple[object, ...]:
        raise Killed


def test_a_file_of_another_key_or_of_none_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "looks_0.pt"
    assert keeping.load(path, "one") is None
    keeping.save(path, "one", {"looks": [1, 2]})
    assert keeping.load(path, "one") == {"looks": [1, 2]}
    assert keeping.load(path, "other") is None
    for earlier in ({"looks": [1]}, ([1], [2])):  # as earlier versions wrote them
        torch.save(earlier, path)
        assert keeping.load(path, "one") is None


def test_a_kill_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "looks_0.pt"
    keeping.save(path, "one", [1, 2])
    with pytest.raises(Killed):
        keeping.save(path, "one", [3, Fatal()])
    assert keeping.load(path, "one") == [1, 2]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_cut_file_is_made_again(tmp_path: Path, share: float) -> None:
    path = tmp_path / "looks_0.pt"
    keeping.save(path, "one", torch.zeros(1000))
    os.truncate(path, int(share * path.stat().st_size))
    assert keeping.load(path, "one") is None


@pytest.mark.slow
def test_looks_of_another_encoder_are_drawn_again(tiny_training: Path, tmp_path: Path) -> None:
    """The vision is trained again, and the stage `allocator` with it, in the folder of an earlier run."""
    out = tmp_path / "out"
    shutil.copytree(tiny_training, out)
    (out / "allocator.pt").unlink()
    joint = torch.load(out / "joint.pt", weights_only=False)
    model = joint["modules"]["model"]
    model["vision_model.embeddings.patch_embedding.weight"] *= 1.5
    torch.save(joint, out / "joint.pt")
    before = looks(out)
    assert main(["--out", str(out), *COMMON, "--stages", "allocator", "--resume"]) == 0
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(before, looks(out), strict=True))


def looks(out: Path) -> list[torch.Tensor]:
    saved = torch.load(out / "looks_0.pt", weights_only=False)["content"]
    return [saved[name]["kept"].features for name in ("plain", "close")]


@pytest.mark.slow
def test_clips_are_looked_at_again_by_other_weights(tiny_training: Path, tmp_path: Path) -> None:
    """So are the symbols of a published checkpoint. What the same weights said is loaded.

    The stage runs without the command, which would write and evaluate a checkpoint after it.
    """
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(tiny_training / "checkpoint", checkpoint)
    out.mkdir()
    plan = Plan(out, compiled=False, tiny=True, start=checkpoint)
    train_clips(plan)
    paths = [out / "clips_kept_0.pt", out / "clips_symbols.pt"]
    first = [path.stat().st_ino for path in paths]
    (out / "clips.pt").unlink()
    train_clips(plan)
    assert [path.stat().st_ino for path in paths] == first
    weights = load_file(checkpoint / "model.safetensors")
    weights["language_projection.weight"] = weights["language_projection.weight"] * 1.5
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    os.truncate(paths[0], paths[0].stat().st_size // 2)
    (out / "clips.pt").unlink()
    before = torch.load(paths[1])["content"]
    train_clips(plan)
    after = torch.load(paths[1])["content"]
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    parts = parts_before_clips(plan)
    named = fingerprint.of_modules(parts.model.vision_model, parts.allocator, QFormer(parts.model))
    assert torch.load(paths[0], weights_only=False)["key"].startswith(named)
