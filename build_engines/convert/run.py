"""Run the steps of a plan. A step's folder appears complete or not at all.

    WORK/<step>/          the step's output, and done.json: its key and the digest of every file
    WORK/<step>.partial/  left by a killed step, and removed

A step is skipped if its folder has its key and every file is unchanged. It also runs again if it was made on another
GPU than this machine's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from build_engines.convert.plan import Step
from build_engines.convert.source import file_digest
from build_engines.replacing import replacing

DONE = "done.json"
TOOL = "tool.json"  # of a step: what its tool reports of itself and of the GPU

Make = Callable[[Step, Path], None]  # writes a step's output into the folder


class Watcher(Protocol):
    """Receives the progress of each step.

    `made` comes after the step's files are written and before its folder is renamed.
    """

    def skipped(self, step: Step) -> None: ...
    def begun(self, step: Step) -> None: ...
    def made(self, step: Step) -> None: ...
    def finished(self, step: Step) -> None: ...


def run(steps: Sequence[Step], work: Path, make: Make, watcher: Watcher, done: Collection[str] | None = None) -> None:
    """Run the steps that are not done. A step's error propagates; earlier steps stay done for the next run.

    `done` are the names of the steps that are done; None: see `is_done`.
    """
    work.mkdir(parents=True, exist_ok=True)
    for step in steps:
        if step.name in done if done is not None else is_done(work, step):
            watcher.skipped(step)
            continue
        watcher.begun(step)
        partial, folder = work / f"{step.folder}.partial", work / step.folder
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        make(step, partial)
        declare_done(step, partial)
        watcher.made(step)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        watcher.finished(step)


def declare_done(step: Step, folder: Path) -> None:
    """Write the step's key and the digest of every file into the folder of its output."""
    told = {"step": step.name, "key": step.key, "outputs": digests(folder)}
    (folder / DONE).write_text(json.dumps(told, indent=2) + "\n")


def is_done(work: Path, step: Step, device: str = "") -> bool:
    """Whether the step's output exists with this key, is unchanged, and was not made on another GPU than `device`.

    A step that ran elsewhere stays done on a machine without a GPU (`device` is empty), which could not repeat it.
    """
    folder = work / step.folder
    try:
        done = json.loads((folder / DONE).read_text())
        if done["key"] != step.key or done["outputs"] != digests(folder):
            return False
        made_on = json.loads((folder / TOOL).read_text()).get("device", "") if (folder / TOOL).exists() else ""
    except (OSError, ValueError, KeyError):
        return False
    return not (device and made_on) or made_on == device


def digests(folder: Path) -> dict[str, str]:
    """blake3 of every file below the folder except done.json, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / DONE)
    return {str(path.relative_to(folder)): file_digest(path) for path in files}


def publish(folder: Path, out: Path) -> None:
    """Replace `out` by a step's output."""
    with replacing(out) as fresh:
        shutil.copytree(folder, fresh, copy_function=_link, ignore=shutil.ignore_patterns(DONE))


def _link(source: str, target: str) -> None:
    """Hard-link large files if the file system can; copy small ones, which people edit."""
    if os.path.getsize(source) >= 10_000_000:
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(source, target)
