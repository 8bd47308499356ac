"""Choose the precision in which the models compute on a CPU.

| precision | vision encoder, Q-Former | LLM | runs on |
|---|---|---|---|
| fp32 | as exported | as exported | any CPU |
| bf16 | FP32's graphs, computed in BF16 | the same | OpenVINO, on a CPU with AMX or AVX512-BF16 |
| int8 | products of integers | products of integers | any CPU, a build with --precision int8 |
| int4 | as int8 | 4-bit weights | any CPU, a build with --precision int4 |

The relevance allocator always computes in FP32: it decides by comparing. So do the LLM's weights for clips and several
images, if it has others for them: nobody has measured their answers in another precision.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, Self, get_args

Precision = Literal["fp32", "bf16", "int8", "int4"]
Wanted = Literal["auto", "fp32", "bf16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
VARIABLE = "GLIMPSE_PRECISION"  # the gateway's setting; in Triton's environment it holds what was chosen
REDUCED = ("vision_encoder", "qformer", "llm")  # the models that compute in another precision than FP32
PLAIN = "model.onnx"  # the file of a graph in FP32
# Least share of answers equal to FP32's, and least number of measured answers, for `auto` to choose a precision.
LEAST_AGREEMENT: Mapping[str, float] = {"bf16": 0.995, "int8": 0.99}
LEAST_QUESTIONS = 200


@dataclass(frozen=True, slots=True)
class Cpu:
    """What a CPU multiplies faster than FP32."""

    bf16: frozenset[str] = frozenset()  # of BF16_FLAGS
    int8: frozenset[str] = frozenset()  # of INT8_FLAGS

    @classmethod
    def of(cls, cpuinfo: str) -> Self:
        """Read the text of /proc/cpuinfo. A flag counts if every core has it."""
        lines = [line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.startswith("flags")]
        flags = frozenset.intersection(*map(frozenset, lines)) if lines else frozenset[str]()
        return cls(bf16=flags & BF16_FLAGS, int8=flags & INT8_FLAGS)


BF16_FLAGS = frozenset({"amx_bf16", "avx512_bf16"})
INT8_FLAGS = frozenset({"amx_int8", "avx512_vnni", "avx_vnni"})


@dataclass(frozen=True, slots=True)
class Choice:
    """A precision, and the reason in words for the log."""

    precision: str  # one of PRECISIONS, or what a GPU's repository was built in
    why: str


class NotOffered(ValueError):
    """The precision that the operator wants cannot run here. The message says what to do."""


def choose(
    wanted: Wanted, cpu: Cpu, built: Collection[str], has_openvino: bool, measured: Mapping[str, Mapping[str, float]]
) -> Choice:
    """Choose what runs.

    `built` are the integer precisions that the repository has graphs of: `built_in`. `measured` is the card's
    `precisions`. Raises NotOffered if `wanted` is neither auto nor possible.
    """
    if wanted != "auto":
        if reason := _impossible(wanted, cpu, built, has_openvino):
            raise NotOffered(reason)
        return Choice(wanted, "as set")
    reasons = []
    faster: tuple[tuple[Precision, frozenset[str]], ...] = (("bf16", cpu.bf16), ("int8", cpu.int8))
    for precision, flags in faster:
        if flags:
            reason = _not_allowed(measured, precision) or _impossible(precision, cpu, built, has_openvino)
            if not reason:
                return Choice(precision, f"the CPU has {_listed(flags)}, and the card allows it")
            reasons.append(reason)
    return Choice("fp32", "; ".join(reasons) or "the CPU has none of AMX, AVX512-BF16 and VNNI")


def _not_allowed(measured: Mapping[str, Mapping[str, float]], precision: str) -> str:
    """Why the card's measured agreement does not allow a precision, and what to do; empty if it does."""
    found, least = measured.get(precision, {}), LEAST_AGREEMENT[precision]
    questions, agreement = found.get("questions", 0), found.get("agreement", 0.0)
    if not questions:
        return f"the card has no measured agreement for {precision}: build with --precision {precision}"
    if questions < LEAST_QUESTIONS:
        return (
            f"{precision} was measured with {questions} questions, and auto needs {LEAST_QUESTIONS}: build with "
            f"--agreement-questions {LEAST_QUESTIONS}"
        )
    if agreement < least:
        return f"{agreement:.2%} of the answers in {precision} equal FP32's, and auto needs {least:.1%}"
    return ""


def _impossible(wanted: Precision, cpu: Cpu, built: Collection[str], has_openvino: bool) -> str:
    """Why not, and what to do; empty if it is possible."""
    if wanted in ("int8", "int4") and wanted not in built:
        return f"the repository has no {wanted} graphs: build it with `glimpse build ... --precision {wanted}`"
    if wanted == "bf16" and not has_openvino:
        return (
            "bf16 needs OpenVINO: run `.venv/bin/pip install -c constraints.txt -e '.[openvino]'` in Glimpse's folder"
        )
    if wanted == "bf16" and not cpu.bf16:
        return "this CPU has neither AMX nor AVX512-BF16: choose auto, fp32 or int8"
    return ""


def _listed(flags: frozenset[str]) -> str:
    return " and ".join(sorted(flags))


def built_in(files: Mapping[str, Collection[str]]) -> set[Precision]:
    """The integer precisions that a repository has graphs of, by the files of each model of REDUCED.

    The LLM's own graph decides, because the other models' graphs are the same in int8 and int4.
    """
    integers: tuple[Precision, ...] = ("int8", "int4")
    return {
        each
        for each in integers
        if f"model.{each}.onnx" in files["llm"]
        and all(graph_name(model, each, files[model]) != PLAIN for model in REDUCED)
    }


def graph_name(model: str, precision: str, files: Collection[str]) -> str:
    """The file of a model's graph in a precision: FP32's if there is no other, or if the model is not reduced."""
    own = f"model.{precision}.onnx"
    fallback = "model.int8.onnx" if precision == "int4" else own
    if model in REDUCED:
        for name in (own, fallback):
            if name in files:
                return name
    return PLAIN
