"""Calibrate a trained checkpoint before it is built."""

from __future__ import annotations

import tempfile
from pathlib import Path

from build_engines.calibration.__main__ import reference_material, weights_of
from build_engines.calibration.asking import WORDS
from build_engines.calibration.chain import Chain
from build_engines.calibration.fitting import TooFew, fitted
from build_engines.calibration.several import with_several
from build_engines.calibration.writing import write
from build_engines.export import export


def calibrate_checkpoint(checkpoint: Path, share: float = 1.0) -> bool:
    """Export to a folder of its own, ask that, and write the calibration into model_card.json.

    `share` is that of the usual number of questions. Return False, and write nothing, if the checkpoint answers too few
    of them rightly.
    """
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        export(checkpoint, repository)
        chain = Chain.load(repository)
        try:
            calibration = fitted(reference_material(chain, share), WORDS, weights_of(chain.card))
            calibration = with_several(calibration, chain, share)
        except TooFew as error:
            print(f"not calibrated: {error}")
            return False
        write(calibration, repository, checkpoint)
    return True


def calibrate_several(checkpoint: Path) -> None:
    """Calibrate answers about clips and several images only. Nothing is done without a calibration of one image."""
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder)
        export(checkpoint, repository)
        chain = Chain.load(repository)
        if chain.card.confidence is not None:
            write(with_several(chain.card.confidence, chain), repository, checkpoint)
