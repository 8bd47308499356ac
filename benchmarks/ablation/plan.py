"""What the ablations measure, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).parent.parent.parent
RESULTS = PROJECT / "benchmarks" / "results"


@dataclass(frozen=True)
class Plan:
    """scenes: of the training world; what must show is asked about all of them, the other arms about the first half.
    kept: where finished work is kept. timed: runs of each exported graph."""

    checkpoint: Path = PROJECT / "reference"
    repository: Path = PROJECT / "model_repository"
    kept: Path = PROJECT / "runs" / "ablation"
    scenes: int = 1000
    small_print: int = 200
    timed: int = 200

    @property
    def command(self) -> str:
        return f"python -m benchmarks.ablate --scenes {self.scenes} --small-print {self.small_print}"
