"""Run one training stage: steps, schedule, log, and checkpoints for resuming.

Every step has its own random generators, NumPy's and PyTorch's, seeded with the stage, the step's number and the
replica. A resumed run therefore draws the same numbers as an uninterrupted one. A stage's store of scenes is again that
of its first step: what was renewed since then is lost, and the weights come out a little differently.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from build_engines.train import replicas
from build_engines.train.stages import Plan

Measures = dict[str, float]


PROCESSES = "processes (--threads)"


class OtherSettingsError(ValueError):
    """A stage's checkpoint was begun with other settings."""


def refuse_other_settings(path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise OtherSettingsError if the checkpoint `saved`, in the file `path`, was begun with other settings.

    A finished stage may have run in any number of processes. Checkpoints of earlier versions have no settings.
    """
    begun = saved.get("settings", {})
    compared = [name for name in settings if name in begun and not (name == PROCESSES and saved["finished"])]
    other = [name for name in compared if begun[name] != settings[name]]
    if other:
        was, now = (", ".join(f"{name} {each[name]}" for name in other) for each in (begun, settings))
        raise OtherSettingsError(
            f"{path} was begun with {was}, and this run has {now}: give the same options, or choose another --out"
        )


def check_settings(plan: Plan, stage: str, processes: int) -> None:
    """Raise OtherSettingsError if the stage's checkpoint, if there is one, was begun with other settings."""
    path = plan.out / f"{stage}.pt"
    if path.exists():
        saved = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        refuse_other_settings(path, saved, plan.settings | {PROCESSES: processes})


@dataclass
class Course:
    """A resumable stage. `state` holds the stage's own values, such as a curriculum's position."""

    plan: Plan
    name: str
    steps: int
    modules: dict[str, nn.Module]
    optimizers: list[torch.optim.Optimizer]
    warmup: int = 50
    decay_share: float = 0.35  # of the steps at the end in which the rate falls to zero
    checkpoint_s: float = 60.0
    state: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    norms: Callable[[], Measures] = dict  # gradient norms, measured at every step before clipping

    def __post_init__(self) -> None:
        self.plan.out.mkdir(parents=True, exist_ok=True)
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    @property
    def path(self) -> Path:
        return self.plan.out / f"{self.name}.pt"

    @property
    def settings(self) -> dict[str, Any]:
        """What every start of the stage must have in common."""
        return self.plan.settings | {"steps": self.steps, PROCESSES: replicas.size()}

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    def resume(self) -> bool:
        """Load the stage's checkpoint if there is one. Returns whether there was.

        Raises OtherSettingsError if it was begun with other settings.
        """
        if not self.path.exists():
            return False
        saved = torch.load(self.path, map_location="cpu", weights_only=False)
        refuse_other_settings(self.path, saved, self.settings)
        for name, module in self.modules.items():
            module.load_state_dict(saved["modules"][name])
        if not saved["finished"]:
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        self.step, self.state = saved["step"], saved["state"]
        if saved["finished"]:
            self.step = self.steps
        return True

    def save(self) -> None:
        """Save atomically: a kill leaves the previous or the new checkpoint. All replicas have equal weights."""
        partial = self.path.with_suffix(".partial")
        torch.save(
            {
                "modules": {name: module.state_dict() for name, module in self.modules.items()},
                "optimizers": [] if self.finished else [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "state": self.state,
                "finished": self.finished,
                "settings": self.settings,
            },
            partial,
        )
        os.replace(partial, self.path)

    @property
    def _seed(self) -> tuple[int, int, int]:
        """The current step's. Training seeds are far from the held-out ones."""
        return zlib.crc32(self.name.encode()), self.step, 7 + replicas.rank()

    def rng(self) -> np.random.Generator:
        """The generator of the current step's data."""
        return np.random.default_rng(self._seed)

    def rate(self) -> float:
        """The share of the full learning rate at the current step: a rise, a plateau, a fall to zero."""
        falling = (self.steps - self.step) / max(1.0, self.decay_share * self.steps)
        return max(0.0, min(1.0, (self.step + 1) / self.warmup, falling))

    def run(
        self,
        losses: Callable[[np.random.Generator], Iterable[tuple[Tensor, Measures]]],
        validate: Callable[[], Measures],
        validate_every: int,
        stop_after: int | None = None,
    ) -> None:
        """Train to the end. `losses` yields a step's micro-batches, each back-propagated at once.

        stop_after ends the run after that many steps, as a kill would (for tests).
        """
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        bar = tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5.0, disable=replicas.rank() > 0)
        saved_at, done = time.monotonic(), 0
        recent: dict[str, list[float]] = {}
        while not self.finished and done != stop_after:
            share = self.rate()
            for optimizer, rates in zip(self.optimizers, self._rates, strict=True):
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * share
                optimizer.zero_grad(set_to_none=True)
            torch.manual_seed(int(np.random.SeedSequence(self._seed).generate_state(1)[0]))
            for loss, measures in losses(self.rng()):
                loss.backward()
                for name, value in {"loss": loss.item(), **measures}.items():
                    recent.setdefault(name, []).append(value)
            replicas.average_gradients(parameters)
            for name, value in self.norms().items():
                recent.setdefault(name, []).append(value)
            torch.nn.utils.clip_grad_norm_(parameters, 2.0)
            for optimizer in self.optimizers:
                optimizer.step()
            self.step, done = self.step + 1, done + 1
            bar.update()
            if replicas.rank() > 0:
                continue
            if self.step % validate_every == 0 or self.finished:
                means = {name: float(f"{np.mean(values):.4g}") for name, values in recent.items()}
                recent.clear()
                self.log({"train": means, "valid": validate(), "state": self.state})
            if time.monotonic() - saved_at > self.checkpoint_s or self.finished:
                self.save()
                saved_at = time.monotonic()
        bar.close()

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON line to log.jsonl."""
        line = json.dumps({"stage": self.name, "step": self.step, "time": round(time.time(), 1), **record})
        with (self.plan.out / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        tqdm.write(line)
