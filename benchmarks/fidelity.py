"""What looking less closely saves: milliseconds of each call of the models, by the budget.

    python -m benchmarks.fidelity         # starts a Triton of its own on GLIMPSE_MODEL_REPOSITORY

One call at a time, the budgets in turn, ROUNDS times: medians, and the quickest in brackets, which a busy machine
disturbs least. `first token` is the LLM's with the visual tokens, a short question and one token of answer.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

from service.core import CROPS, IMAGE_SIZE, Budget, CloserFeatures, ModelCard, Sampling
from service.embedded import EmbeddedTriton, Ports
from service.prompt import PromptBuilder
from service.settings import PROJECT
from service.triton import TritonClient

ROUNDS = 60
VISION_TOKENS = (64, 96, 112, 128, 192, 256)
VISUAL_TOKENS = (32, 64, 96, 128)
QUESTION = "what colour is the small circle?"
TIMEOUT_S = 30.0

Call = Callable[[], Awaitable[object]]


def exactly(vision_tokens: int, visual_tokens: int) -> Budget:
    return Budget((vision_tokens,) * 2, (visual_tokens,) * 2)


async def calls(client: TritonClient, card: ModelCard, prompts: PromptBuilder) -> dict[str, Call]:
    """What is measured, by name."""
    image = np.random.default_rng(0).integers(0, 255, (3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    question = prompts.question(QUESTION)
    plain = Budget(card.vision_tokens, card.default_visual_tokens)
    vision, _ = await client.see(image, question, plain, TIMEOUT_S)
    least, fewest = card.vision_tokens[0], card.visual_tokens[0]
    every: dict[str, Call] = {}
    for tokens in (each for each in VISION_TOKENS if least <= each <= card.vision_tokens[1]):
        budget = exactly(tokens, fewest)
        every[f"see, {tokens} vision tokens"] = lambda b=budget: client.see(image, question, b, TIMEOUT_S)
        every[f"attend, {tokens} vision tokens"] = lambda b=budget: client.attend(vision, question, b, TIMEOUT_S)
    for tokens in (each for each in VISUAL_TOKENS if fewest < each <= card.visual_tokens[1]):
        budget = exactly(card.vision_tokens[1], tokens)
        every[f"attend, {tokens} visual tokens"] = lambda b=budget: client.attend(vision, question, b, TIMEOUT_S)
    if card.closer_view:
        crops = np.stack([image] * CROPS)
        closer = CloserFeatures.joined(await client.encode(crops, TIMEOUT_S))
        budget = exactly(card.vision_tokens_for("high")[1], fewest)
        every[f"encode {CROPS} crops"] = lambda: client.encode(crops, TIMEOUT_S)
        every["attend, closer view"] = lambda: client.attend(vision, question, budget, TIMEOUT_S, closer)
    for tokens in VISUAL_TOKENS:
        visual = np.random.default_rng(0).standard_normal((tokens, card.hidden_size), np.float32)
        every[f"first token, {tokens} visual tokens"] = lambda v=visual: first_token(client, card, prompts, v)
    return every


async def first_token(client: TritonClient, card: ModelCard, prompts: PromptBuilder, visual: np.ndarray) -> None:
    key = os.urandom(16)  # no two prompts share a prefix
    prompt = prompts.compose(QUESTION, [(visual, key)])
    tokens = client.generate(
        prompt,
        Sampling(max_tokens=1),
        end_id=card.end_id,
        pad_id=card.pad_id,
        request_id=key.hex(),
        timeout_s=TIMEOUT_S,
        stall_timeout_s=TIMEOUT_S,
    )
    async for _ in tokens:
        pass


async def main() -> None:
    repository = Path(os.environ.get("GLIMPSE_MODEL_REPOSITORY", PROJECT / "model_repository"))
    card = ModelCard.from_json((repository / "card.json").read_text())
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = Ports(*(listener.getsockname()[1] for listener in listeners))
    for listener in listeners:
        listener.close()
    url = f"127.0.0.1:{ports.grpc}"
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "triton.log"
        async with (
            TritonClient(url, url) as client,
            EmbeddedTriton(repository, client=client, card=card, log_path=log_path, ports=ports),
        ):
            every = await calls(client, card, PromptBuilder.load(card, repository))
            for _ in range(ROUNDS):
                for name, call in every.items():
                    begun = time.perf_counter()
                    await call()
                    seconds[name].append(time.perf_counter() - begun)
    for name, taken in seconds.items():
        print(f"{name:32} {np.median(taken) * 1e3:7.2f} ms ({min(taken) * 1e3:.2f})")


if __name__ == "__main__":
    asyncio.run(main())
