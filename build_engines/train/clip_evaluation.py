"""Evaluate a checkpoint on clips and groups of images in PyTorch, in FP32.

    python -m build_engines.train.clip_evaluation reference --clips 200 --groups 200

The committed clips and groups are asked, read from their files as the service reads them, and new ones of seeds that
nothing else uses. `glimpse eval --split clips` asks the served models.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from build_engines.evaluation.accuracy import CLIPS, FOLDERS, FRAMES, SEVERAL, Row, rows
from build_engines.evaluation.intervals import wilson
from build_engines.model.checkpoint import Checkpoint
from build_engines.model.clip_allocation import ClipAllocation
from build_engines.scenes.questions import Question
from build_engines.scenes.world import World
from build_engines.train.clip_store import ClipLook, Frozen, Prefixed, clip_look, look_at_clip, look_at_group, pictures
from build_engines.train.clips_stage import TEXT_TOKENS, Watcher, answer_clips, answer_groups
from build_engines.train.language import decoder_of
from build_engines.train.looks import Eye
from build_engines.train.packing import Packer
from build_engines.train.tokens import new_tokenizer
from service.media.clip import decode_clip
from service.media.decoder import ImageLimits

CLIPS_FROM, GROUPS_FROM = 501, 502  # seeds
IMAGES = (2, 3, 4)
UNASKED = (64, 256, 32, 32)  # the budget of a request that gives none


def parts_of(checkpoint: Checkpoint) -> tuple[Frozen, Watcher]:
    """Raises ValueError for a checkpoint without a clip resampler."""
    if checkpoint.clip is None:
        raise ValueError(f"{checkpoint.directory} has no clip resampler: train the stage clips")
    tokenizer, language = new_tokenizer(), checkpoint.clip_language or checkpoint.model.language_model
    frozen = Frozen(Eye.exact(checkpoint.model.vision_model), checkpoint.allocator(), checkpoint.qformer(), tokenizer)
    decode = decoder_of(language)
    packer = Packer(tokenizer, TEXT_TOKENS)
    return frozen, Watcher(language, decode, decode, checkpoint.clip.eval(), ClipAllocation(), packer)


def committed_clips(frozen: Frozen, frames: int) -> Iterator[ClipLook]:
    folder = FOLDERS[CLIPS]
    for name, questions in by_file(rows(folder)).items():
        clip = decode_clip((folder / name).read_bytes(), ImageLimits(), frames)
        times = np.array([frame.index for frame in clip.frames], np.float32)
        pixels = [frame.pixels.transpose(1, 2, 0) for frame in clip.frames]
        yield clip_look(frozen, pixels, times / max(1.0, times[-1]), questions)


def by_file(asked: list[Row]) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for row in asked:
        found.setdefault(row.clip, []).append(Question(row.question, row.answer, row.type, ()))
    return found


def committed_groups(frozen: Frozen) -> Iterator[Prefixed]:
    """Each question with the visual tokens that are chosen for it."""
    folder = FOLDERS[SEVERAL]
    for row in rows(folder):
        pixels = [np.asarray(Image.open(folder / name).convert("RGB")) for name in row.images]
        question = Question(row.question, row.answer, row.type, ())
        yield Prefixed(frozen.see(pictures(frozen.eye, pixels), question, UNASKED).flatten(0, 1), [question])


def told(right: np.ndarray, kinds: list[str]) -> dict[str, Any]:
    """By type and in all: n, accuracy and its interval."""
    report = {}
    for kind in [*sorted(set(kinds)), "all"]:
        chosen = right[[kind in (one, "all") for one in kinds]]
        report[kind] = {
            "n": len(chosen),
            "accuracy": round(float(chosen.mean()), 4),
            "interval": [round(edge, 4) for edge in wilson(int(chosen.sum()), len(chosen))],
        }
    return report


def report(checkpoint: Checkpoint, clips: int, groups: int) -> dict[str, Any]:
    """`told` of the committed files, and of so many new clips and groups, by frames or images."""
    frozen, watcher = parts_of(checkpoint)
    found: dict[str, Any] = {}
    for frames in FRAMES:
        found[f"{CLIPS}, {frames} frames"] = told(*answer_clips(watcher, list(committed_clips(frozen, frames))))
        rng = np.random.default_rng(CLIPS_FROM)
        drawn = [look_at_clip(frozen, rng, World(), frames) for _ in range(clips)]
        if clips:
            found[f"new clips, {frames} frames"] = told(*answer_clips(watcher, [clip for clip in drawn if clip]))
    given = list(committed_groups(frozen))
    for images in IMAGES:
        fitting = [group for group in given if len(group.visual_tokens) == 32 * images]
        found[f"{SEVERAL}, {images} images"] = told(*answer_groups(watcher, fitting))
        rng = np.random.default_rng(GROUPS_FROM)
        drawn_groups = [look_at_group(frozen, rng, World(), images) for _ in range(groups)]
        if groups:
            found[f"new groups of {images}"] = told(*answer_groups(watcher, [one for one in drawn_groups if one]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clips", type=int, default=100, help="new clips beside the committed ones [100]")
    parser.add_argument("--groups", type=int, default=100, help="new groups of each size [100]")
    parser.add_argument("--out", type=Path, help="write the whole report as JSON")
    options = parser.parse_args()
    with torch.no_grad():
        found = report(Checkpoint.load(options.checkpoint), options.clips, options.groups)
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({name: kinds["all"] for name, kinds in found.items()}, indent=2))


if __name__ == "__main__":
    main()
