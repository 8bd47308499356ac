"""What a build plans: steps and their keys, refused options, external command lines."""

from __future__ import annotations

import argparse
import ast
import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from polygraphy.tools.args import TrtConfigArgs, TrtLoadNetworkArgs
from polygraphy.tools.convert.convert import Convert

from build_engines.convert import commands, estimate, plans, trtllm
from build_engines.convert.__main__ import options_of, parser
from build_engines.convert.options import LlmEngine, Options, Refused, checked
from build_engines.convert.plan import Step, keyed, plan
from build_engines.convert.source import Source
from service.core.card import ModelCard

ROOT = {"checkpoint": {"model.safetensors": "aa"}, "versions": {"torch": "2.13.0"}, "code": "c"}
PROFILES = [("embedded", "fp32"), ("onnx-gpu", "fp32"), ("onnx-gpu", "fp16"), ("tensorrt", "fp16"), ("tensorrt", "fp8")]


FAMILY = {"opt": "Blip2ForConditionalGeneration", "idefics": "IdeficsForVisionText2Text"}  # the others: InstructBLIP


def source(language: str = "opt") -> Source:
    """The sizes of BLIP-2 OPT-2.7B or InstructBLIP Vicuna-7B."""
    opt = language == "opt"
    return Source(
        directory=Path("/checkpoints/blip"),
        name="blip",
        family=FAMILY.get(language, "InstructBlipForConditionalGeneration"),
        language=language,
        vision_width=1408,
        hidden_size=2560 if opt else 4096,
        vocab_size=50304 if opt else 32001,
        max_positions=2048,
        parameters={"vision_encoder": 985_953_792, "qformer": 107_133_696, "llm": 2_651_596_800},
    )


def options(profile: str = "tensorrt", precision: str = "", **others: object) -> Options:
    return checked(Options("blip", Path("/engines/blip"), profile, precision, **others))


def keys(steps: list[Step]) -> dict[str, str]:
    return {step.name: step.key for step in steps}


@pytest.mark.parametrize(("profile", "precision"), PROFILES)
@pytest.mark.parametrize("language", ["opt", "llama"])
def test_a_step_reads_only_what_was_made_before_it(profile: str, precision: str, language: str) -> None:
    steps = plan(options(profile, precision), source(language), ROOT)
    made: set[str] = set()
    for step in steps:
        assert set(step.needs) <= made, step.name
        made.add(step.name)
    assert steps[-1].name == "repository"
    assert len(made) == len(steps) == len({step.folder for step in steps})
    assert (made & {"fp8 vision_encoder", "fp16 vision_encoder"} == set()) == (precision == "fp32")
    assert ("fp8 vision_encoder" in made) == (precision == "fp8")
    assert ("export llm" in made) == (profile != "tensorrt") == ("llm engine" not in made)
    assert (trtllm.PLAIN in made) == (profile == "tensorrt" and language == "llama")


@pytest.mark.parametrize("profile", ["embedded", "onnx-gpu"])
def test_a_flan_t5_has_its_encoder_beside_the_decoder(profile: str) -> None:
    steps = plan(options(profile, "fp32"), source("t5"), ROOT)
    last = steps[-1]
    assert last.settings["served"]["llm_encoder"] == "export llm_encoder"
    assert "export llm_encoder" in last.needs
    assert "prefix_cache_bytes" not in last.settings["configurations"]["llm"]
    assert "prefix_cache_bytes" in plan(options(profile, "fp32"), source(), ROOT)[-1].settings["configurations"]["llm"]


@pytest.mark.parametrize(
    ("profile", "precision", "why"),
    [
        ("tensorrt", "fp16", "no encoder-decoder engines"),
        ("onnx-gpu", "fp16", "exceed FP16's range"),
        ("embedded", "int8", "not measured in int8"),
        ("embedded", "bf16", "not measured in bf16"),
    ],
)
def test_a_flan_t5_in_another_form_is_refused_with_what_works(profile: str, precision: str, why: str) -> None:
    with pytest.raises(Refused, match=f"{why}.* --profile embedded or onnx-gpu with --precision fp32"):
        plan(options(profile, precision), source("t5"), ROOT)


