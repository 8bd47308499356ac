"""Trivy's own rules for what containers may do, over the manifests and the Dockerfile. It asks no network."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.test_kubernetes import OVERLAYS, objects
from tests.support.paths import PROJECT

# Rules that the manifests break on purpose.
ALLOWED = {
    "KSV-0011": "no limit of CPU: throttling would stop the event loop",
    "KSV-0020": "the user of Redis's own image is 999",
    "KSV-0021": "its group too",
    "KSV-0125": "an overlay of the operator's names the registry",
}


def findings(folder: Path) -> set[str]:
    """The rules that files of the folder break."""
    command = [
        ".venv/bin/trivy", "config", "--quiet", "--skip-check-update", "--skip-version-check",
        "--disable-telemetry", "--misconfig-scanners", "dockerfile,kubernetes",
        "--format", "json", "--cache-dir", str(folder.parent / "cache"), str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["Results"]
    assert all(result["MisconfSummary"]["Successes"] for result in results)
    return {fault["ID"] for result in results for fault in result.get("Misconfigurations", ())}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Everything that is committed, as Trivy reads it."""
    folder = tmp_path / "configuration"
    folder.mkdir()
    for overlay in OVERLAYS:
        (folder / f"{Path(overlay).name}.yaml").write_text(yaml.safe_dump_all(objects(overlay)))
    (folder / "Dockerfile").write_text((PROJECT / "Dockerfile").read_text())
    return folder


def test_trivy_finds_only_what_is_meant(folder: Path) -> None:
    assert findings(folder) == ALLOWED.keys()


@pytest.mark.parametrize(
    ("file", "good", "bad", "rule"),
    [
        ("cpu.yaml", "allowPrivilegeEscalation: false", "privileged: true", "KSV-0017"),
        ("cpu.yaml", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "KSV-0014"),
        ("Dockerfile", "USER 10001:10001", "USER root", "DS-0002"),
    ],
)
def test_trivy_finds_a_broken_copy(folder: Path, file: str, good: str, bad: str, rule: str) -> None:
    text = (folder / file).read_text()
    assert good in text
    (folder / file).write_text(text.replace(good, bad))
    assert rule in findings(folder)
