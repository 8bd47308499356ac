"""schemathesis against a running service: examples from its OpenAPI, every check, operations alone and in sequences."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.bench.models import PROJECT

HOOKS = "benchmarks.fuzz.schema_hooks"
PHASES = "examples,coverage,fuzzing,stateful"


def program() -> str:
    """Raises RuntimeError if it is not installed."""
    beside = Path(sys.executable).parent / "schemathesis"
    found = str(beside) if beside.exists() else shutil.which("schemathesis")
    if found is None:
        raise RuntimeError("schemathesis is not installed: python3 scripts/set_up.py develop")
    return found


def run(
    url: str, examples: int, seed: int, folder: Path, key: str = "", *, only: str = "", phases: str = PHASES
) -> dict[str, Any]:
    """A report; what schemathesis says is in `folder`/schema.log too. With a key it also tries without one.

    `only`: a regular expression that the paths of the operations hold; empty for all. Raises RuntimeError if
    schemathesis is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = folder / "schema.json"
    found.unlink(missing_ok=True)
    command = [program(), "run", f"{url}/openapi.json", "--checks", "all", "--phases", phases, "--continue-on-failure"]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--generation-database", "none", "--no-color"]
    command += ["--suppress-health-check", "filter_too_much"]  # of the batch, whose items may be anything
    if only:
        command += ["--include-path-regex", only]
    if key:
        command += ["--header", f"Authorization: Bearer {key}"]
    command += ["--report", "json", "--report-json-path", str(found)]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": HOOKS, "PYTHONPATH": str(PROJECT)}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    (folder / "schema.log").write_text(ran.stdout + ran.stderr)
    said = json.loads(found.read_text()) if found.exists() else {}
    return {
        "schemathesis": said.get("schemathesis_version"),
        "examples": examples,
        "keys": bool(key),
        "only": only,
        "seed": seed,
        "seconds": round(said.get("running_time", 0.0), 1),
        "operations": said.get("operations", {}).get("tested"),
        "phases": {name: phase["status"] for name, phase in said.get("phases", {}).items()},
        "cases": said.get("test_cases", {}).get("generated"),
        "answers_to_valid_cases": said.get("valid_rates"),
        "failures": said.get("failures"),
        "wrong": [] if ran.returncode == 0 else [ran.stdout[-4000:] + ran.stderr[-2000:]],
    }
