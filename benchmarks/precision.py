"""What FP16 and FP8 cost in answers: the reference model's graphs on the committed scenes, in ONNX Runtime on the CPU.

    python -m benchmarks.precision --out benchmarks/results/precision.json

Builds the graphs as `glimpse build --profile tensorrt` does, up to its step `parity`, and asks every committed question
of each precision. Three rows: fp32; fp16; fp8, where most matrix products of the vision encoder are FP8 E4M3 and
everything else is as in fp16, the LLM too, as TensorRT-LLM has no FP8 for OPT.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tqdm import tqdm

from benchmarks.evaluate import NOT_IN_TOTAL, SCENES, Outcome, Row, rows, summarise
from build_engines.build import __main__ as build
from build_engines.build.manifest import KEPT, NOT_FP8
from build_engines.build.parity import greedy, inner, nearness, outputs, residuals, session
from service.core import Budget, ModelCard
from service.images import ImageLimits, decode
from service.prompt import Detokeniser, PromptBuilder, token_bytes
from triton_models.session import Array

ROOT = Path(__file__).parents[1]
VISION = ("vision_encoder", "relevance_allocator", "qformer")
BARS = {"fp16": {"agreement": 0.998}, "fp8": {"agreement": 0.98, "accuracy_loss": 0.01}}
BATCH = 8
ANSWER_TOKENS = 8
LAYER_IMAGES = 16


@dataclass(frozen=True)
class Graphs:
    """One precision's ONNX files by model, and the step that made each."""

    files: Mapping[str, Path]


def built(checkpoint: Path, work: Path) -> dict[str, Graphs]:
    """By precision. What a run before has made is made no more."""
    static, dynamic = work / "tensorrt", work / "onnx-gpu"
    run(checkpoint, static, "tensorrt", "fp8")
    run(checkpoint, dynamic, "onnx-gpu", "fp16")
    plans, gpu = Path(f"{static}.build"), Path(f"{dynamic}.build")
    for name in VISION:  # the same whatever the precision
        if not (exported := Path(f"{work / 'fp16'}.build") / f"export-{name}").exists():
            shutil.copytree(plans / f"export-{name}", exported)

    def graphs(made: Mapping[str, str], llm: str) -> Graphs:
        files = {name: plans / f"{made[name]}-{name}" / "model.onnx" for name in VISION}
        return Graphs(files | {"llm": gpu / f"{llm}-llm" / "model.onnx"})

    fp16 = Path(f"{work / 'fp16'}.build")
    run(checkpoint, work / "fp16", "tensorrt", "fp16")
    half = Graphs(
        {name: fp16 / f"fp16-{name}" / "model.onnx" for name in VISION} | {"llm": gpu / "fp16-llm" / "model.onnx"}
    )
    return {
        "fp32": graphs(dict.fromkeys(VISION, "export"), "export"),
        "fp16": half,
        "fp8": graphs(dict.fromkeys(VISION, "fp16"), "fp16"),  # its step fp16 comes after its step fp8
    }


def run(checkpoint: Path, out: Path, profile: str, precision: str) -> None:
    """Up to parity, which every machine can do."""
    arguments = ["--profile", profile, "--precision", precision, "--out", str(out), "--until", "parity"]
    if build.main([str(checkpoint), *arguments]):
        raise SystemExit(f"{profile} {precision} could not be built")


def answers(graphs: Graphs, card: ModelCard, prompts: PromptBuilder, asked: Sequence[Row], scenes: Path) -> list[str]:
    """One greedy answer a question."""
    visual = list(visual_tokens(graphs, card, prompts, asked, scenes))
    llm = session(graphs.files["llm"])
    spelled = token_bytes(prompts.tokenizer)
    found = []
    for row, tokens in zip(tqdm(asked, desc="answers", mininterval=2.0), visual, strict=True):
        most = 64 if row.type == NOT_IN_TOTAL else ANSWER_TOKENS
        said = greedy(llm, tokens, np.array(prompts.text_ids(row.question)), most, card.end_id)
        text = Detokeniser(spelled)
        found.append(text.push(said) + text.finish())
    return found


def visual_tokens(
    graphs: Graphs, card: ModelCard, prompts: PromptBuilder, asked: Sequence[Row], scenes: Path
) -> Iterator[Array]:
    """What the LLM reads of each question's image, with the card's default budget."""
    images = sorted({row.image for row in asked})
    pixels = np.stack([decode((scenes / name).read_bytes(), ImageLimits()).pixels for name in images])
    features = outputs(graphs.files["vision_encoder"], {"image": pixels})
    budget = Budget(card.vision_tokens, card.default_visual_tokens).to_array()
    allocator, qformer = (session(graphs.files[name]) for name in ("relevance_allocator", "qformer"))
    for start in tqdm(range(0, len(asked), BATCH), desc="visual tokens", mininterval=2.0):
        part = asked[start : start + BATCH]
        index = [images.index(row.image) for row in part]
        questions = [prompts.question(row.question) for row in part]
        given = {name: array[index] for name, array in features.items()} | {
            "question_ids": np.stack([question.ids for question in questions]),
            "question_mask": np.stack([question.mask for question in questions]),
            "budget": np.stack([budget] * len(part)),
        }
        chosen = outputs(allocator, given)
        seen = outputs(qformer, given | chosen)
        for tokens, (count,) in zip(seen["visual_tokens"], seen["visual_count"], strict=True):
            yield tokens[: int(count)]


