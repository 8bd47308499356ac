"""Turn image bytes and question text into model inputs: the `prepare` step of `vqa`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.core.errors import InvalidRequest
from service.core.request import Budget
from service.media.decoder import ImageLimits, decode
from service.text.prompt import PromptBuilder
from triton_models.parameters import Parameters
from triton_models.session import Array
from triton_models.unary import answer

MAX_QUESTION_CHARS = 2_000  # the gateway's default
BYTES_PER_CHAR = 4  # of UTF-8, at most


class TritonPythonModel:
    """Read the repository's card.json and the tokenizers that it names."""

    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = Parameters(args)
        card = parameters.card()
        self._prompts = PromptBuilder.load(card, parameters.repository)
        self._budget = Budget(card.unasked_vision_tokens("low"), card.default_visual_tokens).to_array()
        self._limits = ImageLimits()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [response for request in requests for response in answer([request], self._infer)]

    def _infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if len(inputs["image_bytes"]) != 1 or len(inputs["question"]) != 1:
            raise InvalidRequest("vqa takes one image and one question: send one request for each", param="question")
        text = _text(inputs["question"].tobytes())
        question = self._prompts.question(text)
        return {
            "image": decode(inputs["image_bytes"].tobytes(), self._limits).pixels[np.newaxis],
            "question_ids": question.ids[np.newaxis],
            "question_mask": question.mask[np.newaxis],
            "budget": self._budget[np.newaxis],
            "prompt_ids": np.array([self._prompts.text_ids(text)], np.int32),
        }


def _text(question: bytes) -> str:
    if len(question) > BYTES_PER_CHAR * MAX_QUESTION_CHARS:  # before it is decoded
        raise InvalidRequest(
            f"the question has {len(question):,} bytes: shorten it to {MAX_QUESTION_CHARS:,} characters",
            param="question",
        )
    try:
        text = question.decode()
    except UnicodeDecodeError as exc:
        raise InvalidRequest("the question is not UTF-8: encode the text as UTF-8", param="question") from exc
    if len(text) > MAX_QUESTION_CHARS:
        raise InvalidRequest(
            f"the question has {len(text):,} characters: shorten it to {MAX_QUESTION_CHARS:,}", param="question"
        )
    if not text.strip():
        raise InvalidRequest("the question is empty: say what you want to know", param="question")
    return text
