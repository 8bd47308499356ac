"""Measure how FP16 and FP8 change the reference model's answers, in ONNX Runtime on the CPU.

    python -m benchmarks.precision --out benchmarks/results/precision.json

    python -m benchmarks.precision --cpu --out benchmarks/results/precision_on_cpu.json

measures BF16, INT8 and weights of 4 bits instead, as a CPU computes them (`precision_on_cpu.py`).

It builds the graphs as `glimpse build` does for a GPU, up to its step `parity`. It asks each precision every committed
question, and as many about fresh scenes, because the FP8 products were chosen on the committed ones.

| row | graphs |
|---|---|
| fp32, fp16 | all in that precision |
| fp8 | most matrix products of the vision encoder in FP8 E4M3, all else as in fp16 |

The LLM of fp8 is also FP16, because TensorRT-LLM has no FP8 for OPT.
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

from benchmarks import precision_on_cpu
from build_engines.convert import __main__ as build
from build_engines.convert.manifest import KEPT, NOT_FP8
from build_engines.convert.parity import greedy, inner, nearness, outputs, residuals, session
from build_engines.evaluation.accuracy import NOT_IN_TOTAL, SCENES, Outcome, Row, rows, summarise
from build_engines.evaluation.intervals import wilson
from build_engines.scenes import held_out
from service.core.card import ModelCard
from service.core.request import Budget
from service.media.decoder import ImageLimits, decode
from service.text.prompt import Detokeniser, PromptBuilder, token_bytes
from triton_models.session import Array

ROOT = Path(__file__).parents[1]
VISION = ("vision_encoder", "relevance_allocator", "qformer")
BARS = {"fp16": {"agreement": 0.998}, "fp8": {"agreement": 0.98, "accuracy_loss": 0.01}}
BATCH = 8
ANSWER_TOKENS = 8
LAYER_IMAGES = 16
FIRST_FRESH = 400_000  # held-out scenes that nothing else uses


@dataclass(frozen=True)
class Graphs:
    """One precision's ONNX files by model."""

    files: Mapping[str, Path]


def built(checkpoint: Path, work: Path) -> dict[str, Graphs]:
    """Build the graphs by precision and reuse an earlier run's results."""
    run(checkpoint, work / "onnx-gpu", "onnx-gpu", "fp16")
    gpu, plans = steps_of(work / "onnx-gpu"), steps_of(work / "tensorrt")
    for exported in gpu.glob("export-*"):  # equal for all precisions
        if exported.name != "export-llm" and not (plans / exported.name).exists():
            shutil.copytree(exported, plans / exported.name)
    run(checkpoint, work / "tensorrt", "tensorrt", "fp8")

    def graphs(folder: Path, step: str, llm: str) -> Graphs:
        files = {name: folder / f"{step}-{name}" / "model.onnx" for name in VISION}
        return Graphs(files | {"llm": gpu / f"{llm}-llm" / "model.onnx"})

    return {
        "fp32": graphs(gpu, "export", "export"),
        "fp16": graphs(gpu, "fp16", "fp16"),
        "fp8": graphs(plans, "fp16", "fp16"),  # this build's step fp16 follows its step fp8
    }


def steps_of(out: Path) -> Path:
    """Return the folder with the results of a build's steps."""
    return Path(f"{out}.build")


def run(checkpoint: Path, out: Path, profile: str, precision: str) -> None:
    """Build up to the step parity, which needs no GPU. Raises SystemExit if the build fails."""
    arguments = ["--profile", profile, "--precision", precision, "--out", str(out), "--until", "parity"]
    if build.main([str(checkpoint), *arguments]):
        raise SystemExit(f"{profile} {precision} could not be built")


def answers(
    graphs: Graphs, card: ModelCard, prompts: PromptBuilder, asked: Sequence[Row], visual: Sequence[Array]
) -> list[str]:
    """Answer each question greedily from its visual tokens."""
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
    """Yield the visual tokens of each question's image, with the card's default budget."""
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


