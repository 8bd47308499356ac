"""Collect checks and their results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "failed", "not run"]


@dataclass(frozen=True)
class Check:
    """One check: it holds, it failed, or it could not run here."""

    name: str
    state: State
    told: str = ""  # what is wrong, or why it did not run


@dataclass
class Report:
    """Checks in order, and measurements."""

    checks: list[Check] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Record a check as failed if the block raises, else as ok."""
        try:
            yield
        except Exception as exc:  # any error is possible in a wrong repository; each is one line of the report
            told = " ".join(str(exc).split()) or type(exc).__name__
            self.checks.append(Check(name, "failed", told))
        else:
            self.checks.append(Check(name, "ok"))

    def not_run(self, name: str, why: str) -> None:
        self.checks.append(Check(name, "not run", why))

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.state == "failed"]

    @property
    def verdict(self) -> str:
        """One line: whether the repository is fit to serve, and what did not run."""
        unseen = [check.name for check in self.checks if check.state == "not run"]
        if self.failed:
            return f"NOT fit to serve: {len(self.failed)} of {len(self.checks)} checks failed"
        proven = f"fit to serve: {len(self.checks) - len(unseen)} checks hold"
        return proven + (f"; not run here: {', '.join(unseen)}" if unseen else "")

    def text(self) -> str:
        """The report for the terminal."""
        lines = [f"{check.state:8} {check.name}" + (f": {check.told}" if check.told else "") for check in self.checks]
        lines += [f"{'measured':8} {name}: {_short(value)}" for name, value in self.measured.items()]
        return "\n".join([*lines, self.verdict])

    def write(self, path: Path) -> None:
        told = {
            "verdict": self.verdict,
            "checks": [vars(check) for check in self.checks],
            "measured": self.measured,
        }
        path.write_text(json.dumps(told, indent=2) + "\n")


def _short(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
