"""Turn each response's token ids into raw bytes: the `finish` step of `vqa`.

A character may be split over two responses, and max_tokens may cut the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.text.prompt import load_tokenizer, token_bytes
from triton_models.parameters import Parameters
from triton_models.session import Array
from triton_models.unary import answer


class TritonPythonModel:
    """Read the repository's card.json and tokenizer.json. The end id and special tokens have no bytes."""

    def initialize(self, args: Mapping[str, str]) -> None:
        parameters = Parameters(args)
        self._bytes = dict(enumerate(token_bytes(load_tokenizer(parameters.repository / "tokenizer.json"))))
        self._bytes[parameters.card().end_id] = b""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        # One at a time: their lengths differ.
        return [response for request in requests for response in answer([request], self._infer)]

    def _infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """output_ids [1, 1 beam, new tokens] -> answer uint8 [1, bytes]."""
        spoken = b"".join(self._bytes.get(token, b"") for token in inputs["output_ids"].ravel().tolist())
        return {"answer": np.frombuffer(spoken, np.uint8)[np.newaxis]}
