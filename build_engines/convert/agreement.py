"""Compare the answers of a CPU precision with FP32's, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from build_engines.convert.parity import greedy
from build_engines.convert.samples import Sample
from build_engines.evaluation.intervals import wilson
from service.core.card import ModelCard
from service.core.request import Budget
from service.text.prompt import PromptBuilder
from triton_models.query_groups import GroupRunner
from triton_models.session import Array, Graph, open_session

ANSWER_TOKENS = 8
VISION = ("vision_encoder", "relevance_allocator", "qformer")


def agreement(
    fp32: Mapping[str, Path], ours: Mapping[str, Path], card: ModelCard, prompts: PromptBuilder, asked: Sequence[Sample]
) -> dict[str, Any]:
    """Ask both chains of graphs, by model, with the card's default budget -> an entry of the card's `precisions`."""
    visual = {id(graphs): visual_tokens(graphs, card, prompts, asked) for graphs in (fp32, ours)}
    questions = [question for _, question in asked]
    theirs, own = (answers(graphs["llm"], card, prompts, questions, visual[id(graphs)]) for graphs in (fp32, ours))
    same = sum(a == b for a, b in zip(theirs, own, strict=True))
    low, high = wilson(same, len(asked))
    return {"questions": len(asked), "agreement": round(same / len(asked), 5),
            "agreement_least": round(low, 5), "agreement_most": round(high, 5)}  # fmt: skip


def visual_tokens(
    graphs: Mapping[str, Path], card: ModelCard, prompts: PromptBuilder, asked: Sequence[Sample]
) -> list[Array]:
    """The visual tokens [32 to 128, H] of each image and question, one at a time, as the service sees them."""
    encoder, allocator = Graph(graphs["vision_encoder"]), Graph(graphs["relevance_allocator"])
    qformer = GroupRunner(graphs["qformer"])
    vision = card.default_vision_tokens or card.vision_tokens
    budget = Budget(vision, card.default_visual_tokens).to_array()[np.newaxis]
    seen: tuple[Array, dict[str, Array]] | None = None
    found = []
    for pixels, text in tqdm(asked, desc="visual tokens", mininterval=2.0):
        if seen is None or seen[0] is not pixels:  # questions about one image follow each other
            names = list(encoder.outputs)
            seen = pixels, dict(zip(names, encoder.run({"image": pixels[np.newaxis]}, names), strict=True))
        question = prompts.question(text)
        given = seen[1] | {
            "question_ids": question.ids[np.newaxis],
            "question_mask": question.mask[np.newaxis],
            "budget": budget,
        }
        names = list(allocator.outputs)
        chosen = dict(zip(names, allocator.run({name: given[name] for name in allocator.inputs}, names), strict=True))
        told = qformer.run(given | chosen)
        found.append(told["visual_tokens"][0, : int(told["visual_count"][0, 0])])
    return found


def answers(
    llm: Path,
    card: ModelCard,
    prompts: PromptBuilder,
    questions: Sequence[str],
    visual: Sequence[Array],
    most: Sequence[int] | None = None,
) -> list[list[int]]:
    """The tokens of each greedy answer, at most `most` or ANSWER_TOKENS of them."""
    session = open_session(llm)
    limits = most or [ANSWER_TOKENS] * len(questions)
    return [
        greedy(session, tokens, np.array(prompts.text_ids(question)), limit, card.end_id)
        for question, tokens, limit in zip(
            tqdm(questions, desc="answers", mininterval=2.0), visual, limits, strict=True
        )
    ]
