"""Measure one step of `glimpse adapt --teacher tokens` at published sizes: memory and time.

    python -m benchmarks.adapting_step --images 4 --asked 2

The Q-Former is BLIP-2's: 12 layers of width 768 over features of ViT-g/14, width 1408. Weights and features are random.
A step reads kept features, so neither the encoder nor the language model is in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from build_engines.adapt.chain import Reader
from build_engines.adapt.train import QUERIES, Batch, Student
from build_engines.model.allocation import DETAIL_COUNT, PATCH_COUNT
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.closer import CloserView
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.model.qformer import QFormer

WORDS = 50_272  # OPT's vocabulary


class Asked:
    """Stands in for the tokenised questions: all alike."""

    def tensors(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((len(texts), 32), 7), torch.ones(len(texts), 32, dtype=torch.long)


def student() -> Student:
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(Blip2Config())
    for part in (model.qformer, model.language_projection):
        part.to_empty(device="cpu")
        for weight in part.parameters():
            torch.nn.init.normal_(weight, std=0.02)
    model.query_tokens = torch.nn.Parameter(torch.randn(1, QUERIES, model.config.qformer_config.hidden_size))
    model.requires_grad_(False)
    width = model.config.vision_config.hidden_size
    participatory = ParticipatoryKnowing(WORDS, width)
    balancing = OpponentProcessing(participatory.coupling_width)
    allocator = RelevanceAllocator(participatory, balancing, CloserView(width))
    return Student(allocator, Reader(QFormer(model), False), None, Asked())  # type: ignore[arg-type]


def batch(images: int, asked: int, width: int) -> Batch:
    rows = images * asked
    return Batch(
        torch.randn(images, 1 + PATCH_COUNT, width),
        torch.rand(images, 2, PATCH_COUNT),
        None,
        torch.arange(images).repeat_interleave(asked),
        [""] * rows,
        [[]] * rows,
        torch.ones(rows),
        torch.rand(rows, PATCH_COUNT),
        torch.tensor([[112, 112, QUERIES, QUERIES]] * rows, dtype=torch.int32),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="images of the whole view, and a quarter with the closer")
    parser.add_argument("--asked", type=int, default=2, help="questions an image (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    made = student()
    width = made.reader.qformer.layers[0].crossattention.attention.key.in_features
    near = batch(max(1, options.images // 4), options.asked, width)
    near = replace(near, detail=torch.randn(len(near.features), DETAIL_COUNT, width))
    batches = [batch(options.images, options.asked, width), near]
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4)
    for _ in range(2):  # the second has the optimizer's moments
        started, used = time.monotonic(), time.process_time()
        loss, _ = made(batches)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    told = {
        "rows": sum(len(one.texts) for one in batches),
        "seconds": round(time.monotonic() - started, 2),
        "cpu_seconds": round(time.process_time() - used, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "trained_parameters": sum(weight.numel() for weight in made.parameters()),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
