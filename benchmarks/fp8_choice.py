"""Measure how each choice of FP8 matrix products changes the answers.

    python -m benchmarks.fp8_choice --out benchmarks/results/fp8_choice.json                     # every choice, in turn
    python -m benchmarks.fp8_choice --out benchmarks/results/fp8_choice.json --only everything   # one of them

Run `python -m benchmarks.precision` first: this program quantises its exported graphs with its samples. It asks every
committed question. The last choice is the one that `glimpse build --precision fp8` makes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from benchmarks.precision import ROOT, Graphs, answers, built, quantised, visual_tokens
from build_engines.convert import commands
from build_engines.convert.parity import nearness, outputs
from build_engines.convert.precision import not_fp8, to_fp16
from build_engines.convert.samples import PARITY
from build_engines.convert.steps import modelopt_python
from build_engines.evaluation.accuracy import SCENES, Outcome, rows
from service.core.card import ModelCard
from service.text.prompt import PromptBuilder

ATTENTION, ENDS, QUERIES = "attention", "the first and the last layer", "queries, keys and values"  # as in `not_fp8`
CHOICES: dict[
    str, tuple[tuple[str, ...], bool]
] = {  # what of the encoder is spared, and whether the Q-Former is FP8 too
    "everything, the Q-Former too": ((), True),
    "everything": ((), False),
    "without attention's own products": ((ATTENTION,), False),
    "and without the first and the last layer": ((ATTENTION, ENDS), False),
    "and without queries, keys and values": ((ATTENTION, ENDS, QUERIES), False),
}


def quantise(build: Path, name: str, excluded: Sequence[str], folder: Path) -> Path:
    """Quantise one exported graph with modelopt, the rest in FP16, as the steps `fp8` and `fp16` do."""
    folder.mkdir(parents=True, exist_ok=True)
    exported, feeds = build / f"export-{name}" / "model.onnx", build / "samples" / f"{name}.npz"
    line = commands.fp8(modelopt_python(), exported, feeds, folder / "fp8.onnx", excluded)
    subprocess.run(line, check=True, capture_output=True)
    path = folder / f"{name}.onnx"
    onnx.save(to_fp16(name, onnx.load(folder / "fp8.onnx")).model, path)
    return path


def measured(ours: Graphs, fp32: Graphs, said: Sequence[str], expected: Sequence[str], build: Path) -> dict[str, Any]:
    """Return agreement with FP32's answers, accuracy, and the encoder's cosines on the parity samples."""
    asked = rows(SCENES)
    feeds = {"image": np.load(build / "samples" / "vision_encoder.npz")["image"][:PARITY]}
    seen, wanted = (outputs(each.files["vision_encoder"], feeds) for each in (ours, fp32))
    near = {name: nearness(seen[name], wanted[name]) for name in ("features", "saliency")}
    right = sum(Outcome(row, text, 0).right for row, text in zip(asked, said, strict=True))
    return {
        "agreement": round(sum(a == b for a, b in zip(said, expected, strict=True)) / len(asked), 5),
        "accuracy": round(right / len(asked), 5),
        "cosine": {name: each.as_json()["cosine"] for name, each in near.items()},
        "matrix_products": quantised(ours.files["vision_encoder"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "reference")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "precision")
    parser.add_argument("--only", choices=list(CHOICES), nargs="+", default=list(CHOICES))
    parser.add_argument("--out", type=Path, required=True, help="JSON file; results of other choices in it are kept")
    given = parser.parse_args()
    made, build = built(given.checkpoint, given.work), Path(f"{given.work / 'tensorrt'}.build")
    card = ModelCard.from_json((build / "card" / "card.json").read_text())
    prompts = PromptBuilder.load(card, build / "card")
    reasons = not_fp8(onnx.load(build / "export-vision_encoder" / "model.onnx"))

    def said(graphs: Graphs) -> list[str]:
        visual = list(visual_tokens(graphs, card, prompts, rows(SCENES), SCENES))
        return answers(graphs, card, prompts, rows(SCENES), visual)

    expected = said(made["fp32"])
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for name in given.only:
        spared, with_qformer = CHOICES[name]
        folder = given.work / "choices" / str(list(CHOICES).index(name))
        excluded = [node for node, why in reasons.items() if why.startswith(spared)]
        files = {"vision_encoder": quantise(build, "vision_encoder", excluded, folder)}
        if with_qformer:
            files["qformer"] = quantise(build, "qformer", (), folder)
        graphs = Graphs({**made["fp16"].files, **files})
        found[name] = measured(graphs, made["fp32"], said(graphs), expected, build)
        print(name, json.dumps(found[name]), flush=True)
        given.out.write_text(json.dumps({key: found[key] for key in CHOICES if key in found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
