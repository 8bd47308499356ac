"""Compute cost by stage and by arm: graph time in ms and counted operations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.ablation.arms import BUDGETS, CLOSER_MOST
from benchmarks.ablation.report import Json, Measured
from benchmarks.ablation.timing import BASE, PROMPT, REGION, latencies
from build_engines.evaluation.intervals import Figure
from build_engines.model import flops
from build_engines.model.allocation import GROUP
from build_engines.model.checkpoint import Checkpoint
from service.core.card import ModelCard

STAGES = "stages.json"


def of(checkpoint: Checkpoint, repository: Path, runs: int) -> Json:
    """Return the costs by measure, model and input.

    Raises ValueError if the repository was exported from another checkpoint.
    """
    card = ModelCard.from_json((repository / "card.json").read_text())
    if card.visual_fingerprint != checkpoint.visual_fingerprint():
        raise ValueError(
            f"{repository} was exported from other weights than {checkpoint.directory}: run `make repository`"
        )
    budgets, groups = [*BUDGETS, CLOSER_MOST], range(1, 5)
    times = latencies(repository, budgets, groups, runs)
    return {
        "latency_ms": {
            model: {what: figure.as_json(3) for what, figure in medians.items()} for model, medians in times.items()
        },
        "gflops": {
            model: {what: Figure(number, number, number).as_json() for what, number in numbers.items()}
            for model, numbers in operations(checkpoint, budgets, groups).items()
        },
        "formula": " ".join((flops.__doc__ or "").split()),
    }


def operations(
    checkpoint: Checkpoint, vision_tokens: Sequence[int], groups: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Count the floating-point operations (10**9) of the work that `latencies` times."""
    config = checkpoint.model.config
    vision, width = config.vision_config, config.vision_config.hidden_size
    parts = {"participatory": checkpoint.participatory is not None, "balancing": checkpoint.balancing is not None}
    counted = {
        "vision_encoder": {"224 view": flops.encoder(vision)},
        "relevance_allocator": {"224 view": flops.allocator(width, **parts)},
        "qformer": {f"{tokens} vision tokens": flops.qformer(config, [tokens + 1]) for tokens in vision_tokens},
        "llm": {f"{GROUP * g} visual tokens": flops.prefill(config.text_config, GROUP * g + PROMPT) for g in groups},
    }
    for group in groups:
        reads = [BASE + 1, *[REGION] * (group - 1)]
        counted["qformer"][f"{GROUP * group} visual tokens"] = flops.qformer(config, reads)
    if checkpoint.closer is not None:
        counted["vision_encoder"]["four crops"] = 4 * flops.encoder(vision)
        counted["relevance_allocator"]["closer view"] = flops.allocator(width, closer=True, **parts)
    return {model: {what: number / 1e9 for what, number in numbers.items()} for model, numbers in counted.items()}


def of_arm(cost: Json, measured: Measured) -> Json:
    """Compute the cost of one question about one new image, at the arm's mean tokens.

    `auto` pays for its share of closer views.
    """
    return {name: _of_arm(cost[name], measured) for name in ("latency_ms", "gflops")}


def _of_arm(stages: Json, measured: Measured) -> dict[str, float]:
    closer, tokens, visual = measured.closer, measured.tokens, float(measured.answers.visual_tokens.mean())
    encoder, allocator, reader = stages["vision_encoder"], stages["relevance_allocator"], stages["qformer"]
    once, again = encoder["224 view"]["value"], encoder.get("four crops", {"value": 0.0})["value"]
    low = allocator["224 view"]["value"]
    high = allocator.get("closer view", {"value": low})["value"]
    base = _at(reader, "vision tokens", tokens)
    more = _at(reader, "visual tokens", visual) - _at(reader, "visual tokens", GROUP)
    parts = {
        "vision_encoder": once + closer * again,
        "relevance_allocator": low + closer * (high - low),
        "qformer": base + more,
        "llm": _at(stages["llm"], "visual tokens", visual),
    }
    return {name: round(value, 3) for name, value in (parts | {"all": sum(parts.values())}).items()}


def _at(rows: Json, what: str, tokens: float) -> float:
    """Interpolate linearly between the measured numbers of tokens."""
    points = {int(name.split()[0]): row["value"] for name, row in rows.items() if name.endswith(what)}
    return float(np.interp(tokens, list(points), list(points.values())))


def shares(cost: Json, results: Path) -> dict[str, float | None]:
    """Return the allocator's time divided by the encoder's.

    One value is for the exported graphs, the other for the served models, if `benchmarks.stages` measured it.
    """
    times = cost["latency_ms"]
    told = results / STAGES
    return {
        "exported graphs": times["relevance_allocator"]["224 view"]["value"]
        / times["vision_encoder"]["224 view"]["value"],
        "served": json.loads(told.read_text())["allocator_over_encoder"]["value"] if told.exists() else None,
    }
