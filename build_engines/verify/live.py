"""Check a served repository: every model infers, answers match FP32, and speed.

Calls a running Triton over gRPC, with any backend: plans, ONNX Runtime on a GPU or on a CPU. Triton itself measures the
times without the network.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
import urllib.request
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tqdm import tqdm
from tritonclient.grpc import service_pb2, service_pb2_grpc

from build_engines.convert.parity import greedy, nearness, reader_of, session
from build_engines.convert.samples import Sample, feeds, samples
from build_engines.repository import TEXT_ENCODER, file_beside_llm
from build_engines.verify.files import Wrong, read_configs
from build_engines.verify.report import Report
from service.core.card import LLM_CLIPS, ModelCard
from service.core.models import Generation
from service.core.prompt import Prompt
from service.core.request import Budget, Sampling
from service.text.prompt import PromptBuilder
from service.triton import TritonClient
from triton_models.session import Array

BATCHES = (1, 2, 4, 8, 16, 32)
LEAST_COSINE = {"FP32": 0.9999, "FP16": 0.995}  # of one sample's features or visual tokens; FP16 includes FP8
LEAST_AGREEMENT = 0.9  # of answers; with few scenes, one different token is several percent
TIMEOUT_S = 60.0
ANSWER_TOKENS = 12
LLM_GRAPH = "model.onnx"


@dataclass(frozen=True)
class Served:
    """Addresses of the servers, and references to compare with."""

    vision_url: str
    llm_url: str
    metrics_url: str | None  # of the vision server, http://host:port/metrics
    reference: Path | None  # an FP32 repository of the same checkpoint
    images: Path | None
    scenes: int = 8
    repeats: int = 20


async def check_served(repository: Path, card: ModelCard, served: Served, report: Report) -> None:
    """Check and measure the servers, and add the results to the report."""
    prompts = PromptBuilder.load(card, repository)
    async with TritonClient(served.vision_url, served.llm_url, text_type=card.text_type) as client:
        for model in card.called:
            with report.check(f"{model} infers"):
                await client.probe(model, card, TIMEOUT_S)
        if report.failed:
            return
        given = samples(served.images, served.scenes)
        if served.reference is None:
            report.not_run("parity", "needs --reference, an FP32 repository of the same checkpoint")
        else:
            await check_parity(client, card, prompts, given, served.reference, report)
        most = read_configs(repository)["vision_encoder"].max_batch_size
        report.measured["encoder_ms"] = await encoder_times(client, served, given, most)
        report.measured["chain"] = await chain_times(client, card, prompts, given, served.repeats)
        memory = gpu_memory(served.metrics_url)
        if memory is None:
            report.not_run("GPU memory", "the server reports no GPU")
        else:
            report.measured["gpu_memory_bytes"] = memory


async def check_parity(
    client: TritonClient,
    card: ModelCard,
    prompts: PromptBuilder,
    given: Sequence[Sample],
    reference: Path,
    report: Report,
) -> None:
    """Compare features and visual tokens by cosine, and greedy answers token by token."""
    names = ("vision_encoder", "relevance_allocator", "qformer")
    fp32 = feeds(given, {name: reference / name / "1" / "model.onnx" for name in names}, prompts, kept=len(given))
    budgets = [Budget(tuple(row[:2]), tuple(row[2:])) for row in fp32["relevance_allocator"]["budget"].tolist()]
    ours: dict[str, list[Array]] = {"features": [], "visual_tokens": []}
    answers, twice = list[list[int]](), list[list[int]]()
    for (pixels, text), budget in zip(given, budgets, strict=True):
        vision, seen = await client.see(pixels, prompts.question(text), budget, TIMEOUT_S)
        ours["features"].append(np.asarray(vision.features))
        ours["visual_tokens"].append(seen.visual_tokens)
        image = (seen.visual_tokens, vision_key(pixels, budget))
        answers.append(await answer(client, card, prompts.compose(text, [image])))
        if card.clip_weights:
            twice.append(await answer(client, card, prompts.compose(text, [image] * 2)))
    theirs = {"features": fp32["relevance_allocator"]["features"], "visual_tokens": fp32["llm"]["visual_tokens"]}
    for name, rows in ours.items():
        near = nearness(np.stack(rows), theirs[name])
        report.measured[f"{name}_parity"] = near.as_json()
        with report.check(f"{name} are those of FP32"):
            if near.least_cosine < LEAST_COSINE[card.float_type]:
                raise Wrong(f"least cosine is {near.least_cosine:.5f}, below {LEAST_COSINE[card.float_type]}")
    if not (reference / "llm" / "1" / "model.onnx").exists():
        report.not_run("answers are those of FP32", "the reference has no ONNX graph of the LLM")
        return
    visual = theirs["visual_tokens"]
    expected = reference_answers(reference, LLM_GRAPH, card, prompts, given, visual)
    report.measured["answers_agree"] = same = agreeing(answers, expected)
    with report.check("answers are those of FP32"):
        require_agreement(same)
    if card.clip_weights:
        expected = reference_answers(reference, LLM_CLIPS, card, prompts, given, np.concatenate([visual] * 2, axis=1))
        report.measured["answers_about_two_images_agree"] = same = agreeing(twice, expected)
        with report.check("answers about two images are those of FP32"):
            require_agreement(same)


def agreeing(answers: Sequence[list[int]], expected: Sequence[list[int]]) -> float:
    return sum(a == b for a, b in zip(answers, expected, strict=True)) / len(expected)


def require_agreement(share: float) -> None:
    """Raises Wrong."""
    if share < LEAST_AGREEMENT:
        raise Wrong(f"{share:.0%} of the answers agree, fewer than {LEAST_AGREEMENT:.0%}")


def vision_key(pixels: Array, budget: Budget) -> bytes:
    return pixels.tobytes() + budget.to_array().tobytes()


async def answer(client: TritonClient, card: ModelCard, prompt: Prompt) -> list[int]:
    """A greedy answer of at most ANSWER_TOKENS, without the end id."""
    tokens: list[int] = []
    async with aclosing(stream(client, card, prompt)) as pieces:
        async for piece in pieces:
            tokens.extend(piece)
    return tokens[:-1] if tokens[-1:] == [card.end_id] else tokens


def stream(
    client: TritonClient, card: ModelCard, prompt: Prompt, tokens: int = ANSWER_TOKENS, end_id: int | None = None
) -> Any:
    generation = Generation(
        prompt, Sampling(max_tokens=tokens), end_id=card.end_id if end_id is None else end_id, pad_id=card.pad_id,
        request_id=f"verify-{time.monotonic_ns()}", stall_timeout_s=TIMEOUT_S,
    )  # fmt: skip
    return client.generate(generation, TIMEOUT_S)


def reference_answers(
    reference: Path, graph: str, card: ModelCard, prompts: PromptBuilder, given: Sequence[Sample], visual: Array
) -> list[list[int]]:
    llm = session(reference / "llm" / "1" / graph)
    encoder = reader_of(card, file_beside_llm(reference, TEXT_ENCODER))
    return [
        greedy(llm, rows, np.array(prompts.text_ids(text)), ANSWER_TOKENS, card.end_id, encoder)
        for (_, text), rows in zip(given, visual, strict=True)
    ]


async def encoder_times(
    client: TritonClient, served: Served, given: Sequence[Sample], most: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds by number of images, for the client and for computing alone.

    Triton counts the computing. `most` is the images of one run; more are sent in several concurrent requests.
    """
    found = {}
    for batch in BATCHES:
        images = np.stack([given[row % len(given)][0] for row in range(batch)])
        requests = [images[first : first + most] for first in range(0, batch, most)]
        await encode(client, requests)
        before, times = await computing(served.vision_url, "vision_encoder"), []
        for _ in tqdm(range(served.repeats), desc=f"encoder, batch {batch}", leave=False):
            started = time.perf_counter()
            await encode(client, requests)
            times.append(1000 * (time.perf_counter() - started))
        nanoseconds = await computing(served.vision_url, "vision_encoder") - before
        found[str(batch)] = {
            "median": statistics.median(times),
            "fastest": min(times),
            "computing": nanoseconds / 1e6 / served.repeats,
        }
    return found


