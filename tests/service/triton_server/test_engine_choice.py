"""The precision that a start chooses for a repository on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.core.precision import REDUCED
from service.settings import Settings, SettingsError
from service.triton_server.engine_choice import choice
from tests.support.fakes import CARD


@pytest.mark.parametrize(("llm", "other"), [("int8", "int4"), ("int4", "int8")])
def test_a_precision_that_the_llm_has_no_graph_of_is_refused(tmp_path: Path, llm: str, other: str) -> None:
    for model in REDUCED:
        (tmp_path / model / "1").mkdir(parents=True)
        built = llm if model == "llm" else "int8"
        for name in ("model.onnx", f"model.{built}.onnx"):
            (tmp_path / model / "1" / name).touch()
    assert choice(Settings(model_repository=tmp_path, precision=llm), CARD).precision == llm
    with pytest.raises(
        SettingsError, match=f"has no {other} graphs: build it with `glimpse build ... --precision {other}`"
    ):
        choice(Settings(model_repository=tmp_path, precision=other), CARD)
