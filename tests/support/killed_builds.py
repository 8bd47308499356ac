"""Builds that are killed at every kind of step, one step later each time."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

from build_engines.convert import __main__ as build
from build_engines.convert.inspection import inspect
from build_engines.convert.plan import Step, plan
from build_engines.convert.run import is_done

PHASES = ("made", "finished", "begun")  # in this order no export and no samples are made twice


class Dies:
    """A watcher that kills its process at one moment of one step."""

    def __init__(self, phase: str, step: str) -> None:
        self.phase, self.step = phase, step

    def _tell(self, phase: str, step: Step) -> None:
        if (phase, step.name) == (self.phase, self.step):
            os.kill(os.getpid(), signal.SIGKILL)

    def skipped(self, step: Step) -> None: ...

    def begun(self, step: Step) -> None:
        self._tell("begun", step)

    def made(self, step: Step) -> None:
        self._tell("made", step)

    def finished(self, step: Step) -> None:
        self._tell("finished", step)


def build_until(arguments: list[str], environment: Mapping[str, str], phase: str, step: str) -> None:
    os.environ.update(environment)
    build.Bar = lambda _: Dies(phase, step)  # type: ignore[assignment, misc]
    build.main(arguments)


def kinds_to_do(arguments: list[str]) -> list[str]:
    """The first step of each action. The steps of the LLM's engine run other commands each: they are all there."""
    asked = build.options_of(build.parser().parse_args(arguments))
    source = inspect(asked.checkpoint)
    kinds: dict[str, str] = {}
    for step in plan(asked, source, build.root_of(source)):
        if not is_done(asked.work, step):
            kinds.setdefault(step.name if step.action == "llm" else step.action, step.name)
    return list(kinds.values())


def kill_at_every_step(arguments: list[str], environment: Mapping[str, str], out: Path) -> list[str]:
    """The names of the steps where a build ended, in one of the phases in turn: the first of each kind that is to do.

    What a build had made when it was killed as "made" is made again.
    """
    steps = kinds_to_do(arguments)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["build_engines.convert.steps", "tests.support.exporter"])
    for phase, step in zip(cycle(PHASES), steps, strict=False):
        process = context.Process(target=build_until, args=(arguments, dict(environment), phase, step))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, step
        assert not out.exists()
    return steps
