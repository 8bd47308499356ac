"""A clip resampler serves in a real Triton: what PyTorch gives, for any number of frames, and a gateway in front."""

from __future__ import annotations

import asyncio
from io import BytesIO

import httpx
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from build_engines.model.checkpoint import Checkpoint
from service.core.request import Budget
from service.core.vision import VisionFeatures
from service.media.decoder import ImageLimits, decode
from service.text.prompt import PromptBuilder
from service.triton import TritonClient
from tests.support.paths import PROJECT, SCENES
from tests.support.servers import Gateway

pytestmark = pytest.mark.slow

TIMEOUT_S = 60.0
QUESTION = "what changed colour?"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.load(PROJECT / "reference")


def scenes(count: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted(SCENES.glob("new_*.webp"))[:count]]


def film(count: int) -> bytes:
    pictures = [Pillow.open(BytesIO(scene)).convert("RGB") for scene in scenes(count)]
    out = BytesIO()
    pictures[0].save(out, "WEBP", save_all=True, append_images=pictures[1:], duration=100, lossless=True)
    return out.getvalue()


async def features(client: TritonClient, count: int) -> list[VisionFeatures]:
    pixels = np.stack([decode(scene, ImageLimits()).pixels for scene in scenes(count)])
    return [each for start in range(0, count, 8) for each in await client.encode(pixels[start : start + 8], TIMEOUT_S)]


async def test_triton_gives_what_pytorch_gives(
    checkpoint: Checkpoint, client: TritonClient, prompts: PromptBuilder
) -> None:
    question = prompts.question(QUESTION)
    attention = checkpoint.clip_attention()
    assert attention is not None
    every = await features(client, 32)
    for count, most in ((1, 256), (4, 256), (8, 100), (32, 256)):
        times = np.linspace(0, 1, count).tolist()
        seen = await client.attend_clip(every[:count], times, question, Budget((64, most)), TIMEOUT_S)
        stacked = [np.stack([getattr(each, name) for each in every[:count]])
                   for name in ("features", "saliency", "entropy", "texture")]  # fmt: skip
        with torch.no_grad():
            visual, relevance, scores, levels, tensions = attention(
                *map(torch.from_numpy, stacked),
                torch.tensor(times),
                torch.from_numpy(question.ids),
                torch.from_numpy(question.mask),
                torch.tensor([64, most], dtype=torch.int32),
            )
        assert np.abs(seen.visual_tokens - visual.numpy()).max() < 1e-3
        assert len(seen.frames) == count
        for frame, place in zip(seen.frames, range(count), strict=True):
            assert np.abs(frame.map.ravel() - relevance[place].numpy()).max() < 1e-4
            assert np.abs(frame.scores.reshape(3, 256) - scores[place].numpy()).max() < 1e-4
            assert np.array_equal(frame.levels.ravel(), levels[place].numpy())
            assert np.abs(frame.tensions - tensions.numpy()).max() < 1e-4
        assert 64 <= seen.vision_tokens <= most


async def test_the_gateway_reads_a_whole_clip_in_64_visual_tokens(gateway: Gateway) -> None:
    async with httpx.AsyncClient(base_url=gateway.url, timeout=TIMEOUT_S) as http:

        async def asked(question: str, frames: int) -> dict:
            body = {"question": question, "max_tokens": "8", "video_frames": str(frames), "explain": "true"}
            return (await http.post("/v1/vqa", files={"video": film(32)}, data=body)).raise_for_status().json()

        first = await asked(QUESTION, 32)
        assert first["usage"]["image_tokens"] == 64
        assert first["vision"]["cache"] == "miss"
        assert [frame["index"] for frame in first["vision"]["frames"]] == list(range(32))
        assert 64 <= first["vision"]["vision_tokens"] <= 256
        assert all(len(frame["relevance"]["map"]) == 16 for frame in first["vision"]["frames"])
        questions = ["what vanished?", "how many objects are there?", "which way did the square move?"]
        told = await asyncio.gather(*(asked(question, 32) for question in questions))
        assert {each["vision"]["cache"] for each in told} == {"hit"}
        assert (await http.get("/health/ready")).status_code == 200
        known = await asked(QUESTION, 8)
        assert len(known["vision"]["frames"]) == 8
        assert known["usage"]["image_tokens"] == 64
