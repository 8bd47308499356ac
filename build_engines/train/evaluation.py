"""How good a checkpoint is: exact match by question type, with numbers and intervals, in PyTorch, as it is shipped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, PreTrainedTokenizerFast

from benchmarks.evaluate import wilson
from build_engines.model.allocation import CELL_COUNT, Allocation
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.scenes.held_out import DIRECTORY
from build_engines.scenes.questions import DESCRIBE, Question
from build_engines.train.language import answer_loss, decoder_of
from build_engines.train.packing import Packer
from build_engines.train.queries import allocate, looker
from build_engines.train.relevance import question_tensors
from build_engines.train.stages import device, tensor
from build_engines.train.vision import normalised

QUESTION_TOKENS = 96
BATCH = 64


@dataclass
class Checkpoint:
    """What `save_checkpoint` wrote, read back: the rounded weights, computed with in FP32."""

    model: Blip2ForConditionalGeneration
    participatory: ParticipatoryKnowing
    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def load(cls, directory: Path) -> Checkpoint:
        model = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).to(device()).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        participatory = ParticipatoryKnowing(len(tokenizer), model.config.vision_config.hidden_size)
        weights = load_file(directory / "allocator.safetensors")
        prefix = "participatory."
        participatory.load_state_dict(
            {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}
        )
        return cls(model, participatory.to(device()).eval(), tokenizer)


def committed_questions(directory: Path = DIRECTORY) -> dict[str, list[tuple[str, Question]]]:
    """By split, the image's file name and the question."""
    found: dict[str, list[tuple[str, Question]]] = {}
    for line in (directory / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = Question(row["question"], row["answer"], row["type"], ())
        found.setdefault(row["split"], []).append((row["image"], question))
    return found


@torch.no_grad()
def evaluate(
    checkpoint: Checkpoint,
    asked: list[tuple[np.ndarray, Question]],
    refined: int = CELL_COUNT,
    chosen: str = "relevance",
) -> dict[str, Any]:
    """Exact match by type. asked: pixels [224, 224, 3] uint8 and a question each.

    refined: cells seen in detail, 64 is the plain BLIP-2 input, 16 gives 112 vision tokens. chosen: "relevance", or
    "random" for comparison.
    """
    model, look, decode = checkpoint.model, looker(checkpoint.model), decoder_of(checkpoint.model.language_model)
    packer, allocation = Packer(checkpoint.tokenizer, QUESTION_TOKENS), Allocation().to(device())
    right, number = Counter[str](), Counter[str]()
    rng = torch.Generator().manual_seed(0)
    for batch in tqdm(list(_batches(asked)), desc=f"{64 + 3 * refined} vision tokens", mininterval=5.0):
        pixels = tensor(np.stack([one for one, _ in batch]))
        questions = [question for _, question in batch]
        features = model.vision_model(pixel_values=normalised(pixels)).last_hidden_state
        ids, mask = question_tensors(checkpoint.tokenizer, questions)
        relevance = checkpoint.participatory(features, ids, mask)
        if chosen == "random":
            relevance = torch.rand(relevance.shape, generator=rng).to(device())
        tokens, real = allocate(allocation, features, relevance, relevance.new_full((len(batch), 1), refined))
        seen = look(model.query_tokens.expand(len(batch), -1, -1), tokens, real)
        prefix = model.language_projection(seen)
        _, r, n = answer_loss(model.language_model, decode, prefix, packer.pack([[question] for question in questions]))
        right.update(r)
        number.update(n)
    return table(right, number)


def _batches(asked: list[tuple[np.ndarray, Question]]) -> Iterator[list[tuple[np.ndarray, Question]]]:
    for start in range(0, len(asked), BATCH):
        yield asked[start : start + BATCH]


def table(right: Counter[str], number: Counter[str]) -> dict[str, Any]:
    """By type and for all types but descriptions: the share that is right, a 95 % interval, and the number asked."""
    rows = {kind: _row(right[kind], number[kind]) for kind in sorted(number)}
    counted = [kind for kind in number if kind != DESCRIBE]
    if counted:
        rows["all"] = _row(sum(right[kind] for kind in counted), sum(number[kind] for kind in counted))
    return rows


def _row(right: float, number: int) -> dict[str, Any]:
    low, high = wilson(right, number)
    return {"accuracy": round(right / number, 4), "interval": [round(low, 4), round(high, 4)], "n": number}


def committed_report(checkpoint: Checkpoint, limit: int | None = None) -> dict[str, Any]:
    """The committed scenes, by split: all tokens, and 112 tokens chosen by relevance and at random."""
    report: dict[str, Any] = {}
    for split, rows in committed_questions().items():
        asked = [(np.asarray(Image.open(DIRECTORY / name).convert("RGB")), question) for name, question in rows[:limit]]
        report[split] = {
            "256_tokens": evaluate(checkpoint, asked),
            "112_tokens": evaluate(checkpoint, asked, 16),
            "112_tokens_random": evaluate(checkpoint, asked, 16, "random"),
        }
    return report
