"""Answer with a BLIP-2 checkpoint in transformers, for the two PyTorch systems."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, BlipImageProcessor

from build_engines.model.checkpoint import PROMPT


class TorchModel:
    """Answer greedily with a whole checkpoint in FP32 on the CPU."""

    def __init__(
        self, model: Blip2ForConditionalGeneration, tokenizer: AutoTokenizer, images: BlipImageProcessor
    ) -> None:
        self._model, self._tokenizer, self._images = model, tokenizer, images
        self._image_ids = [model.config.image_token_index] * model.config.num_query_tokens

    @classmethod
    def load(cls, checkpoint: Path | str) -> Self:
        model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        return cls(model, tokenizer, BlipImageProcessor.from_pretrained(checkpoint))

    @torch.inference_mode()
    def answer(self, images: Sequence[bytes], questions: Sequence[str], max_tokens: int) -> list[tuple[str, int]]:
        """Answer one batch -> each answer's text and number of tokens.

        Prompts are padded on the left, as `generate` requires.
        """
        opened = [Image.open(io.BytesIO(image)).convert("RGB") for image in images]
        rows = [self._image_ids + self._tokenizer(PROMPT.format(question=question)).input_ids for question in questions]
        longest = max(len(row) for row in rows)
        padding = self._tokenizer.pad_token_id
        said = self._model.generate(
            pixel_values=self._images(opened, return_tensors="pt").pixel_values,
            input_ids=torch.tensor([[padding] * (longest - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        answers = [self._until_end(ids) for ids in said[:, longest:].tolist()]
        return [(self._tokenizer.decode(ids, skip_special_tokens=True), len(ids)) for ids in answers]

    def _until_end(self, ids: list[int]) -> list[int]:
        """Cut off the end token and the padding after it."""
        end = self._model.generation_config.eos_token_id
        return ids[: ids.index(end)] if end in ids else ids
