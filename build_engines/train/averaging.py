"""Average a checkpoint with the one that training went on from, and publish the result.

    python -m build_engines.train.averaging reference runs/wide/checkpoint --out runs/averaged

Weights half-way between those before and after a fine-tuning keep what the first could do. They gain most of what the
second learnt (WiSE-FT: Wortsman et al. 2022, arXiv:2109.01903). This holds only where the second began as the first.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from build_engines.calibration.checkpoint import calibrate_checkpoint
from build_engines.model.checkpoint import CLIP, CLIP_LANGUAGE, without_clips
from build_engines.train.evaluation import Chain, committed_report
from build_engines.train.publishing import CALIBRATION_SCENES, closer_view_at, tell

FOR_CLIPS = (CLIP, CLIP_LANGUAGE)


def average(before: Path, after: Path, share: float, out: Path) -> None:
    """Write `before` with weights that are `share` of the way to those of `after`.

    share: in [0, 1]. A part that only `after` has is taken from there. What only `before` has for clips is left out: it
    belongs to weights that are not kept, and the stage `clips` makes it again. All else is copied from `before`. Raises
    ValueError if the two differ in more than their weights' values.
    """
    out.mkdir(parents=True, exist_ok=True)
    for file in after.glob("*.safetensors"):
        if not (before / file.name).exists():
            shutil.copyfile(file, out / file.name)
    for file in before.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
            continue
        if file.name in FOR_CLIPS and not (after / file.name).exists():
            continue
        with safe_open(file, "pt") as ours, safe_open(after / file.name, "pt") as theirs:
            if set(ours.keys()) != set(theirs.keys()):
                raise ValueError(f"{before} and {after} have different weights in {file.name}")
            weights = {name: _between(ours.get_tensor(name), theirs.get_tensor(name), share) for name in ours.keys()}  # noqa: SIM118
            save_file(weights, out / file.name, metadata=ours.metadata())


def forget_clips(directory: Path) -> None:
    """Take what the card says of clips away, if the checkpoint has no weights for them."""
    if any((directory / name).exists() for name in FOR_CLIPS):
        return
    path = directory / "model_card.json"
    path.write_text(json.dumps(without_clips(json.loads(path.read_text())), indent=2) + "\n")


def _between(ours: torch.Tensor, theirs: torch.Tensor, share: float) -> torch.Tensor:
    if ours.shape != theirs.shape:
        raise ValueError(f"a weight is {list(ours.shape)} in one checkpoint and {list(theirs.shape)} in the other")
    return torch.lerp(ours.float(), theirs.float(), share).to(ours.dtype) if ours.is_floating_point() else ours


def publish(directory: Path) -> None:
    """Measure what the card tells of the weights: when `auto` looks closer, accuracy, calibration."""
    forget_clips(directory)
    chain = Chain.load(directory)
    tell(directory, {"closer_view_at": closer_view_at(chain, CALIBRATION_SCENES)})
    tell(directory, {"accuracy_in_pytorch": committed_report(chain)})
    calibrate_checkpoint(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the checkpoint that training began with")
    parser.add_argument("after", type=Path, help="what training made of it")
    parser.add_argument("--share", type=float, default=0.5, help="of the way from before to after [0.5]")
    parser.add_argument("--out", type=Path, required=True)
    told = parser.parse_args()
    average(told.before, told.after, told.share, told.out)
    publish(told.out)
    card = json.loads((told.out / "model_card.json").read_text())
    print(json.dumps({split: rows["adaptive"]["all"] for split, rows in card["accuracy_in_pytorch"].items()}, indent=2))


if __name__ == "__main__":
    main()