def end_to_end(ours: Sequence[Array], theirs: Sequence[Array]) -> dict[str, float]:
    """Compare the visual tokens of all questions by cosine, after encoder, allocator and Q-Former.

    The result has the cosine of all together, that of the worst question, and the first percentile over the questions.
    """
    near = nearness(np.stack(ours), np.stack(theirs))
    each = [nearness(a[np.newaxis], b[np.newaxis]).cosine for a, b in zip(ours, theirs, strict=True)]
    return near.as_json() | {"first_percentile": float(f"{np.percentile(each, 1):.7g}")}


def layers(graphs: Mapping[str, Graphs], name: str, feeds: Mapping[str, Array]) -> dict[str, list[float]]:
    """Return by precision the cosine of each layer's output with FP32's, over the whole batch."""
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
    """Count by reason the nodes that keep their previous precision, from a step's file of reasons."""
    reasons = list(json.loads(told.read_text()).values()) if told.exists() else []
    return {reason: reasons.count(reason) for reason in sorted(set(reasons))}


def quantised(graph: Path) -> dict[str, int]:
    """Count the matrix products that multiply two FP8 tensors, and the others."""
    model = onnx.load(graph, load_external_data=False)
    from_fp8 = {out for node in model.graph.node if node.op_type == "DequantizeLinear" for out in node.output}
    casts = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    fp8 = sum(all(casts.get(each, each) in from_fp8 for each in node.input[:2]) for node in products)
    return {"fp8": fp8, "other": len(products) - fp8}


def table(
    graphs: Mapping[str, Graphs], card: ModelCard, prompts: PromptBuilder, scenes: Path, limit: int | None
) -> Any:
    """Return by precision: agreement with FP32's answers, accuracy, nearness of each layer and of visual tokens."""
    asked = rows(scenes)[:limit]
    visual = {name: list(visual_tokens(each, card, prompts, asked, scenes)) for name, each in graphs.items()}
    said = {name: answers(each, card, prompts, asked, visual[name]) for name, each in graphs.items()}
    images = sorted({row.image for row in asked})[:LAYER_IMAGES]
    pixels = np.stack([decode((scenes / name).read_bytes(), ImageLimits()).pixels for name in images])
    by_layer = layers(graphs, "vision_encoder", {"image": pixels})
    found = {}
    for precision, told in said.items():
        found[precision] = scores(asked, told, said["fp32"])
        if precision != "fp32":
            files = graphs[precision].files
            found[precision] |= {
                "visual_tokens": end_to_end(visual[precision], visual["fp32"]),
                "vision_encoder_layers": by_layer[precision],
                "kept_in_fp32": {name: by_reason(files[name].parent / KEPT) for name in files},
                "matrix_products": quantised(files["vision_encoder"]),
            }
    spared = graphs["fp8"].files["vision_encoder"].parents[1] / "fp8-vision_encoder" / NOT_FP8
    found["fp8"]["not_fp8"] = by_reason(spared)
    return found


def scores(asked: Sequence[Row], told: Sequence[str], fp32: Sequence[str]) -> dict[str, Any]:
    """Return the agreement with FP32's answers and the accuracy, over all questions and by split."""
    outcomes = [Outcome(row, text, 0) for row, text in zip(asked, told, strict=True)]
    counted = [index for index, row in enumerate(asked) if row.type != NOT_IN_TOTAL]
    accuracy = {split: kinds["all"]["accuracy"] for split, kinds in summarise(outcomes).items()}
    same = [told[index] == fp32[index] for index in range(len(asked))]
    return {
        "questions": len(asked),
        "agreement": round(sum(same) / len(same), 5),
        "agreement_interval": [round(end, 5) for end in wilson(sum(same), len(same))],
        "agreement_short_answers": round(sum(same[index] for index in counted) / len(counted), 5),
        "accuracy": accuracy,
        "accuracy_all": round(sum(outcomes[index].right for index in counted) / len(counted), 5),
    }