@pytest.mark.parametrize("profile", ["embedded", "onnx-gpu"])
def test_an_idefics_has_the_reader_of_its_images_beside_the_decoder_and_shares_prefixes(profile: str) -> None:
    last = plan(options(profile, "fp32"), source("idefics"), ROOT)[-1]
    assert last.settings["served"]["llm_encoder"] == "export llm_encoder"
    assert "export llm_encoder" in last.needs
    assert "prefix_cache_bytes" in last.settings["configurations"]["llm"]


@pytest.mark.parametrize(
    ("profile", "precision", "why"),
    [
        ("tensorrt", "fp16", "no documented engine with IDEFICS's gated cross-attention"),
        ("tensorrt", "fp8", "no documented engine"),
        ("onnx-gpu", "fp16", "not measured in fp16"),
        ("embedded", "int8", "not measured in int8"),
        ("embedded", "bf16", "not measured in bf16"),
    ],
)
def test_an_idefics_in_another_form_is_refused_with_what_works(profile: str, precision: str, why: str) -> None:
    with pytest.raises(Refused, match=f"{why}.* --profile embedded or onnx-gpu with --precision fp32"):
        plan(options(profile, precision), source("idefics"), ROOT)


def test_a_key_changes_with_what_a_step_depends_on_and_with_nothing_else() -> None:
    before = keys(plan(options(precision="fp8"), source(), ROOT))
    assert keys(plan(options(precision="fp8"), source(), ROOT)) == before
    assert keys(plan(replace(options(precision="fp8"), out=Path("/elsewhere")), source(), ROOT)) == before

    def changed(**others: object) -> set[str]:
        return {
            name
            for name, key in keys(plan(options(precision="fp8", **others), source(), ROOT)).items()
            if before[name] != key
        }

    assert changed(llm=LlmEngine(max_batch=32)) == {"llm engine", "repository"}
    assert changed(llm=LlmEngine(kv_memory_fraction=0.5)) == {"repository"}
    assert "card" in changed(llm=LlmEngine(max_visual_tokens=256))
    assert changed(vision_image="tritonserver:26.08-py3") == {
        "plan vision_encoder", "plan relevance_allocator", "plan qformer", "repository",
    }  # fmt: skip
    assert changed(calibration_images=600) == {
        "samples", "fp8 vision_encoder", "fp16 vision_encoder", "parity", "plan vision_encoder", "repository",
    }  # fmt: skip
    other = keys(plan(options(precision="fp8"), source(), {**ROOT, "versions": {"torch": "2.14.0"}}))
    assert not set(other.values()) & set(before.values())
    cards = {keys(plan(options(*each), source(), ROOT))["card"] for each in PROFILES}
    assert len(cards) == len(PROFILES)  # a card says what its profile serves
    assert keys(plan(options(*PROFILES[0]), replace(source(), name="other"), ROOT))["card"] not in cards


def test_a_key_changes_with_the_pictures_and_the_questions_and_not_with_their_folder(tmp_path: Path) -> None:
    def keys_of(folder: Path, *others: str) -> dict[str, str]:
        words = ["blip", "--out", "/out", "--precision", "int8", "--images", str(folder), *others]
        return keys(plan(options_of(parser().parse_args(words)), source(), ROOT))

    pictures, moved = tmp_path / "pictures", tmp_path / "moved"
    (pictures / "below").mkdir(parents=True)
    (pictures / "below" / "a.png").write_bytes(b"one")
    (pictures / "questions.txt").write_text("what is it?\n")
    before = keys_of(pictures)
    shutil.copytree(pictures, moved)
    assert keys_of(moved) == before
    for path, text in (("below/a.png", "two"), ("b.jpg", "one"), ("questions.txt", "where is it?\n")):
        shutil.copytree(pictures, moved, dirs_exist_ok=True)
        (moved / path).write_text(text)
        after = keys_of(moved)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {"samples", "parity", "agreement", "repository"}, path
        (moved / path).unlink()
    with pytest.raises(Refused, match="nowhere is not a folder"):
        keys_of(tmp_path / "nowhere")


