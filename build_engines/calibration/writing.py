"""Write a calibration where the service and later builds find it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from service.core.card import ModelCard
from service.core.confidence import Calibration


def write(calibration: Calibration, repository: Path, checkpoint: Path | None) -> None:
    """Write the calibration and what it was fitted on."""
    path = repository / "card.json"
    card = ModelCard.from_json(path.read_text())
    metadata = dict(card.metadata) | {"confidence": calibration.about()}
    path.write_text(replace(card, confidence=calibration, metadata=metadata).to_json())
    if checkpoint is not None:
        path = checkpoint / "model_card.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {"confidence": calibration.to_json()}, indent=2) + "\n")
