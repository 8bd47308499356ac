"""Measure what elastic fidelity saves: milliseconds of each model call, by budget.

    python -m benchmarks.fidelity         # starts its own Triton on GLIMPSE_MODEL_REPOSITORY

There is one call at a time, the budgets in turn, `--rounds` times. It prints medians and, in brackets, the minimum,
which a busy machine disturbs least. `first token` is an LLM call with the visual tokens, a short question and one token
of answer.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.arguments import count
from service.core.card import ModelCard
from service.core.errors import GlimpseError
from service.core.models import Generation
from service.core.request import Budget, Sampling
from service.core.vision import CROPS, IMAGE_SIZE, CloserFeatures, FloatArray
from service.settings import PROJECT
from service.text.prompt import PromptBuilder
from service.triton import TritonClient
from service.triton_server.access import Access, Ports
from service.triton_server.supervision import EmbeddedTriton

VISION_TOKENS = (64, 96, 112, 128, 192, 256)
VISUAL_TOKENS = (32, 64, 96, 128)
QUESTION = "what colour is the small circle?"
TIMEOUT_S = 30.0

TRIES = 12
Result = TypeVar("Result")
Call = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Models:
    """A repository's models, served."""

    client: TritonClient
    card: ModelCard
    prompts: PromptBuilder


@asynccontextmanager
async def own_models() -> AsyncIterator[Models]:
    """Serve the models with a separate Triton while the block runs."""
    repository = Path(os.environ.get("GLIMPSE_MODEL_REPOSITORY", PROJECT / "model_repository"))
    card = ModelCard.from_json((repository / "card.json").read_text())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        access = Access.choose(Ports(metrics=listener.getsockname()[1]))
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "triton.log"
        async with (
            TritonClient(access.url, access.url) as client,
            EmbeddedTriton(repository, client=client, card=card, log_path=log_path, access=access) as triton,
            asyncio.TaskGroup() as tasks,
        ):
            watch = tasks.create_task(triton.supervise())
            yield Models(client, card, PromptBuilder.load(card, repository))
            watch.cancel()


async def answer_to(models: Models, question: str, visual_tokens: FloatArray, max_tokens: int) -> str:
    """Answer greedily -> the text without the end token."""
    key = os.urandom(16)  # prevents two prompts from sharing a prefix
    ids: list[int] = []
    generation = Generation(
        models.prompts.compose(question, [(visual_tokens, key)]),
        Sampling(max_tokens=max_tokens),
        end_id=models.card.end_id,
        pad_id=models.card.pad_id,
        request_id=key.hex(),
        stall_timeout_s=TIMEOUT_S,
    )
    async for some in models.client.generate(generation, TIMEOUT_S):
        ids += some
    return str(models.prompts.tokenizer.decode([each for each in ids if each != models.card.end_id]))


async def steadily(call: Callable[[], Awaitable[Result]]) -> Result:
    """Repeat the call if a model does not answer.

    On a machine that is busy with other work, Triton may give up a model's process.
    """
    for _ in range(TRIES - 1):
        try:
            return await call()
        except GlimpseError:
            await asyncio.sleep(5.0)
    return await call()


async def timed(call: Call) -> float:
    begun = time.perf_counter()
    await call()
    return time.perf_counter() - begun


def exactly(vision_tokens: int, visual_tokens: int) -> Budget:
    return Budget((vision_tokens,) * 2, (visual_tokens,) * 2)


async def calls(models: Models) -> dict[str, Call]:
    """Return the calls to measure, by name."""
    client, card = models.client, models.card
    image = np.random.default_rng(0).integers(0, 255, (3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    question = models.prompts.question(QUESTION)
    plain = Budget(card.vision_tokens, card.default_visual_tokens)
    vision, _ = await steadily(partial(client.see, image, question, plain, TIMEOUT_S))
    least, fewest = card.vision_tokens[0], card.visual_tokens[0]
    every: dict[str, Call] = {}
    for tokens in (each for each in VISION_TOKENS if least <= each <= card.vision_tokens[1]):
        budget = exactly(tokens, fewest)
        every[f"see, {tokens} vision tokens"] = partial(client.see, image, question, budget, TIMEOUT_S)
        every[f"attend, {tokens} vision tokens"] = partial(client.attend, vision, question, budget, TIMEOUT_S)
    for tokens in (each for each in VISUAL_TOKENS if fewest < each <= card.visual_tokens[1]):
        budget = exactly(card.vision_tokens[1], tokens)
        every[f"attend, {tokens} visual tokens"] = partial(client.attend, vision, question, budget, TIMEOUT_S)
    if card.closer_view:
        crops = np.stack([image] * CROPS)
        closer = CloserFeatures.joined(await steadily(partial(client.encode, crops, TIMEOUT_S)))
        budget = exactly(card.vision_tokens_for("high")[1], fewest)
        every[f"encode {CROPS} crops"] = partial(client.encode, crops, TIMEOUT_S)
        every["attend, closer view"] = partial(client.attend, vision, question, budget, TIMEOUT_S, closer)
    for tokens in VISUAL_TOKENS:
        visual = np.random.default_rng(0).standard_normal((tokens, card.hidden_size), np.float32)
        every[f"first token, {tokens} visual tokens"] = partial(answer_to, models, QUESTION, visual, 1)
    return every


async def measure(rounds: int) -> None:
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    async with own_models() as models:
        every = await calls(models)
        for _ in range(rounds):
            for name, call in every.items():
                seconds[name].append(await steadily(partial(timed, call)))
    for name, taken in seconds.items():
        print(f"{name:32} {np.median(taken) * 1e3:7.2f} ms ({min(taken) * 1e3:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=count, default=60)
    asyncio.run(measure(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