def test_a_step_hands_its_change_on_to_all_that_follow() -> None:
    first, second, third = (Step("a", "x", ""), Step("b", "x", "", needs=("a",)), Step("c", "x", ""))
    before = keys(keyed([first, second, third], {}))
    after = keys(keyed([replace(first, settings={"size": 1}), second, third], {}))
    assert [name for name in before if before[name] != after[name]] == ["a", "b"]


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"profile": "openvino"}, "choose one of embedded, onnx-gpu, tensorrt"),
        ({"profile": "embedded", "precision": "fp16"}, "four times slower"),
        ({"profile": "onnx-gpu", "precision": "fp8"}, "FP8 needs --profile tensorrt"),
        ({"profile": "tensorrt", "precision": "fp32"}, "fp16 or fp8, not fp32"),
        ({"opt_batch": 9}, "between 1 and --max-batch 8"),
        ({"precision": "fp8", "calibration_images": 499}, "at least 500"),
        ({"llm": LlmEngine(kv_memory_fraction=1.0)}, "between 0 and 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(asked: Mapping[str, object], told: str) -> None:
    with pytest.raises(Refused, match=told):
        options(**asked)


def test_batches_that_a_closer_view_does_not_fit_in_are_refused() -> None:
    small = options(vision_batch=3, opt_batch=3)
    assert plan(small, source(), ROOT)
    with pytest.raises(Refused, match="--max-batch 3: the closer view is a batch of 4 crops"):
        plan(small, replace(source(), closer_view=True), ROOT)


def test_what_a_build_needs_is_compared_with_what_the_machine_has() -> None:
    wanted = estimate.needs(options("embedded"), dict(source().parameters))
    assert 15e9 < wanted.disk < 16e9  # 3.74 G weights of four bytes
    assert 35e9 < wanted.memory < 40e9
    plenty = 10**12
    inline = estimate.needs(options("embedded"), {"vision_encoder": 303_178_752, "qformer": 1, "llm": 1})
    assert inline.memory > 8.7e9  # measured for ViT-L's export, with 1.3 GB of other weights: 9.7 GB
    with pytest.raises(Refused, match=r"needs 15\.\d GB of disk at /engines/blip\.build; 1\.0 GB are free"):
        estimate.check(options("embedded"), source().parameters, free_disk=10**9, free_memory=plenty)
    with pytest.raises(Refused, match=r"of memory; 8\.0 GB are free"):
        estimate.check(options("embedded"), source().parameters, free_disk=plenty, free_memory=8 * 10**9)
    assert estimate.check(options("embedded"), source().parameters, free_disk=plenty, free_memory=plenty) == wanted


def test_a_build_in_bf16_needs_its_graphs_twice() -> None:
    fp32, bf16 = (estimate.needs(options("embedded", name), source().parameters).disk for name in ("fp32", "bf16"))
    assert bf16 - fp32 == 4 * sum(source().parameters.values())


def test_disk_that_a_build_gets_back_is_counted_once_and_only_if_the_repository_does_not_hold_it(
    tmp_path: Path,
) -> None:
    work, out = tmp_path / "out.build", tmp_path / "out"
    for name, size in {"export-llm": 1000, "repository": 10, "samples": 300, "of-another-build": 70}.items():
        (work / name).mkdir(parents=True)
        (work / name / "file").write_bytes(b"x" * size)
    (work / "repository" / "llm").hardlink_to(work / "export-llm" / "file")
    again = {"export-llm": False, "repository": False, "samples": False}
    assert estimate.reusable(tmp_path / "nothing") == 0
    assert estimate.reusable(work) == 1380
    assert estimate.reusable(work, again) == 1310  # another build's output is not removed
    out.mkdir()
    (out / "llm").hardlink_to(work / "export-llm" / "file")
    assert estimate.reusable(work, again) == 310
    assert estimate.reusable(work, again | {"export-llm": True}) == 1310  # it stays, so nothing new is written


def test_available_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    proc = tmp_path / "meminfo"
    proc.write_text("MemTotal: 100 kB\nMemAvailable:   2000000 kB\n")
    assert estimate.available_memory(proc, tmp_path) == 2_048_000_000
    for name, text in {"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1\n"}.items():
        (tmp_path / name).write_text(text)
    assert estimate.available_memory(proc, tmp_path) == 2_048_000_000
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "memory.current").write_text("400000000\n")
    (tmp_path / "memory.stat").write_text("anon 3\ninactive_file 100000000\n")
    assert estimate.available_memory(proc, tmp_path) == 700_000_000


