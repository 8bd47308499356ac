"""Builds with another precision of the CPU: their steps, their repository, and what it answers when it is served."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest

from build_engines.convert.agreement import VISION, visual_tokens
from build_engines.convert.integers import to_int4, to_int8
from build_engines.convert.options import Options, Refused, checked
from build_engines.convert.plan import plan
from build_engines.convert.samples import samples
from build_engines.convert.steps import named
from service.core.card import ModelCard
from service.core.precision import REDUCED
from service.text.prompt import PromptBuilder
from tests.build_engines.convert.test_build_plan import ROOT, source
from tests.support.paths import SCENES
from tests.support.servers import StartGateway
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_blip2_opt

TIMEOUT_S = 60.0


@pytest.mark.parametrize(
    ("precision", "made"),
    [
        ("fp32", set()),
        ("bf16", {"bf16 vision_encoder", "bf16 qformer", "bf16 llm", "agreement"}),
        ("int8", {"int8 vision_encoder", "int8 qformer", "int8 llm", "agreement"}),
        ("int4", {"int8 vision_encoder", "int8 qformer", "int4 llm", "agreement"}),
    ],
)
def test_a_precision_adds_its_graphs_and_its_agreement(precision: str, made: set[str]) -> None:
    plain = {step.name for step in plan(checked(Options("blip", Path("/out"))), source(), ROOT)}
    steps = plan(checked(Options("blip", Path("/out"), precision=precision)), source(), ROOT)
    assert {step.name for step in steps} - plain == made
    assert all(set(step.needs) <= {other.name for other in steps[:index]} for index, step in enumerate(steps))
    beside = steps[-1].settings["beside_fp32"]
    assert set(beside.values()) == (made - {"agreement"} if precision != "bf16" else set())
    assert set(steps[-1].settings["served"].values()) == {name for name in plain if name.startswith("export")}


def test_a_count_of_no_questions_is_refused() -> None:
    with pytest.raises(Refused, match="--agreement-questions 0"):
        checked(Options("blip", Path("/out"), precision="int8", agreement_questions=0))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_build_has_fp32_and_the_other_graphs_and_says_how_often_they_agree(
    exports: SharedExports, tmp_path: Path, precision: str
) -> None:
    save_blip2_opt(tmp_path / "opt")
    wanted = ["--precision", precision, "--agreement-questions", "3", "--out", str(tmp_path / "built")]
    assert exports.build(str(tmp_path / "opt"), *wanted) == 0
    for name in (*REDUCED, "relevance_allocator"):
        files = {path.name for path in (tmp_path / "built" / name / "1").glob("*.onnx")}
        integers = precision == "int8" and name in REDUCED
        assert files == {"model.onnx", *(["model.int8.onnx"] if integers else [])}
    card = ModelCard.from_json((tmp_path / "built" / "card.json").read_text())
    assert card.precision == "fp32"
    measured = card.precisions[precision]
    assert measured["questions"] == 3
    assert 0 <= measured["agreement_least"] <= measured["agreement"] <= measured["agreement_most"] <= 1
    manifest = json.loads((tmp_path / "built" / "manifest.json").read_text())
    assert manifest["parity"]["against"] == "fp32"
    assert manifest["parity"]["graphs"]["vision_encoder"]["features"]["cosine"] > 0.99
    assert manifest["parity"]["graphs"]["vision_encoder"]["features"]["greatest_difference"] > 0


@pytest.mark.slow
def test_agreement_is_measured_with_the_budget_of_a_request_that_names_none(repository: Path) -> None:
    told = ModelCard.from_json((repository / "card.json").read_text())
    prompts = PromptBuilder.load(told, repository)
    graphs = {name: repository / name / "1" / "model.onnx" for name in VISION}
    coarse = replace(told, default_vision_tokens=(64, 64))
    as_if = replace(told, default_vision_tokens=None, vision_tokens=(64, 64))
    by_default, least, most = (visual_tokens(graphs, card, prompts, samples(None, 1)) for card in (coarse, as_if, told))
    np.testing.assert_array_equal(by_default, least)
    assert not np.array_equal(by_default, most)


@pytest.fixture(scope="module")
def in_integers(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference model's repository with graphs of int4 beside FP32's."""
    folder = tmp_path_factory.mktemp("int4") / "repository"
    folder.mkdir()
    for model in repository.iterdir():
        if model.name not in REDUCED:
            (folder / model.name).symlink_to(model)
            continue
        (folder / model.name / "1").mkdir(parents=True)
        (folder / model.name / "config.pbtxt").symlink_to(model / "config.pbtxt")
        for file in [each for each in (model / "1").iterdir() if each.is_file()]:
            (folder / model.name / "1" / file.name).symlink_to(file)
        graph = named(onnx.load(model / "1" / "model.onnx"))
        kept = to_int4(graph, model) if model.name == "llm" else to_int8(model.name, graph, model)
        assert not kept
        onnx.save(graph, folder / model.name / "1" / f"model.{'int4' if model.name == 'llm' else 'int8'}.onnx")
    return folder


@pytest.mark.slow
async def test_a_service_computes_in_the_precision_that_is_set_and_says_so(
    in_integers: Path, start_gateway: StartGateway
) -> None:
    card = ModelCard.from_json((in_integers / "card.json").read_text())
    image = base64.b64encode((SCENES / "new_003.webp").read_bytes()).decode()
    settings = {"GLIMPSE_MODEL_REPOSITORY": str(in_integers), "GLIMPSE_PRECISION": "int4"}
    with start_gateway(settings) as gateway:
        async with httpx.AsyncClient(base_url=gateway.url, timeout=TIMEOUT_S) as http:
            (model,) = (await http.get("/v1/models")).json()["data"]
            metrics = (await http.get("/metrics")).text
            said = [
                (await http.post("/v1/vqa", json={"image": image, "question": question})).raise_for_status().json()
                for question in ("what character is on the pink square?", "how many objects are there?")
            ]
        assert "event=precision" in gateway.log()
    assert model["precision"] == "int4"
    assert model["fingerprint"] == card.computed_in("int4").fingerprint != card.fingerprint
    assert f'glimpse_model_info{{model="{card.name}",precision="int4"}} 1.0' in metrics
    assert [each["answer"] for each in said] == ["8", "4"]
    fp32 = 0.7534  # the same question's confidence in FP32, as in the README
    assert said[0]["confidence"] != fp32  # the graphs are other ones
    assert said[0]["confidence"] == pytest.approx(fp32, abs=0.1)
