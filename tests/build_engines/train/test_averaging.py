"""Test how two checkpoints are averaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from build_engines.train.averaging import average


def checkpoint(folder: Path, **weights: torch.Tensor) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(folder.name)
    return folder


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.25, 2.0), (1.0, 5.0)])
def test_weights_lie_between_those_of_both_and_the_rest_is_the_firsts(tmp_path, share, expected):
    before = checkpoint(tmp_path / "before", a=torch.ones(3).half(), n=torch.tensor([7]))
    after = checkpoint(tmp_path / "after", a=torch.full((3,), 5.0).half(), n=torch.tensor([7]))
    average(before, after, share, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["a"].dtype == torch.float16
    assert found["a"].tolist() == [expected] * 3
    assert found["n"].tolist() == [7]
    assert (tmp_path / "out" / "config.json").read_text() == "before"


def test_other_weights_are_refused(tmp_path):
    before = checkpoint(tmp_path / "before", a=torch.ones(3))
    shutil.copytree(before, tmp_path / "same")
    with pytest.raises(ValueError, match=r"different weights in model\.safetensors"):
        average(before, checkpoint(tmp_path / "named", b=torch.ones(3)), 0.5, tmp_path / "out")
    with pytest.raises(ValueError, match=r"\[3\] in one checkpoint and \[4\] in the other"):
        average(before, checkpoint(tmp_path / "shaped", a=torch.ones(4)), 0.5, tmp_path / "out")
