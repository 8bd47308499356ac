"""Time the exported graphs in ONNX Runtime on one thread, each model by its input."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from build_engines.evaluation.intervals import Figure, median
from service.core.card import ModelCard
from service.core.tensors import MODELS
from triton_models.session import Array, Graph

SEEN = tuple(tensor.name for tensor in MODELS["vision_encoder"].outputs)
CHOSEN = tuple(tensor.name for tensor in MODELS["relevance_allocator"].outputs)
PROMPT = 13  # text tokens of a question's prompt
BASE, REGION = 120, 36  # vision tokens of the base group and of each focus region, if there are several groups
WARM_UP = 5

Medians = dict[str, Figure]  # milliseconds


def latencies(repository: Path, vision_tokens: Sequence[int], groups: Sequence[int], runs: int) -> dict[str, Medians]:
    """Return medians over `runs` of one image with one question.

    The stages run in turn, so that a slow minute of the machine affects all of them equally.
    """
    card = ModelCard.from_json((repository / "card.json").read_text())
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (1, 3, 224, 224), dtype=np.uint8)
    encoder = Graph(graph_of(repository, "vision_encoder"))
    seen = dict(zip(SEEN, encoder.run({"image": image}, SEEN), strict=True))
    asked: dict[str, Array] = {
        "question_ids": np.full((1, 32), 7, np.int32),
        "question_mask": np.ones((1, 32), np.int32),
    }
    stages: dict[tuple[str, str], Callable[[], object]] = {
        ("vision_encoder", "224 view"): lambda: encoder.run({"image": image}, SEEN)
    }
    allocator = Graph(graph_of(repository, "relevance_allocator"))
    budget = {"budget": np.array([[64, 256, 32, 32]], np.int32)}
    stages["relevance_allocator", "224 view"] = lambda: allocator.run(seen | asked | budget, CHOSEN)
    if card.closer_view:
        quarters = np.repeat(image, 4, axis=0)
        closer = Graph(graph_of(repository, "relevance_allocator_448"))
        detail = {"detail_features": generator.normal(size=(1, 1024, card.vision_width)).astype(np.float32)}
        wide = {"budget": np.array([[64, 400, 32, 32]], np.int32)}
        stages["vision_encoder", "four crops"] = lambda: encoder.run({"image": quarters}, SEEN)
        stages["relevance_allocator", "closer view"] = lambda: closer.run(seen | asked | detail | wide, CHOSEN)
    reader = Graph(graph_of(repository, "qformer"))
    for tokens in vision_tokens:
        stages["qformer", f"{tokens} vision tokens"] = _reading(reader, card, asked, tokens, 1)
    for group in groups:
        stages["qformer", f"{32 * group} visual tokens"] = _reading(reader, card, asked, BASE, group)
    for group in groups:
        stages["llm", f"{32 * group} visual tokens"] = _prefill(Graph(graph_of(repository, "llm")), 32 * group)
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in stages}
    for run in range(runs + WARM_UP):
        for key, stage in stages.items():
            started = time.perf_counter()
            stage()
            if run >= WARM_UP:
                taken[key].append((time.perf_counter() - started) * 1e3)
    found: dict[str, Medians] = {}
    for (model, what), values in taken.items():
        found.setdefault(model, {})[what] = median(values)
    return found


def graph_of(repository: Path, model: str) -> Path:
    return repository / model / "1" / "model.onnx"


def _reading(
    reader: Graph, card: ModelCard, asked: Mapping[str, Array], tokens: int, groups: int
) -> Callable[[], object]:
    """Prepare the runs of the `qformer` model.

    The base group reads `tokens` vision tokens and CLS; then the focus groups run in one batch.
    """

    def inputs(rows: int, length: int) -> dict[str, Array]:
        tokens = np.random.default_rng(length).normal(size=(rows, length, card.vision_width)).astype(np.float32)
        read = {"vision_tokens": tokens, "attend": np.ones((rows, length), np.int32)}
        return read | {name: asked[name].repeat(rows, axis=0) for name in asked if name in reader.inputs}

    runs = [inputs(1, tokens + 1)] + [inputs(groups - 1, REGION)] * (groups > 1)
    return lambda: [reader.run(each, ["visual_tokens"]) for each in runs]


def _prefill(llm: Graph, visual_tokens: int) -> Callable[[], object]:
    """Prepare the LLM's prefill of the visual tokens and a prompt."""
    length = visual_tokens + PROMPT
    inputs: dict[str, Array] = {
        "input_ids": np.full((1, length), 7, np.int64),
        "prompt_embedding_table": np.zeros(
            (1, visual_tokens, int(llm.inputs["prompt_embedding_table"][2])), np.float32
        ),
        "past_lengths": np.zeros(1, np.int64),
        "input_lengths": np.full(1, length, np.int64),
    }
    for name in llm.inputs.keys() - inputs.keys():  # each layer's past, which is empty
        _, heads, _, width = llm.inputs[name]
        inputs[name] = np.zeros((1, int(heads), 0, int(width)), np.float32)
    return lambda: llm.run(inputs, ["logits"])
