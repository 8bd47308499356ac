"""Build the LLM's inputs from visual tokens and prompt ids: the `compose` step of `vqa`.

It runs after the Q-Former, because only then is the number of visual tokens known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from service.core.errors import InternalError, InvalidRequest
from service.core.request import Sampling
from service.text.prompt import place_of_image, visual_token_ids
from triton_models.parameters import Parameters
from triton_models.session import Array
from triton_models.unary import answer


class TritonPythonModel:
    """Read the repository's card.json; absent sampling inputs take the defaults of `Sampling`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        self._card = Parameters(args).card()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [response for request in requests for response in answer([request], self._infer)]

    def _infer(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if inputs["visual_count"].size != 1:
            raise InvalidRequest("vqa takes one image and one question: send one request for each", param="question")
        count, most = int(inputs["visual_count"].item()), inputs["visual_tokens"].shape[1]
        if not 1 <= count <= most:
            raise InvalidRequest(
                f"visual_count is {count}, but visual_tokens has {most} rows: send 1 to {most}", param="visual_count"
            )
        visual = inputs["visual_tokens"][:, :count]
        if not np.isfinite(visual).all():  # the LLM would blame the client
            raise InternalError("the vision models gave numbers that are not finite: try another image")
        text_ids = inputs["prompt_ids"][0]
        first, place = self._card.vocab_size, place_of_image(self._card, text_ids)
        extra_ids = np.zeros(count + text_ids.size, np.uint64)
        extra_ids[place : place + count] = visual_token_ids(visual.tobytes(), count)
        default = Sampling()
        return {
            "input_ids": np.insert(text_ids, place, np.arange(first, first + count))[np.newaxis],
            "input_lengths": np.array([[extra_ids.size]], np.int32),
            "request_output_len": inputs.get("max_tokens", np.array([[default.max_tokens]], np.int32)),
            "prompt_embedding_table": visual,
            "prompt_vocab_size": np.array([[count]], np.int32),
            "prompt_table_extra_ids": extra_ids[np.newaxis],
            "end_id": np.array([[self._card.end_id]], np.int32),
            "pad_id": np.array([[self._card.pad_id]], np.int32),
            "streaming": np.array([[True]]),
            "temperature": inputs.get("temperature", np.array([[default.temperature]], np.float32)),
            "runtime_top_k": inputs.get("top_k", np.array([[default.top_k]], np.int32)),
            "runtime_top_p": inputs.get("top_p", np.array([[default.top_p]], np.float32)),
            "seed": inputs.get("seed", np.array([[default.seed]], np.uint64)),
            "repetition_penalty": np.array([[default.repetition_penalty]], np.float32),
        }
