"""Measure how a CPU's precisions change the reference model's answers, for `python -m benchmarks.precision --cpu`.

The graphs are those that `glimpse build --profile embedded --precision ...` makes, from the FP32 graphs of a
repository. BF16 is rounded to as a CPU with BF16 does, so this runs on any CPU and says nothing about speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from build_engines.convert.agreement import ANSWER_TOKENS, VISION, answers, visual_tokens
from build_engines.convert.integers import round_to_bf16, to_int4, to_int8
from build_engines.convert.steps import named
from build_engines.evaluation.accuracy import NOT_IN_TOTAL, Row, rows
from service.core.card import ModelCard
from service.core.precision import REDUCED
from service.media.decoder import ImageLimits, decode
from service.text.prompt import Detokeniser, PromptBuilder, token_bytes

PRECISIONS = ("fp32", "bf16", "int8", "int4")
BARS = {
    "bf16": {"agreement": 0.995, "accuracy_loss": 0.003},
    "int8": {"agreement": 0.99, "accuracy_loss": 0.003},
    "int4": {"accuracy_loss": 0.003},
}
DESCRIPTION_TOKENS = 64


def graphs(repository: Path, work: Path) -> dict[str, dict[str, Path]]:
    """By precision the file of each model. Graphs of other precisions than FP32 are written into `work`."""
    fp32 = {name: repository / name / "1" / "model.onnx" for name in (*VISION, "llm")}
    work.mkdir(parents=True, exist_ok=True)
    found = {"fp32": fp32}
    for precision in PRECISIONS[1:]:
        files = {name: work / f"{name}.{precision}.onnx" for name in REDUCED}
        for name, file in files.items():
            onnx.save(converted(fp32[name], name, precision), file)
        found[precision] = fp32 | files
    return found


def converted(graph: Path, name: str, precision: str) -> onnx.ModelProto:
    """A model's FP32 graph in another precision of a CPU."""
    model = named(onnx.load(graph))
    if precision == "bf16":
        round_to_bf16(model)
    elif precision == "int4" and name == "llm":
        to_int4(model, graph.parent)
    else:
        to_int8(name, model, graph.parent)
    return model


def said(
    files: Mapping[str, Mapping[str, Path]], card: ModelCard, prompts: PromptBuilder, scenes: Path, every: int
) -> tuple[list[Row], dict[str, list[str]], dict[str, Any]]:
    """Every `every`-th question, and by precision the answers and the visual tokens."""
    asked = sorted(rows(scenes)[::every], key=lambda row: row.image)
    pixels = {name: decode((scenes / name).read_bytes(), ImageLimits()).pixels for name in {row.image for row in asked}}
    pairs = [(pixels[row.image], row.question) for row in asked]
    limits = [DESCRIPTION_TOKENS if row.type == NOT_IN_TOTAL else ANSWER_TOKENS for row in asked]
    spelled, texts, visual = token_bytes(prompts.tokenizer), {}, {}
    for precision, models in files.items():
        # int4 sees as int8 does
        visual[precision] = visual["int8"] if precision == "int4" else visual_tokens(models, card, prompts, pairs)
        tokens = answers(models["llm"], card, prompts, [row.question for row in asked], visual[precision], limits)
        texts[precision] = [_spelled(each, spelled) for each in tokens]
    return asked, texts, visual


def _spelled(tokens: Sequence[int], spelled: Sequence[bytes]) -> str:
    text = Detokeniser(spelled)
    return text.push(tokens) + text.finish()