def on_cpu(repository: Path, work: Path, scenes: Sequence[str], every: int) -> dict[str, Any]:
    """Return the report of a CPU's precisions, by set of questions."""
    card = ModelCard.from_json((repository / "card.json").read_text())
    prompts = PromptBuilder.load(card, repository)
    files = precision_on_cpu.graphs(repository, work / "cpu")
    found: dict[str, Any] = {}
    for which in scenes:
        asked, said, visual = precision_on_cpu.said(files, card, prompts, scenes_of(which, work), every)
        table = {precision: scores(asked, told, said["fp32"]) for precision, told in said.items()}
        for precision in set(table) - {"fp32"}:
            table[precision]["visual_tokens"] = end_to_end(visual[precision], visual["fp32"])
        found[which] = {"bars": verdicts(table, precision_on_cpu.BARS), "precision": table}
        print(which, json.dumps(found[which], indent=2), flush=True)
    return {"model": card.name, "every": every, "scenes": found}


def verdicts(found: Mapping[str, Any], all_bars: Mapping[str, Mapping[str, float]] = BARS) -> dict[str, bool]:
    """Return for each bar whether it is met."""
    told = {}
    for precision, bars in all_bars.items():
        if "agreement" in bars:
            told[f"{precision} agreement >= {bars['agreement']}"] = found[precision]["agreement"] >= bars["agreement"]
        if "accuracy_loss" in bars:
            loss = found["fp32"]["accuracy_all"] - found[precision]["accuracy_all"]
            told[f"{precision} accuracy within {bars['accuracy_loss']}"] = loss <= bars["accuracy_loss"]
    return told


def scenes_of(which: str, work: Path, numbers: Mapping[str, int] = held_out.COMMITTED) -> Path:
    """Return the committed scenes, on which the FP8 products were chosen, or as many fresh ones."""
    if which == "committed":
        return SCENES
    if not (work / which / "questions.jsonl").exists():
        held_out.write(work / which, numbers, FIRST_FRESH)
    return work / which


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "reference")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "precision", help="folder that keeps the builds")
    parser.add_argument("--scenes", nargs="+", choices=["committed", "fresh"], default=["committed", "fresh"])
    parser.add_argument("--cpu", action="store_true", help="measure a CPU's precisions, with --repository's graphs")
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository")
    parser.add_argument("--every", type=int, default=1, help="with --cpu: ask every EVERY-th question only")
    parser.add_argument("--limit", type=int, help="ask only the first LIMIT questions")
    parser.add_argument("--out", type=Path, help="JSON file; results of other scenes with the same graphs are kept")
    given = parser.parse_args()
    if given.cpu:
        report = on_cpu(given.repository, given.work, given.scenes, given.every)
        if given.out:
            given.out.write_text(json.dumps(report, indent=2) + "\n")
        return
    graphs = built(given.checkpoint, given.work)
    plans, gpu = steps_of(given.work / "tensorrt"), steps_of(given.work / "onnx-gpu")
    card = ModelCard.from_json((plans / "card" / "card.json").read_text())
    prompts = PromptBuilder.load(card, plans / "card")
    told = {
        "model": card.name,
        "fp8_fingerprint": card.fingerprint,
        "graphs": {
            precision: json.loads((steps / "parity" / "parity.json").read_text())["graphs"]
            for precision, steps in (("fp16", gpu), ("fp8", plans))
        },
    }
    before = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    same = before.get("fp8_fingerprint") == card.fingerprint and before.get("graphs") == told["graphs"]
    kept = before.get("scenes", {}) if same else {}
    for which in given.scenes:
        found = table(graphs, card, prompts, scenes_of(which, given.work), given.limit)
        kept[which] = {"bars": verdicts(found), "precision": found}
        print(which, json.dumps(kept[which], indent=2), flush=True)
        if given.out:
            given.out.write_text(json.dumps(told | {"scenes": kept}, indent=2) + "\n")


if __name__ == "__main__":
    main()