def layers(graphs: Mapping[str, Graphs], name: str, feeds: Mapping[str, Array]) -> dict[str, list[float]]:
    """By precision, the cosine against FP32 of what each layer of a graph hands on, the whole batch together."""
    names = residuals(graphs["fp32"].files[name])
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / "inner.onnx"
        theirs = inner(graphs["fp32"].files[name], names, feeds, scratch)
        found = {}
        for precision in ("fp16", "fp8"):
            ours = inner(graphs[precision].files[name], names, feeds, scratch)
            found[precision] = [float(f"{nearness(ours[each], theirs[each]).cosine:.6g}") for each in names]
    return found


def by_reason(told: Path) -> dict[str, int]:
    """How many nodes keep the precision before it, of a step's file that says why each does."""
    reasons = list(json.loads(told.read_text()).values()) if told.exists() else []
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def quantised(graph: Path) -> dict[str, int]:
    """Matrix products by what they multiply: two FP8 tensors, or not."""
    model = onnx.load(graph, load_external_data=False)
    from_fp8 = {out for node in model.graph.node if node.op_type == "DequantizeLinear" for out in node.output}
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    fp8 = sum(all(casts.get(each, each) in from_fp8 for each in node.input[:2]) for node in products)
    return {"fp8": fp8, "other": len(products) - fp8}


def table(
    graphs: Mapping[str, Graphs], card: ModelCard, prompts: PromptBuilder, scenes: Path, limit: int | None
) -> Any:
    """By precision: agreement with FP32's answers, accuracy, nearness of each layer and of each graph's outputs."""
    asked = rows(scenes)[:limit]
    said = {precision: answers(each, card, prompts, asked, scenes) for precision, each in graphs.items()}
    images = sorted({row.image for row in asked})[:LAYER_IMAGES]
    pixels = np.stack([decode((scenes / name).read_bytes(), ImageLimits()).pixels for name in images])
    by_layer = layers(graphs, "vision_encoder", {"image": pixels})
    found = {}
    for precision, told in said.items():
        outcomes = [Outcome(row, text, 0) for row, text in zip(asked, told, strict=True)]
        counted = [index for index, row in enumerate(asked) if row.type != NOT_IN_TOTAL]
        accuracy = {split: kinds["all"]["accuracy"] for split, kinds in summarise(outcomes).items()}
        same = [told[index] == said["fp32"][index] for index in range(len(asked))]
        found[precision] = {
            "questions": len(asked),
            "agreement": round(sum(same) / len(same), 5),
            "agreement_short_answers": round(sum(same[index] for index in counted) / len(counted), 5),
            "accuracy": accuracy,
            "accuracy_all": round(sum(outcomes[index].right for index in counted) / len(counted), 5),
        }
        if precision != "fp32":
            files = graphs[precision].files
            found[precision] |= {
                "vision_encoder_layers": by_layer[precision],
                "kept_in_fp32": {name: by_reason(files[name].parent / KEPT) for name in files},
                "matrix_products": quantised(files["vision_encoder"]),
            }
    found["fp8"]["not_fp8"] = by_reason(
        graphs["fp8"].files["vision_encoder"].parents[1] / "fp8-vision_encoder" / NOT_FP8
    )
    return found


def verdicts(found: Mapping[str, Any]) -> dict[str, bool]:
    """Which bar holds."""
    told = {}
    for precision, bars in BARS.items():
        told[f"{precision} agreement >= {bars['agreement']}"] = found[precision]["agreement"] >= bars["agreement"]
        if "accuracy_loss" in bars:
            loss = found["fp32"]["accuracy_all"] - found[precision]["accuracy_all"]
            told[f"{precision} accuracy within {bars['accuracy_loss']}"] = loss <= bars["accuracy_loss"]
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "reference")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "precision", help="where the builds are kept")
    parser.add_argument("--scenes", type=Path, default=SCENES)
    parser.add_argument("--limit", type=int, help="only the first questions")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    graphs = built(given.checkpoint, given.work)
    folder = Path(f"{given.work / 'tensorrt'}.build") / "card"
    card = ModelCard.from_json((folder / "card.json").read_text())
    found = table(graphs, card, PromptBuilder.load(card, folder), given.scenes, given.limit)
    parity = {
        precision: json.loads((Path(f"{given.work / work}.build") / "parity" / "parity.json").read_text())["graphs"]
        for precision, work in (("fp16", "fp16"), ("fp8", "tensorrt"), ("fp16 llm", "onnx-gpu"))
    }
    told = {
        "model": card.name,
        "fp8_fingerprint": card.fingerprint,
        "bars": verdicts(found),
        "precision": found,
        "graphs": parity,
    }
    print(json.dumps(told, indent=2))
    if given.out:
        given.out.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
