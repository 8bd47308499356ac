"""Choose the precision in which the models compute on a CPU.

| precision | vision encoder, Q-Former | LLM | runs on |
|---|---|---|---|
| fp32 | as exported | as exported | any CPU |
| bf16 | FP32's graphs, computed in BF16 | the same | OpenVINO, on a CPU with AMX or AVX512-BF16 |
| int8 | products of integers | products of integers | any CPU, a build with --precision int8 or int4 |
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

    `built` are the integer precisions that the repository has graphs of. `measured` is the card's `precisions`. Raises
    NotOffered if `wanted` is neither auto nor possible.
    """
    if wanted != "auto":
        if reason := _impossible(wanted, cpu, built, has_openvino):
            raise NotOffered(reason)
        return Choice(wanted, "as set")
    if cpu.bf16 and has_openvino and allows(measured, "bf16"):
        return Choice("bf16", f"the CPU has {_listed(cpu.bf16)}, and the card allows it")
    if cpu.int8 and "int8" in built and allows(measured, "int8"):
        return Choice("int8", f"the CPU has {_listed(cpu.int8)}, and the card allows it")
    if not cpu.bf16 and not cpu.int8:
        return Choice("fp32", "the CPU has none of AMX, AVX512-BF16 and VNNI")
    return Choice("fp32", "the CPU could do more, but the repository has no measured precision for it")


def allows(measured: Mapping[str, Mapping[str, float]], precision: str) -> bool:
    """Whether enough of the measured answers agree with FP32's."""
    found = measured.get(precision, {})
    return found.get("questions", 0) >= LEAST_QUESTIONS and found.get("agreement", 0.0) >= LEAST_AGREEMENT[precision]


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


def graph_name(model: str, precision: str, files: Collection[str]) -> str:
    """The file of a model's graph in a precision: FP32's if there is no other, or if the model is not reduced."""
    own = f"model.{precision}.onnx"
    fallback = "model.int8.onnx" if precision == "int4" else own
    if model in REDUCED:
        for name in (own, fallback):
            if name in files:
                return name
    return "model.onnx"
