"""Complete builds on a CPU: the committed checkpoint, tiny ones of both families, wrong ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from build_engines.convert import __main__ as build
from build_engines.convert.inspection import inspect
from build_engines.convert.options import Refused
from build_engines.convert.run import digests
from build_engines.export import export
from build_engines.model.checkpoint import ALLOCATOR, save_allocator
from build_engines.repository import GRAPHS
from tests.support.fakes import png
from tests.support.killed_builds import kill_at_every_step
from tests.support.shared_exports import SharedExports
from tests.support.tiny_checkpoints import save_blip2_opt, save_instructblip_vicuna, trained_allocator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny-opt"
    save_blip2_opt(directory)
    return directory


@pytest.fixture(scope="module")
def built(tiny: Path, exports: SharedExports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "repository"
    assert exports.build(str(tiny), "--out", str(out)) == 0
    return out


def test_a_build_killed_again_and_again_ends_in_the_same_repository(exports: SharedExports, tmp_path: Path) -> None:
    """Its allocator has every part, and its largest graph is exported in a process of its own to the same bytes.

    The other graphs are lent: they take the same way.
    """
    checkpoint, untouched, out = tmp_path / "opt", tmp_path / "untouched", tmp_path / "repository"
    save_blip2_opt(checkpoint)
    save_allocator(trained_allocator(), checkpoint / ALLOCATOR)
    assert exports.build(str(checkpoint), "--out", str(untouched)) == 0
    exports.lend(str(checkpoint), "--out", str(out), but=("relevance_allocator_448",))
    steps = kill_at_every_step([str(checkpoint), "--out", str(out)], {}, out)
    assert steps == ["card", "export relevance_allocator_448", "samples", "parity", "repository"]
    assert build.main([str(checkpoint), "--out", str(out)]) == 0
    again, before = (
        {name: digest for name, digest in digests(where).items() if name != "manifest.json"}
        for where in (out, untouched)
    )
    assert again == before
    assert "relevance_allocator_448/1/model.onnx" in again
    # The manifest also holds parity, which each build measures again: its last digits vary between runs.
    manifests = [json.loads((where / "manifest.json").read_text()) for where in (out, untouched)]
    assert manifests[0]["files"] == manifests[1]["files"]
    assert manifests[0].keys() == manifests[1].keys()


def test_a_second_build_makes_nothing_and_changes_nothing(
    tiny: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(built)
    assert build.main([str(tiny), "--out", str(built)]) == 0
    assert digests(built) == before
    assert build.main([str(tiny), "--out", str(built), "--dry-run"]) == 0
    assert "to do" not in capsys.readouterr().out


def test_the_manifest_says_what_the_repository_is(tiny: Path, built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    there = digests(built)
    del there["manifest.json"]
    assert manifest["files"] == there
    assert manifest["checkpoint"]["files"].keys() == {
        str(path.relative_to(tiny)) for path in tiny.rglob("*") if path.suffix in (".json", ".safetensors")
    }
    assert (manifest["profile"], manifest["precision"]) == ("embedded", "fp32")
    # PyPI's wheel is 2.13.0 for pip, and 2.13.0+cu130 for itself.
    assert manifest["versions"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    near = manifest["parity"]["graphs"]
    assert near.keys() == set(GRAPHS)
    assert manifest["batch"] == {"min": 1, "opt": 4, "max": 8}
    assert manifest["shapes"]["vision_encoder"]["inputs"] == {"image": ["UINT8", 3, 224, 224]}
    assert manifest["shapes"]["qformer"]["outputs"]["visual_tokens"] == ["FP32", 128, 40]
    assert near["vision_encoder"]["features"]["least_cosine"] > 0.99999
    assert near["qformer"]["visual_tokens"]["least_cosine"] > 0.99999
    assert str(tiny.parent) not in json.dumps(manifest)


def test_the_committed_repository_is_what_is_built_of_the_committed_checkpoint(tmp_path: Path) -> None:
    """As `make repository` exports it: a build would also measure parity, which this does not look at."""
    out = tmp_path / "repository"
    export(ROOT / "reference", out)
    committed = ROOT / "model_repository"
    exported = [path.relative_to(committed) for path in committed.rglob("*.onnx")]
    assert len(exported) == 7
    for path in exported:
        ours, theirs = (onnx.load(folder / path) for folder in (out, committed))
        assert [(n.op_type, list(n.input), list(n.output)) for n in ours.graph.node] == [
            (n.op_type, list(n.input), list(n.output)) for n in theirs.graph.node
        ]
        assert list(ours.graph.input) == list(theirs.graph.input)
        assert list(ours.graph.output) == list(theirs.graph.output)
        for mine, its in zip(ours.graph.initializer, theirs.graph.initializer, strict=True):
            assert np.array_equal(onnx.numpy_helper.to_array(mine), onnx.numpy_helper.to_array(its)), mine.name
    for path in committed.rglob("*"):
        if path.is_file() and path.suffix in (".pbtxt", ".py", ".json") and "__pycache__" not in path.parts:
            assert (out / path.relative_to(committed)).read_text() == path.read_text(), path


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_dry_run_tells_every_step_and_command_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    out = tmp_path / "engines"
    arguments = [str(ROOT / "reference"), "--profile", "tensorrt", "--precision", precision, "--out", str(out)]
    assert build.main([*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    for line in ("plan vision_encoder", "--stronglyTyped", "trtllm-build", "convert_checkpoint.py", "repository"):
        assert line in told
    assert ("fp8 vision_encoder" in told) == (precision == "fp8")
    assert list(tmp_path.iterdir()) == []


def drop_a_tensor(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["qformer.layernorm.weight"], weights["query_tokens"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def change_a_shape(directory: Path) -> None:
    edit(directory, lambda config: config["text_config"].update(ffn_dim=84))


def cut_short(directory: Path) -> None:
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[: len(weights) // 2])


def lose_the_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


def edit(directory: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": (
        lambda d: edit(d, lambda c: c.update(architectures=["LlavaForConditionalGeneration"])), "holds LlavaFor",
    ),
    "no architecture": (lambda d: edit(d, lambda c: c.pop("architectures")), "holds no architecture"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "a config that is no JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    "another image size": (
        lambda d: edit(d, lambda c: c["vision_config"].update(image_size=364)), "sees 364 pixels in patches of 14",
    ),
    "another number of queries": (lambda d: edit(d, lambda c: c.update(num_query_tokens=64)), "has 64 queries"),
    "another language model": (
        lambda d: edit(d, lambda c: c.update(text_config={"model_type": "bloom"})),
        "of type bloom: use one with OPT, Llama, FlanT5",
    ),
    "norm after attention": (
        lambda d: edit(d, lambda c: c["text_config"].update(do_layer_norm_before=False)), "OPT-350m",
    ),
    "missing tensors": (drop_a_tensor, r"lacks 2 of \d+ tensors: qformer.layernorm.weight, query_tokens"),
    "shapes that do not fit": (change_a_shape, r"do not fit config.json: .*fc1.*\[80, 40\], not \[84, 40\]"),
    "weights cut short": (cut_short, "cut short"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors"),
    "no tokenizer": (lose_the_tokenizer, "has no tokenizer"),
    "a tokenizer that is none": (lambda d: (d / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be used"),
    "a tokenizer of more ids": (lambda d: edit(d, lambda c: c["text_config"].update(vocab_size=200)), "goes up to id"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_checkpoint_is_refused_with_the_reason(tiny: Path, tmp_path: Path, fault: str) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(tiny, wrong)
    spoil, told = WRONG[fault]
    spoil(wrong)
    with pytest.raises(Refused, match=told):
        inspect(str(wrong))


def test_the_qformers_own_tokenizer_is_wanted_too(tmp_path: Path) -> None:
    save_instructblip_vicuna(tmp_path / "tiny")
    assert inspect(str(tmp_path / "tiny")).reads_question
    shutil.rmtree(tmp_path / "tiny" / "qformer_tokenizer")
    with pytest.raises(Refused, match="qformer_tokenizer has no tokenizer"):
        inspect(str(tmp_path / "tiny"))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": WRONG["another architecture"],
    "missing tensors": (drop_a_tensor, "lacks 2 of"),
    "shapes that do not fit": (change_a_shape, "tensors do not fit config.json"),
    "no tokenizer": (lose_the_tokenizer, "has no tokenizer"),
    "no disk space": (lambda _: None, "GB of disk at"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_the_command_refuses_before_it_begins(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reason: str
) -> None:
    wrong, out = tmp_path / "wrong", tmp_path / "out"
    shutil.copytree(tiny, wrong)
    spoil, told = REFUSED[reason]
    spoil(wrong)
    too_much = ["--profile", "tensorrt", "--precision", "fp8", "--calibration-images", str(10**12)]
    assert build.main([str(wrong), "--out", str(out), *(too_much if reason == "no disk space" else [])]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["wrong"]


def test_what_is_neither_directory_nor_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert "neither a directory nor a hub name" in capsys.readouterr().err


def test_a_folder_that_is_no_repository_is_not_replaced(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert build.main([str(tiny), "--out", str(tmp_path)]) == 2
    assert "is not empty: choose another folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_a_damaged_picture_is_left_out_and_listed_and_too_few_are_told(
    tiny: Path, exports: SharedExports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(15):
        (pictures / f"{number:02}.png").write_bytes(png())
    (pictures / "00.jpg").write_bytes(b"no picture")
    arguments = [str(tiny), "--out", str(tmp_path / "out"), "--images", str(pictures), "--until", "samples"]
    assert exports.build(*arguments) == 3
    assert "has 15 images that are asked about, fewer than 16" in capsys.readouterr().err
    (pictures / "15.png").write_bytes(png())
    assert build.main(arguments) == 0
    assert "samples: 1 files or lines are left out: 00.jpg: " in capsys.readouterr().err
    assert (tmp_path / "out.build" / "samples" / "skipped.txt").read_text().startswith("00.jpg: ")


def test_where_the_gpu_is_missing_the_rest_is_made_and_the_next_step_told(
    tiny: Path,
    exports: SharedExports,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "engines"
    assert exports.build(str(tiny), "--profile", "tensorrt", "--out", str(out)) == 3
    told = capsys.readouterr().err
    assert "plan vision_encoder needs docker: run the same command again on a machine with an NVIDIA GPU" in told
    assert (tmp_path / "engines.build" / "fp16-qformer" / "model.onnx").exists()
    assert not out.exists()
