"""Complete builds of the GPU profiles. `tensorrt` uses a stand-in for tools that need a GPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from build_engines.convert import __main__ as build
from build_engines.convert.manifest import NAME
from build_engines.verify.__main__ import main as verify
from build_engines.verify.files import check_files
from build_engines.verify.report import Report
from tests.support import standin_tools
from tests.support.killed_builds import kill_at_every_step
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_blip2_opt, save_instructblip_vicuna

pytestmark = pytest.mark.slow

FAMILIES = {"opt": save_blip2_opt, "vicuna": save_instructblip_vicuna}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / request.param
    FAMILIES[request.param](directory)
    return directory


@pytest.fixture(scope="module", autouse=True)
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Install the stand-ins on the path of a build."""
    variables = standin_tools.install(tmp_path_factory.mktemp("bin"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture(scope="module")
def plans(checkpoint: Path, exports: SharedExports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tensorrt") / "engines"
    assert exports.build(str(checkpoint), "--profile", "tensorrt", "--out", str(out)) == 0
    return out


def checked(repository: Path) -> Report:
    report = Report()
    check_files(repository, report)
    return report


def test_onnx_gpu_is_whole(checkpoint: Path, exports: SharedExports) -> None:
    """The gateway's contract, every graph against its configuration, and every file against the manifest."""
    out = exports.built(checkpoint.name, FAMILIES[checkpoint.name], "onnx-gpu") / "repository"
    report = checked(out)
    assert report.failed == [], report.text()
    assert {"configurations", "graph vision_encoder", "graph llm", "manifest"} <= {
        check.name for check in report.checks
    }
    manifest = json.loads((out / NAME).read_text())
    assert (manifest["profile"], manifest["precision"]) == ("onnx-gpu", "fp16")
    for graph, outputs in manifest["parity"]["graphs"].items():
        assert all(near["least_cosine"] > 0.99 for near in outputs.values()), graph


def test_plans_and_an_engine_make_a_whole_repository(plans: Path) -> None:
    report = checked(plans)
    assert report.failed == [], report.text()
    assert {"configurations", "plan qformer", "engine llm", "manifest"} <= {check.name for check in report.checks}
    manifest = json.loads((plans / NAME).read_text())
    found = {name: manifest["versions"][name] for name in ("tensorrt", "tensorrt_llm", "gpu", "compute_capability")}
    assert found == {
        "tensorrt": standin_tools.VERSION, "tensorrt_llm": "1.2.1", "gpu": "NVIDIA Stand-in",
        "compute_capability": "9.0",
    }  # fmt: skip


def test_a_plan_of_another_tensorrt_is_found_in_its_file(plans: Path, tmp_path: Path) -> None:
    copy = tmp_path / "engines"
    shutil.copytree(plans, copy)
    (copy / "qformer" / "1" / "model.plan").write_bytes(standin_tools.plan_bytes("10.15.0.7"))
    told = {check.name: check.told for check in checked(copy).failed}
    assert told["plan qformer"] == "it was built by TensorRT 10.15.0.7, the manifest says 10.14.1.48"
    (copy / "qformer" / "1" / "model.plan").write_bytes(b"a plan it is not, though as long as one")
    assert {check.name: check.told for check in checked(copy).failed}[
        "plan qformer"
    ] == "no TensorRT plan: build it again"


@pytest.mark.parametrize("version", ["10.14.1.48", "10.14.1.49"])
def test_a_plan_is_loaded_where_it_is_served_on_the_tensorrt_that_built_it(
    plans: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setenv("GLIMPSE_STANDIN_TENSORRT", version)
    same = version == standin_tools.VERSION
    assert verify([str(plans), "--serve"]) == (0 if same else 1)
    told = capsys.readouterr().out
    for model in ("vision_encoder", "relevance_allocator", "qformer"):
        assert (f"ok       plan {model} loads\n" in told) == same
    assert ("has TensorRT 10.14.1.49, the manifest says 10.14.1.48" in told) == (not same)
    assert ("not run here: serving" in told) == same  # the stand-in serves nothing


def test_plans_of_two_tensorrts_make_no_repository(
    checkpoint: Path, plans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the image behind a tag had changed after the first plan."""
    out = tmp_path / plans.name
    shutil.copytree(f"{plans}.build", f"{out}.build")
    for step in ("plan-qformer", "repository"):
        shutil.rmtree(f"{out}.build/{step}")
    monkeypatch.setenv("GLIMPSE_STANDIN_TENSORRT", "10.14.1.49")
    assert build.main([str(checkpoint), "--profile", "tensorrt", "--out", str(out)]) == 3
    told = capsys.readouterr().err
    assert "plan vision_encoder was made with tensorrt 10.14.1.48, plan qformer with 10.14.1.49" in told
    assert not out.exists()


def test_a_build_of_plans_killed_at_every_step_ends_in_the_same_repository(
    tools: dict[str, str], exports: SharedExports, tmp_path: Path
) -> None:
    """With every kind of step. One graph is exported by a killed build: test_build.py has more."""
    checkpoint = tmp_path / "vicuna"
    save_instructblip_vicuna(checkpoint)
    untouched, out = tmp_path / "untouched", tmp_path / "engines"
    arguments = [str(checkpoint), "--profile", "tensorrt", "--precision", "fp8", "--calibration-images", "500", "--out"]
    assert exports.build(*arguments, str(untouched)) == 0
    exports.lend(*arguments, str(out), but=("relevance_allocator",))
    steps = kill_at_every_step([*arguments, str(out)], tools, out)
    assert steps == [
        "card",
        "export relevance_allocator",
        "samples",
        "fp8 vision_encoder",
        "fp16 vision_encoder",
        "parity",
        "plan vision_encoder",
        "llm plain",
        "llm convert",
        "llm engine",
        "repository",
    ]
    assert build.main([*arguments, str(out)]) == 0
    manifests = [json.loads((where / NAME).read_text()) for where in (out, untouched)]
    assert manifests[0]["files"] == manifests[1]["files"]
    assert checked(out).failed == []
