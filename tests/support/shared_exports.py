"""Builds that share their exported graphs: PyTorch's exporter takes 10 s of CPU time a graph, everything else little.

Each graph is exported once in a run of the tests, by the first build that needs it. Later builds find it in their work
folder as the finished step of a build before: with the same key, which is a digest of the checkpoint, the code, the
versions and the step's settings. A build checks the key and the digest of every file, as ever.

A test that is about the exporting itself calls `build.main`.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

from build_engines.convert import __main__ as build
from build_engines.convert.inspection import inspect
from build_engines.convert.options import Options
from build_engines.convert.plan import Step, plan
from build_engines.convert.run import is_done
from tests.support.once import locked


class SharedExports:
    """Finished export steps in a folder, by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(self, *arguments: str) -> int:
        """Run `glimpse build` -> its exit status."""
        options = build.options_of(build.parser().parse_args(arguments))
        options.work.mkdir(parents=True, exist_ok=True)
        with ExitStack() as making:  # another process that needs one of these exports waits for it
            missing = [step for step in exports_of(options) if not self._lend(step, options.work, making)]
            status = build.main(list(arguments))
            for step in missing:
                if is_done(options.work, step):
                    self._keep(step, options.work)
        return status

    def lend(self, *arguments: str, but: Collection[str]) -> None:
        """Put the exports that an earlier build made into this one's work folder, but those of some graphs."""
        options = build.options_of(build.parser().parse_args(arguments))
        options.work.mkdir(parents=True)
        for step in exports_of(options):
            if step.settings["graph"] not in but:
                shutil.copytree(self.folder / step.key, options.work / step.folder)

    def _lend(self, step: Step, work: Path, making: ExitStack) -> bool:
        """Copy a kept export; if there is none, hold its lock for as long as `making` lasts."""
        kept = self.folder / step.key
        lock = ExitStack()
        lock.enter_context(locked(kept.with_suffix(".lock")))
        if kept.exists():
            lock.close()
            shutil.copytree(kept, work / step.folder, dirs_exist_ok=True)
            return True
        making.push(lock)
        return False

    def _keep(self, step: Step, work: Path) -> None:
        partial = self.folder / f"{step.key}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(work / step.folder, partial)
        partial.rename(self.folder / step.key)


def exports_of(options: Options) -> list[Step]:
    """List a build's export steps, in the order of their keys: in this order every process takes its locks."""
    source = inspect(options.checkpoint)
    steps = plan(options, source, build.root_of(source))
    return sorted((step for step in steps if step.action == "export"), key=lambda step: step.key)
