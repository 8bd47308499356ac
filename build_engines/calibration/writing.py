"""Write a calibration where the service and later builds find it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from build_engines.convert.manifest import NAME, as_text
from build_engines.convert.source import file_digest
from service.core.card import ModelCard
from service.core.confidence import Calibration

CARD = "card.json"


def write(calibration: Calibration, repository: Path, checkpoint: Path | None) -> None:
    """Write the calibration and what it was fitted on. Each file is whole at every moment: old or new."""
    path = repository / CARD
    card = ModelCard.from_json(path.read_text())
    metadata = dict(card.metadata) | {"confidence": calibration.about()}
    _replace(path, replace(card, confidence=calibration, metadata=metadata).to_json())
    if (repository / NAME).exists():
        _tell_manifest(repository)
    if checkpoint is not None:
        path = checkpoint / "model_card.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        _replace(path, json.dumps(known | {"confidence": calibration.to_json()}, indent=2) + "\n")


def _tell_manifest(repository: Path) -> None:
    """Write the new card's digest into the manifest, for `glimpse verify`."""
    told = json.loads((repository / NAME).read_text())
    told["files"][CARD] = file_digest(repository / CARD)
    _replace(repository / NAME, as_text(told))


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
