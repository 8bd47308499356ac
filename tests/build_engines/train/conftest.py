"""One tiny training for all files that look at its result."""

from pathlib import Path

import pytest

from build_engines.train.__main__ import STAGES, main
from tests.support.once import Once


@pytest.fixture(scope="session")
def tiny_training(once: Once) -> Path:
    """Run every stage with tiny sizes. Tests that go on with it copy it."""

    def train(folder: Path) -> None:
        every = ["--stages", ",".join(STAGES)]
        assert main(["--out", str(folder / "tiny"), *every, "--tiny", "--eager", "--threads", "1"]) == 0

    return once.made("training", train) / "tiny"
