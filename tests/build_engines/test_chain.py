"""The served chain against transformers: at full budget with one query group, token for token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, GenerationConfig

from service.core.card import ModelCard
from service.core.models import Generation
from service.core.request import Budget, Sampling
from service.media.decoder import ImageLimits, decode
from service.text.prompt import PromptBuilder
from service.triton import TritonClient
from tests.support.paths import PROJECT, SCENES

pytestmark = pytest.mark.asyncio(loop_scope="session")

REFERENCE = PROJECT / "reference"
FULL = Budget(vision_tokens=(256, 256), visual_tokens=(32, 32))
LONGEST = 48  # tokens of a description


class Transformers:
    """The checkpoint as anybody would run it: Blip2ForConditionalGeneration, its tokenizer, its preprocessor."""

    def __init__(self) -> None:
        self.model = Blip2ForConditionalGeneration.from_pretrained(REFERENCE, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(REFERENCE)
        preprocessor = json.loads((REFERENCE / "preprocessor_config.json").read_text())
        self.mean, self.std = (np.array(preprocessor[key], np.float32) for key in ("image_mean", "image_std"))

    def answer(self, image: Path, question: str) -> list[int]:
        """The new tokens of a greedy answer, `</s>` included where it comes."""
        with Image.open(image) as picture:
            seen = picture.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)  # some are larger
        pixels = np.asarray(seen, np.float32)
        values = torch.from_numpy((pixels / 255 - self.mean) / self.std).permute(2, 0, 1).unsqueeze(0)
        text = self.tokenizer(f"Question: {question} Answer:")["input_ids"]
        visual = [self.model.config.image_token_id] * self.model.config.num_query_tokens
        greedy = GenerationConfig(max_new_tokens=LONGEST, do_sample=False, pad_token_id=1, eos_token_id=2)
        given = torch.tensor([visual + text])
        said = self.model.generate(
            pixel_values=values, input_ids=given, attention_mask=torch.ones_like(given), generation_config=greedy
        )
        return said[0, given.shape[1] :].tolist()


@pytest.fixture(scope="module")
def transformers() -> Transformers:
    return Transformers()


def asked() -> list[tuple[str, str]]:
    """Every 60th committed question, and some descriptions, whose answers are long."""
    rows = [json.loads(line) for line in (SCENES / "questions.jsonl").read_text().splitlines()]
    short = [(row["image"], row["question"]) for row in rows[::60]]
    return short + [(image, "describe the image") for image, _ in short[::6]]


async def test_served_tokens_are_those_of_transformers(
    client: TritonClient, prompts: PromptBuilder, card: ModelCard, transformers: Transformers
) -> None:
    lengths = []
    for image, question in asked():
        pixels = decode((SCENES / image).read_bytes(), ImageLimits()).pixels
        _, seen = await client.see(pixels, prompts.question(question), FULL, timeout_s=10)
        assert seen.relevance.vision_tokens == 256
        generation = Generation(
            prompts.compose(question, [(seen.visual_tokens, image.encode())]),
            Sampling(max_tokens=LONGEST),
            end_id=card.end_id,
            pad_id=card.pad_id,
            request_id=f"{image} {question}",
            stall_timeout_s=5,
        )
        served = [token async for tokens in client.generate(generation, timeout_s=10) for token in tokens]
        assert served == transformers.answer(SCENES / image, question), (image, question)
        lengths.append(len(served))
    assert max(lengths) > 10  # the descriptions went through the KV cache many times