INPUTS = {"image": (3, 224, 224), "budget": (4,)}


def test_polygraphy_reads_the_plans_command_as_it_is_meant() -> None:
    """Checked by polygraphy's own parser from the wheel."""
    words = plans.polygraphy("m.onnx", "m.plan", INPUTS, (1, 4, 8))
    assert words[:2] == ("polygraphy", "convert")
    tool, parser = Convert(), argparse.ArgumentParser()
    tool.setup_parser(parser.add_subparsers())
    arguments = parser.parse_args(words[1:])
    for group in tool.arg_groups.values():
        group.parse(arguments)
    assert (arguments.convert_to, arguments.output) == ("trt", "m.plan")
    assert arguments.load_timing_cache == arguments.save_timing_cache == commands.CACHE
    config = tool.arg_groups[TrtConfigArgs]
    assert config.profile_dicts == [
        {"image": ([1, 3, 224, 224], [4, 3, 224, 224], [8, 3, 224, 224]), "budget": ([1, 4], [4, 4], [8, 4])}
    ]
    assert tool.arg_groups[TrtLoadNetworkArgs].strongly_typed
    assert not any((config.fp16, config.fp8, config.int8, config.tf32))


def test_modelopt_reads_the_quantisers_command_as_it_is_meant() -> None:
    """Checked by modelopt's own parser from the wheel."""
    words = commands.fp8("/env/bin/python", Path("m.onnx"), Path("c.npz"), Path("o.onnx"), ["node_a", "node_b"])
    assert words[:3] == ["/env/bin/python", "-m", "modelopt.onnx.quantization"]
    arguments = modelopt_parser().parse_args(words[3:])
    assert (arguments.quantize_mode, arguments.calibration_method) == ("fp8", "max")
    assert (arguments.onnx_path, arguments.output_path) == ("m.onnx", "o.onnx")
    assert arguments.calibration_data_path == "c.npz"
    assert arguments.calibration_eps == ["cpu"]
    assert arguments.high_precision_dtype == "fp32"
    assert arguments.nodes_to_exclude == ["node_a", "node_b"]
    assert arguments.opset >= 19  # of FP8 in ONNX


def modelopt_parser() -> argparse.ArgumentParser:
    """Compile `get_parser` from the installed wheel's source: importing it would load CUDA libraries."""
    (path,) = (
        file.locate()
        for file in metadata.files("nvidia-modelopt") or []
        if str(file) == "modelopt/onnx/quantization/__main__.py"
    )
    tree = ast.parse(Path(path).read_text())
    wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in ("get_parser",)]
    presets = {"default": {"schemes_per_region": 1, "warmup_runs": 1, "timing_runs": 1}}

    class Explicit(argparse.Action):
        def __init__(self, *words: object, explicit_attr: str = "", **others: object) -> None:
            super().__init__(*words, **others)

    names: dict[str, object] = {
        "argparse": argparse,
        "MODE_PRESETS": presets,
        "StoreWithExplicitFlag": Explicit,
        "parse_input_shapes_profile": str,
    }
    exec(compile(ast.Module(wanted, []), str(path), "exec"), names)
    return names["get_parser"]()


