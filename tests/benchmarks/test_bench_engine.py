"""Test that the bare engine limit uses inputs as long as the requests' own."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench.engine import STAGES, Work, feeds
from service.core.card import ModelCard
from triton_models.session import open_session

REPOSITORY = Path("model_repository")
WORK = Work(vision_tokens=180, text_tokens=11)
VISUAL_TOKENS = 32


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_runs_on_its_own_inputs(stage: str) -> None:
    session = open_session(REPOSITORY / STAGES[stage] / "1" / "model.onnx")
    card = ModelCard.from_json((REPOSITORY / "card.json").read_text())
    given = feeds(stage, 2, session, card, WORK)
    found = session.run(None, dict(given))
    assert all(len(output) == 2 for output in found)
    if stage == "qformer":
        assert given["vision_tokens"].shape[1] == given["attend"].shape[1] == 181  # CLS too
    if stage == "prefill":
        assert given["input_ids"].shape == (2, VISUAL_TOKENS + 11)
    if stage == "step":
        assert given["input_ids"].shape == (2, 1)
        assert given["past_key_0"].shape[2] == given["past_lengths"][0] == VISUAL_TOKENS + 11 + 8
