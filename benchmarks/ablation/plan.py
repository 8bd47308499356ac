"""What the ablations measure, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Plan:
    """The size of a run and its folders.

    Arms that the verdict needs are asked about all `scenes`, other arms about the first half.
    """

    checkpoint: Path = PROJECT / "reference"
    repository: Path = PROJECT / "model_repository"
    kept: Path = PROJECT / "runs" / "ablation"  # folder of finished work
    scenes: int = 1000  # of the training world
    small_print: int = 200
    timed: int = 200  # runs of each exported graph
    out: Path = PROJECT / "build" / "bench"  # folder of the report, and of that of benchmarks.stages

    @property
    def command(self) -> str:
        return f"python -m benchmarks.ablate --scenes {self.scenes} --small-print {self.small_print}"
