"""Complete builds on a CPU: the committed checkpoint, tiny ones of both families, wrong ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from build_engines.convert import __main__ as build
from build_engines.convert.inspection import inspect
from build_engines.convert.options import Refused
from build_engines.convert.run import declare_done, digests
from build_engines.export import export
from build_engines.model.checkpoint import ALLOCATOR, CLIP_MEAN, Checkpoint, save_allocator
from build_engines.repository import GRAPHS, TEXT_ENCODER
from tests.support.fakes import png
from tests.support.killed_builds import kill_at_every_step
from tests.support.shared_exports import SharedExports, graphs_of
from tests.support.tiny_checkpoints import (
    MEAN,
    save_blip2_flan_t5,
    save_blip2_opt,
    save_instructblip_vicuna,
    trained_allocator,
)

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
    assert near["llm"]["logits"]["least_cosine"] > 0.99999
    assert near["llm"]["logits"]["greatest_difference"] > 0  # not of the graph with itself
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


def keep_the_sentencepiece_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").rename(directory / "spiece.model")


def prepare_pixels(**told: object) -> Callable[[Path], object]:
    return lambda directory: (directory / "processor_config.json").write_text(json.dumps({"image_processor": told}))


def end_at(*tokens: int) -> Callable[[Path], object]:
    return lambda directory: (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens}))


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
    "a tokenizer in another format": (keep_the_sentencepiece_tokenizer, "has a spiece.model but no tokenizer.json"),
    "several ends of an answer": (end_at(2, 13), "ends answers at any of the tokens 2"),
    "a centre crop": (
        prepare_pixels(do_center_crop=True, size={"shortest_edge": 224}),
        r"size \{'shortest_edge': 224\}, do_center_crop True",
    ),
    "pixels that are not normalised": (prepare_pixels(do_normalize=False), "do_normalize False"),
    "another rescaling": (prepare_pixels(rescale_factor=1 / 127.5), "rescale_factor"),
    "bilinear resampling": (prepare_pixels(resample=2), "resample 2"),
    "a grey mean": (prepare_pixels(image_mean=[0.5]), r"image_mean \[0.5\]"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_checkpoint_is_refused_with_the_reason(tiny: Path, tmp_path: Path, fault: str) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(tiny, wrong)
    spoil, told = WRONG[fault]
    spoil(wrong)
    with pytest.raises(Refused, match=told):
        inspect(str(wrong))


PREPROCESSORS: dict[str, dict[str, object]] = {
    "BLIP-2": {"do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": MEAN,
               "image_std": MEAN, "resample": 3, "rescale_factor": 0.00392156862745098,
               "size": {"height": 224, "width": 224}},
    "IDEFICS": {"image_mean": MEAN, "image_num_channels": 3, "image_size": 224, "image_std": MEAN},
    "values that are null": {"image_mean": None, "image_std": None, "do_center_crop": None, "crop_size": None,
                             "size": {"height": 224, "width": 224, "longest_edge": None}},
}  # fmt: skip


@pytest.mark.parametrize("told", PREPROCESSORS.values(), ids=PREPROCESSORS)
def test_published_preprocessing_is_followed(tiny: Path, tmp_path: Path, told: dict[str, object]) -> None:
    shutil.copytree(tiny, tmp_path / "tiny")
    (tmp_path / "tiny" / "processor_config.json").unlink()
    (tmp_path / "tiny" / "preprocessor_config.json").write_text(json.dumps(told))
    assert inspect(str(tmp_path / "tiny"))
    assert Checkpoint.load(tmp_path / "tiny", language=False).image_mean == (told["image_mean"] or CLIP_MEAN)


def test_the_machine_is_checked_before_the_weights_are_fetched(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "tiny", ignore=shutil.ignore_patterns("*.safetensors"))
    asked = []

    def allow(parameters: Mapping[str, int]) -> None:
        asked.append(parameters)
        raise Refused("too little memory")

    with pytest.raises(Refused, match="too little memory"):
        inspect(str(tmp_path / "tiny"), allow=allow)
    assert asked == [inspect(str(tiny)).parameters]


@pytest.mark.parametrize(
    ("save", "stored", "only"),
    [
        (save_blip2_opt, "language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"),
        (save_blip2_flan_t5, "language_model.shared.weight", "language_model.decoder.embed_tokens.weight"),
    ],
)
def test_a_tied_tensor_may_have_any_of_its_names(
    tmp_path: Path, save: Callable[[Path], None], stored: str, only: str
) -> None:
    save(tmp_path)
    expected = Checkpoint.load(tmp_path).model.state_dict()
    weights = load_file(tmp_path / "model.safetensors")
    weights[only] = weights.pop(stored)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert inspect(str(tmp_path))
    found = Checkpoint.load(tmp_path).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


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


@pytest.mark.parametrize("spoilt", ["llm", TEXT_ENCODER])
def test_a_language_model_that_computes_something_else_is_no_repository(
    exports: SharedExports, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoilt: str
) -> None:
    save_blip2_flan_t5(tmp_path / "t5")
    arguments = [str(tmp_path / "t5"), "--out", str(tmp_path / "out")]
    exports.lend(*arguments)
    (step,) = (step for step, graph in graphs_of(build.options_of(build.parser().parse_args(arguments)))
               if graph.name == spoilt)  # fmt: skip
    folder = tmp_path / "out.build" / step.folder
    graph = onnx.load(folder / "model.onnx")
    for constant in graph.graph.initializer:
        values = onnx.numpy_helper.to_array(constant)
        if values.ndim == 2 and values.dtype == np.float32:
            constant.CopyFrom(onnx.numpy_helper.from_array(np.flip(values, 0).copy(), constant.name))
    onnx.save(graph, folder / "model.onnx")
    declare_done(step, folder)
    assert build.main(arguments) == 3
    assert "logits of llm in fp32 has a cosine of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