# The flags of TensorRT's trtexec (10.x, kept in 11) and of TensorRT-LLM 1.2.1's scripts, from their sources.
TRTEXEC = {"onnx", "saveEngine", "stronglyTyped", "minShapes", "optShapes", "maxShapes", "timingCacheFile",
           "profilingVerbosity", "skipInference", "noTF32"}  # fmt: skip


def convert_opt() -> argparse.ArgumentParser:
    """examples/models/contrib/opt/convert_checkpoint.py"""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--model_type", choices=["opt", "blip2"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    for name in ("--tp_size", "--pp_size", "--workers"):
        parser.add_argument(name, type=int, default=1)
    for name in ("--model_dir", "--output_dir"):
        parser.add_argument(name)
    return parser


def convert_llama() -> argparse.ArgumentParser:
    """examples/models/core/llama/convert_checkpoint.py"""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--dtype", choices=["auto", "float16", "bfloat16", "float32"])
    for name in ("--tp_size", "--pp_size", "--workers"):
        parser.add_argument(name, type=int, default=1)
    for name in ("--model_dir", "--output_dir"):
        parser.add_argument(name)
    return parser


def quantize() -> argparse.ArgumentParser:
    """examples/quantization/quantize.py"""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--dtype", choices=["auto", "float16", "bfloat16", "float32"])
    parser.add_argument(
        "--qformat", choices=["nvfp4", "fp8", "int8_sq", "int4_awq", "w4a8_awq", "int8_wo", "int4_wo", "full_prec"]
    )
    parser.add_argument("--kv_cache_dtype", choices=["int8", "fp8"])
    for name in ("--tp_size", "--calib_size"):
        parser.add_argument(name, type=int)
    for name in ("--model_dir", "--output_dir"):
        parser.add_argument(name)
    return parser


def trtllm_build() -> argparse.ArgumentParser:
    """tensorrt_llm/commands/build.py, and its plugins' switches"""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for name in ("--checkpoint_dir", "--output_dir"):
        parser.add_argument(name)
    for name in ("--max_batch_size", "--max_input_len", "--max_seq_len", "--max_beam_width"):
        parser.add_argument(name, type=int)
    parser.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int)
    parser.add_argument("--kv_cache_type", choices=["continuous", "paged", "disabled"])
    parser.add_argument("--gemm_plugin", choices=["auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4"])
    for name in ("--use_paged_context_fmha", "--use_fp8_context_fmha"):
        parser.add_argument(name, choices=["enable", "disable"])
    return parser


def test_trtexec_gets_flags_that_it_has_and_a_profile_of_every_input() -> None:
    words = plans.trtexec("m.onnx", "m.plan", INPUTS, (1, 4, 8))
    flags = dict(word.removeprefix("--").partition("=")[::2] for word in words[1:])
    assert flags.keys() == TRTEXEC
    assert flags["minShapes"] == "image:1x3x224x224,budget:1x4"
    assert flags["maxShapes"] == "image:8x3x224x224,budget:8x4"
    assert not {"fp16", "fp8", "int8", "best"} & flags.keys()


def test_the_tensorrt_of_a_plan_and_of_trtexec_are_told_alike() -> None:
    header = bytes.fromhex("66747274 00000000 00000000 00000000 00000000 00000000 0a0e0130")
    said = "&&&& RUNNING TensorRT.trtexec [TensorRT v101401] [b48] # trtexec --loadEngine=a\n[I] === Model Options ==="
    assert plans.version_of_plan(header) == plans.version_of_runtime(said) == "10.14.1.48"
    assert plans.version_of_runtime("&&&& RUNNING TensorRT.trtexec [TensorRT v110300] [b9] # x") == "11.3.0.9"
    for wrong in (header[:27], b"ptrt" + header[4:], header[:4] + b"\1" + header[5:]):
        with pytest.raises(ValueError, match="no TensorRT plan"):
            plans.version_of_plan(wrong)
    with pytest.raises(ValueError, match="did not print"):
        plans.version_of_runtime("Killed")


