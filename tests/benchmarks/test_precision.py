"""Test the benchmark of FP16 and FP8 on a tiny checkpoint and the first questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.precision import VISION, Graphs, end_to_end, scenes_of, steps_of, table, verdicts
from build_engines.convert.manifest import KEPT
from build_engines.evaluation.accuracy import rows
from service.core.card import ModelCard
from service.text.prompt import PromptBuilder
from tests.support.paths import SCENES
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_blip2_opt

pytestmark = pytest.mark.slow

QUESTIONS = 6


@pytest.fixture(scope="module")
def steps(exports: SharedExports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build `onnx-gpu` in FP16 up to the step parity."""
    folder = tmp_path_factory.mktemp("precision")
    save_blip2_opt(folder / "opt")
    wanted = ["--profile", "onnx-gpu", "--precision", "fp16", "--until", "parity", "--out", str(folder / "gpu")]
    assert exports.build(str(folder / "opt"), *wanted) == 0
    return steps_of(folder / "gpu")


def test_a_table_says_what_each_precision_answers_and_how_near_its_visual_tokens_are(steps: Path) -> None:
    """FP16 also stands for FP8, whose quantiser is not installed here."""

    def graphs(step: str) -> Graphs:
        return Graphs({name: steps / f"{step}-{name}" / "model.onnx" for name in (*VISION, "llm")})

    card = ModelCard.from_json((steps / "card" / "card.json").read_text())
    prompts = PromptBuilder.load(card, steps / "card")
    made = {"fp32": graphs("export"), "fp16": graphs("fp16"), "fp8": graphs("fp16")}
    found = table(made, card, prompts, SCENES, QUESTIONS)
    assert found["fp32"]["questions"] == QUESTIONS
    assert found["fp32"]["agreement"] == 1.0
    assert found["fp32"]["agreement_interval"][1] == 1.0
    half = found["fp16"]
    assert 0.99 < half["visual_tokens"]["least_cosine"] <= half["visual_tokens"]["cosine"] < 1.0
    assert all(cosine > 0.99 for cosine in half["vision_encoder_layers"])
    assert half["kept_in_fp32"]["vision_encoder"]["norm"] > 0
    assert (steps / "fp16-llm" / KEPT).exists()
    assert half["matrix_products"]["fp8"] == 0
    assert half == {key: value for key, value in found["fp8"].items() if key != "not_fp8"}


def test_the_end_is_as_near_as_its_questions_are() -> None:
    near, far = np.eye(3)[:2], np.array([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    found = end_to_end([near, far], [near, near])
    assert found["least_cosine"] == pytest.approx(0.8)
    assert found["cosine"] == pytest.approx(0.9)
    assert found["first_percentile"] == pytest.approx(0.802)


def test_a_bar_holds_up_to_its_edge() -> None:
    told = {name: {"agreement": 0.98, "accuracy_all": accuracy} for name, accuracy in (("fp32", 0.9), ("fp8", 0.88))}
    assert list(verdicts(told | {"fp16": told["fp32"] | {"agreement": 0.998}}).values()) == [True, True, False]


def test_fresh_scenes_are_none_that_were_chosen_by(tmp_path: Path) -> None:
    few = {"new": 2, "held_out_pairs": 1, "small_print": 1}
    fresh = scenes_of("fresh", tmp_path, few)
    assert scenes_of("committed", tmp_path) == SCENES
    asked = rows(fresh)
    assert {row.split for row in asked} == {"new", "held_out_pairs", "small_print"}
    assert all((fresh / row.image).exists() and not (SCENES / row.image).exists() for row in asked)
    written = (fresh / "questions.jsonl").stat().st_mtime_ns
    assert scenes_of("fresh", tmp_path, few) == fresh
    assert (fresh / "questions.jsonl").stat().st_mtime_ns == written
