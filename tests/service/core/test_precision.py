"""Which precision runs on which CPU."""

from __future__ import annotations

import re

import pytest

from service.core.precision import Cpu, NotOffered, Wanted, built_in, choose, graph_name

# Flags as /proc/cpuinfo lists them, shortened to those that name a vector or matrix unit.
SAPPHIRE_RAPIDS = (
    "fpu sse4_2 avx f16c fma avx2 avx512f avx512dq avx512bw avx512vl avx_vnni avx512_bf16 avx512_vnni amx_bf16 "
    "avx512_fp16 amx_tile amx_int8"
)
MILAN = "fpu sse4_2 fma avx f16c bmi1 avx2 smep bmi2 vaes vpclmulqdq"  # AMD EPYC, third generation
GENOA = "fpu sse4_2 fma avx f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_bf16 avx512_vnni"
CASCADE_LAKE = "fpu sse4_2 fma avx f16c avx2 avx512f avx512dq avx512bw avx512vl avx512_vnni"
ALDER_LAKE = "fpu sse4_2 fma avx f16c avx2 avx_vnni"

AGREES = {"bf16": {"questions": 256, "agreement": 0.996}, "int8": {"questions": 256, "agreement": 0.992}}


def cpuinfo(*cores: str) -> str:
    return "\n".join(f"processor\t: {n}\nflags\t\t: {flags}\nbugs\t\t: mds\n" for n, flags in enumerate(cores))


@pytest.mark.parametrize(
    ("flags", "bf16", "int8"),
    [
        (SAPPHIRE_RAPIDS, {"amx_bf16", "avx512_bf16"}, {"amx_int8", "avx512_vnni", "avx_vnni"}),
        (GENOA, {"avx512_bf16"}, {"avx512_vnni"}),
        (CASCADE_LAKE, set(), {"avx512_vnni"}),
        (ALDER_LAKE, set(), {"avx_vnni"}),
        (MILAN, set(), set()),
    ],
)
def test_a_cpu_has_what_its_flags_say(flags: str, bf16: set[str], int8: set[str]) -> None:
    found = Cpu.of(cpuinfo(flags, flags))
    assert (found.bf16, found.int8) == (bf16, int8)


def test_a_flag_counts_if_every_core_has_it() -> None:
    assert Cpu.of(cpuinfo(ALDER_LAKE, MILAN)) == Cpu()


@pytest.mark.parametrize("text", ["", "processor : 0\nFeatures : fp asimd bf16 i8mm\n"])
def test_a_cpu_without_x86_flags_has_nothing(text: str) -> None:
    assert Cpu.of(text) == Cpu()


@pytest.mark.parametrize(
    ("flags", "has_openvino", "built", "measured", "chosen"),
    [
        (SAPPHIRE_RAPIDS, True, {"int8"}, AGREES, "bf16"),
        (SAPPHIRE_RAPIDS, False, {"int8"}, AGREES, "int8"),
        (SAPPHIRE_RAPIDS, True, {"int8"}, {"int8": AGREES["int8"]}, "int8"),
        (SAPPHIRE_RAPIDS, True, set(), {}, "fp32"),
        (SAPPHIRE_RAPIDS, False, set(), AGREES, "fp32"),
        (CASCADE_LAKE, True, {"int8", "int4"}, AGREES, "int8"),
        (MILAN, True, {"int8", "int4"}, AGREES, "fp32"),
        (GENOA, True, set(), {"bf16": {"questions": 256, "agreement": 0.9949}}, "fp32"),
        (GENOA, True, set(), {"bf16": {"questions": 199, "agreement": 1.0}}, "fp32"),
        (CASCADE_LAKE, True, {"int8"}, {"int8": {"questions": 256, "agreement": 0.9899}}, "fp32"),
    ],
)
def test_auto_takes_what_the_cpu_has_and_the_card_allows(
    flags: str, has_openvino: bool, built: set[str], measured: dict[str, dict[str, float]], chosen: str
) -> None:
    assert choose("auto", Cpu.of(cpuinfo(flags)), built, has_openvino, measured).precision == chosen


@pytest.mark.parametrize(
    ("flags", "has_openvino", "built", "measured", "told"),
    [
        (MILAN, True, set(), {}, "none of AMX, AVX512-BF16 and VNNI"),
        (CASCADE_LAKE, True, set(), {}, "no measured agreement for int8: build with --precision int8"),
        (CASCADE_LAKE, True, {"int8"}, {"int8": {"questions": 256, "agreement": 0.978}},
         "97.80% of the answers in int8 equal FP32's, and auto needs 99.0%"),
        (CASCADE_LAKE, True, {"int8"}, {"int8": {"questions": 199, "agreement": 1.0}},
         "int8 was measured with 199 questions, and auto needs 200"),
        (CASCADE_LAKE, True, {"int4"}, AGREES, "the repository has no int8 graphs"),
        (GENOA, False, set(), {"bf16": AGREES["bf16"]},
         "bf16 needs OpenVINO.*; the card has no measured agreement for int8"),
    ],
)  # fmt: skip
def test_auto_says_why_it_takes_fp32(
    flags: str, has_openvino: bool, built: set[str], measured: dict[str, dict[str, float]], told: str
) -> None:
    found = choose("auto", Cpu.of(cpuinfo(flags)), built, has_openvino, measured)
    assert found.precision == "fp32"
    assert re.search(told, found.why)


@pytest.mark.parametrize("wanted", ["fp32", "int8", "int4"])
def test_what_the_operator_sets_runs_on_any_cpu(wanted: Wanted) -> None:
    assert choose(wanted, Cpu(), {"int8", "int4"}, False, {}).precision == wanted


@pytest.mark.parametrize(
    ("wanted", "flags", "has_openvino", "told"),
    [
        ("int8", MILAN, True, "--precision int8"),
        ("int4", MILAN, True, "--precision int4"),
        ("bf16", GENOA, False, "pip install"),
        ("bf16", CASCADE_LAKE, True, "neither AMX nor AVX512-BF16"),
    ],
)
def test_what_cannot_run_here_is_refused_with_what_to_do(
    wanted: Wanted, flags: str, has_openvino: bool, told: str
) -> None:
    with pytest.raises(NotOffered, match=told):
        choose(wanted, Cpu.of(cpuinfo(flags)), set(), has_openvino, AGREES)


@pytest.mark.parametrize(
    ("model", "precision", "name"),
    [
        ("llm", "int4", "model.int4.onnx"),
        ("qformer", "int4", "model.int8.onnx"),
        ("vision_encoder", "int8", "model.int8.onnx"),
        ("vision_encoder", "bf16", "model.onnx"),
        ("relevance_allocator", "int8", "model.onnx"),
    ],
)
def test_a_model_reads_the_graph_of_its_precision(model: str, precision: str, name: str) -> None:
    files = {"llm": ["model.onnx", "model.int4.onnx"]}.get(model, ["model.onnx", "model.int8.onnx"])
    assert graph_name(model, precision, files) == name


@pytest.mark.parametrize(
    ("vision", "llm", "built"),
    [
        ("model.int8.onnx", "model.int8.onnx", {"int8"}),
        ("model.int8.onnx", "model.int4.onnx", {"int4"}),  # whose LLM would compute in FP32 if asked for int8
        ("model.onnx", "model.int8.onnx", set()),
        ("model.onnx", "model.onnx", set()),
    ],
)
def test_a_precision_is_built_if_every_model_has_it(vision: str, llm: str, built: set[str]) -> None:
    files = {"vision_encoder": ["model.onnx", vision], "qformer": ["model.onnx", vision], "llm": ["model.onnx", llm]}
    assert built_in(files) == built