def test_opt_becomes_an_engine_of_fp16() -> None:
    convert, build = (step.command for step in trtllm.commands(options(precision="fp8"), source()))
    read = convert_opt().parse_args(convert[2:])
    assert convert[:2] == ("python3", "/app/examples/models/contrib/opt/convert_checkpoint.py")
    assert (read.model_type, read.dtype, read.pp_size, read.model_dir) == ("blip2", "float16", 1, commands.CHECKPOINT)
    engine = trtllm_build().parse_args(build[1:])
    assert build[0] == "trtllm-build"
    assert (engine.gemm_plugin, engine.kv_cache_type, engine.use_paged_context_fmha) == ("float16", "paged", "enable")
    assert (engine.max_seq_len, engine.max_input_len, engine.max_batch_size) == (1024, 1023, 64)
    assert engine.max_prompt_embedding_table_size == 64 * 512
    assert engine.use_fp8_context_fmha is None


@pytest.mark.parametrize(("precision", "gemm"), [("fp16", "float16"), ("fp8", "fp8")])
def test_vicuna_becomes_an_engine_of_either_precision(precision: str, gemm: str) -> None:
    asked = options(precision=precision, llm=LlmEngine(tensor_parallel=2))
    convert, build = (step.command for step in trtllm.commands(asked, source("llama")))
    parser = quantize() if precision == "fp8" else convert_llama()
    read = parser.parse_args(convert[2:])
    assert convert[1].endswith("quantize.py" if precision == "fp8" else "models/core/llama/convert_checkpoint.py")
    assert (read.tp_size, read.dtype, read.model_dir) == (2, "float16", "{work}/llm-plain")
    assert trtllm_build().parse_args(build[1:]).gemm_plugin == gemm


def test_a_request_is_never_longer_than_the_models_positions() -> None:
    assert trtllm.longest(options(llm=LlmEngine(max_tokens=4096)), source()) == 2048


@pytest.mark.parametrize(
    ("part", "name", "other"),
    [("pretrained_config", "vocab_size", 50432), ("build_config", "max_prompt_embedding_table_size", 512)],
)
def test_an_engine_of_other_sizes_is_refused(part: str, name: str, other: int) -> None:
    """Such as a padded vocabulary, or room for the visual tokens of one request only."""
    engine = {
        "pretrained_config": {"vocab_size": 50304, "hidden_size": 2560},
        "build_config": {"max_seq_len": 1024, "max_batch_size": 64, "max_prompt_embedding_table_size": 64 * 512},
    }
    trtllm.check_engine(engine, options(), source())
    engine[part][name] = other
    with pytest.raises(trtllm.WrongEngine, match=str(other)):
        trtllm.check_engine(engine, options(), source())


def test_an_engine_without_room_for_one_images_visual_tokens_is_refused(card: ModelCard) -> None:
    most = card.visual_tokens[1]
    trtllm.check_visual_tokens(replace(card, most_visual_tokens=most))
    trtllm.check_visual_tokens(card)
    with pytest.raises(Refused, match=f"--llm-max-visual-tokens {most - 1}: .* Use at least {most}"):
        trtllm.check_visual_tokens(replace(card, most_visual_tokens=most - 1))


def test_a_command_names_the_same_folders_here_and_in_a_container() -> None:
    command = plans.command(options(), INPUTS, "fp16-qformer")
    out = Path("/engines/blip.build/plan-qformer.partial")
    there = commands.resolved(
        command, options(), Path("/checkpoints/blip"), out, "nvcr.io/nvidia/tritonserver:26.07-py3"
    )
    assert there[:2] == ["docker", "run"]
    assert "/engines/blip.build:/work" in there
    assert "/checkpoints/blip:/checkpoint:ro" in there
    tail = there[there.index("nvcr.io/nvidia/tritonserver:26.07-py3") + 1 :]
    assert tail[1:3] == ["--onnx=/work/fp16-qformer/model.onnx", "--saveEngine=/work/plan-qformer.partial/model.plan"]
    assert "--timingCacheFile=/work/timing/tritonserver_26.07-py3.cache" in tail  # one a version of TensorRT
    local = replace(options(), run_in="here")
    here = commands.resolved(
        plans.command(local, INPUTS, "fp16-qformer"), local, Path("/checkpoints/blip"), out, "image"
    )
    assert here[:3] == ["polygraphy", "convert", "/engines/blip.build/fp16-qformer/model.onnx"]
    assert not any("{" in word for word in [*there, *here])