async def encode(client: TritonClient, requests: Sequence[Array]) -> None:
    """Send all requests at once."""
    await asyncio.gather(*(client.encode(images, TIMEOUT_S) for images in requests))


async def computing(url: str, model: str) -> int:
    """Nanoseconds of all runs so far, by Triton's statistics."""
    async with grpc.aio.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        told = await stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=model))
    return int(told.model_stats[0].inference_stats.compute_infer.ns)


async def chain_times(
    client: TritonClient, card: ModelCard, prompts: PromptBuilder, given: Sequence[Sample], repeats: int
) -> dict[str, float]:
    """Measure milliseconds to the first token and between tokens, and answers a second.

    The milliseconds are with one request at a time, the answers a second with eight.
    """
    first, between = [], []
    budget = Budget(card.vision_tokens, (card.visual_tokens[0],) * 2)

    async def ask(turn: int) -> None:
        pixels, text = given[turn % len(given)]
        started = time.perf_counter()
        _, seen = await client.see(pixels, prompts.question(text), budget, TIMEOUT_S)
        prompt = prompts.compose(text, [(seen.visual_tokens, vision_key(pixels, budget))])
        last = None
        async with aclosing(stream(client, card, prompt, end_id=-1)) as pieces:  # as many tokens as requested
            async for _ in pieces:
                now = time.perf_counter()
                (first if last is None else between).append(1000 * (now - (started if last is None else last)))
                last = now

    for turn in range(repeats):
        await ask(turn)
    alone = {"first_token_ms": statistics.median(first), "between_tokens_ms": statistics.median(between or [0.0])}
    started = time.perf_counter()
    for turn in range(0, repeats, 8):
        await asyncio.gather(*(ask(turn + caller) for caller in range(8)))
    rounds = -(-repeats // 8)
    return alone | {"answers_per_s_at_8": 8 * rounds / (time.perf_counter() - started)}


def gpu_memory(metrics_url: str | None) -> dict[str, float] | None:
    """Bytes in use by GPU, from Triton's metrics; None if they list no GPU."""
    if metrics_url is None:
        return None
    with urllib.request.urlopen(metrics_url, timeout=10) as response:
        text = response.read().decode()
    found = re.findall(r'nv_gpu_memory_used_bytes\{gpu_uuid="([^"]+)"\} (\S+)', text)
    return {uuid: float(count) for uuid, count in found} or None