def test_a_plan_that_is_built_here_depends_on_the_tensorrt_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def asked(version: str, where: str) -> Options:
        monkeypatch.syspath_prepend(package("tensorrt", version))
        return options_of(parser().parse_args(["blip", "--out", "/out", "--profile", "tensorrt", "--run-in", where]))

    def package(name: str, version: str) -> Path:
        told = tmp_path / version / f"{name}-{version}.dist-info"
        told.mkdir(parents=True, exist_ok=True)
        (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        return told.parent

    for where in ("here", "docker"):
        old, new = (asked(version, where) for version in ("10.14.1.48", "10.15.0.7"))
        before, after = (keys(plan(each, source(), ROOT)) for each in (old, new))
        changed = {name for name in before if before[name] != after[name]}
        assert changed == (
            {"plan vision_encoder", "plan relevance_allocator", "plan qformer", "llm convert", "llm engine",
             "repository"} if where == "here" else set()
        )  # fmt: skip
        line = plans.command(new, INPUTS, "fp16-qformer")
        (cache,) = {word.split("=")[-1] for word in commands.resolved(line, new, Path("/c"), Path("/o"), "a/b:26.07")
                    if word.endswith(".cache")}  # fmt: skip
        assert ("here_10.15.0.7" in cache) == (where == "here")


def test_a_container_reaches_what_a_checkpoint_of_the_hubs_cache_links_to() -> None:
    kept = Path("/cache/models--Salesforce--blip2-opt-2.7b")
    convert = next(trtllm.commands(options(), source())).command
    line = commands.resolved(convert, options(), kept / "snapshots" / "59a1", Path("/engines/blip.build/a"), "image")
    assert f"{kept}:/checkpoint:ro" in line
    assert line[line.index("--model_dir") + 1] == "/checkpoint/snapshots/59a1"


@pytest.mark.parametrize(("profile", "precision"), [*PROFILES, ("embedded", "int8")])
def test_weights_for_clips_are_built_for_cpus_and_stay_in_fp32(profile: str, precision: str) -> None:
    given = replace(source(), clip=True, clip_weights=True)
    steps = {step.name: step for step in plan(options(profile, precision), given, ROOT)}
    is_served = profile == "embedded"
    assert ("export llm_clips" in steps) == is_served
    repository = steps["repository"]
    assert repository.settings["served"].get("llm_clips") == ("export llm_clips" if is_served else None)
    assert ("export llm_clips" in repository.needs) == is_served
    assert not any(name.endswith("llm_clips") and not name.startswith("export") for name in steps)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_weights_for_clips_are_compared_with_pytorch_where_all_is(precision: str) -> None:
    given = replace(source(), clip=True, clip_weights=True)
    steps = {step.name: step for step in plan(options("embedded", precision), given, ROOT)}
    assert ("llm_clips" in steps["parity"].settings["graphs"]) == (precision == "fp32")


def test_a_build_without_weights_for_clips_needs_less() -> None:
    own = source().parameters
    clips = dict(own) | {"attend_clip": 40_000_000, "llm_clips": own["llm"]}
    for profile, more in (("embedded", 4 * (own["llm"] + 40_000_000)), ("onnx-gpu", 0)):
        asked = options(profile, "fp32")
        assert estimate.needs(asked, clips).disk - estimate.needs(asked, dict(own)).disk == more
