"""Stand where TensorRT-LLM's backend does, behind gRPC: it answers as that one's sources say, and computes nothing.

Sources, of 1.2.1: `fillTritonResponse` of triton_backend's model_instance_state.cc (outputs that must be requested, and
errors), `createResult` of llmRequest.cpp (new tokens, all log probabilities so far), `updateRequests` of
trtGptModelInflightBatching.cpp (no end token, no log probability of it), `validate` of promptTuningBuffers.cpp and
`enqueueRequests` of executorImpl.cpp.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from service.core.tensors import DTYPES

REQUIRED = ("output_ids", "sequence_length")
QUEUE_IS_FULL = "[TensorRT-LLM][ERROR] Maximum queue size of 64 has been reached, please try again later"


def log_prob(place: int) -> float:
    """Of the answer's token at that place."""
    return -(place + 1) / 4


class TensorRtLlm(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Says `tokens`, and then the end token of each request, unless its most tokens come first."""

    def __init__(self, tokens: Sequence[int] = (), *, most_visual_tokens: int = 512) -> None:
        self.tokens = list(tokens)
        self.most_visual_tokens = most_visual_tokens
        self.is_full = False
        self.asked: list[dict[str, Any]] = []  # the inputs of each request

    async def ModelStreamInfer(self, requests, context):
        async for request in requests:
            for answer in self._answers(request):
                yield answer

    def _answers(self, request: service_pb2.ModelInferRequest) -> Iterator[service_pb2.ModelStreamInferResponse]:
        given = inputs(request)
        self.asked.append(given)
        if self.is_full:
            yield failed(QUEUE_IS_FULL)
            return
        if (rows := given["prompt_vocab_size"].item()) > self.most_visual_tokens:
            yield failed(
                "Executor failed process requestId 1 due to the following error: Encountered an error in forwardAsync "
                f"function: Prompt vocab size{rows} is larger than max prompt vocab size of {self.most_visual_tokens}. "
            )
            return
        wanted = [output.name for output in request.outputs]
        if missing := [name for name in REQUIRED if name not in wanted]:
            yield failed(
                "Error encountered while populating response: [TensorRT-LLM][ERROR] "
                f"{missing[0]} tensor must be present in list of output tensors"
            )
            return
        tells = "output_log_probs" in wanted and "return_log_probs" in given
        for new, so_far, is_final in self._parts(given):
            yield response(new, [log_prob(place) for place in range(so_far)] if tells else None, is_final)

    def _parts(self, given: dict[str, Any]) -> Iterator[tuple[list[int], int, bool]]:
        """Yield each response's new tokens, the tokens so far, and whether it is the last."""
        most = given["request_output_len"].item()
        said = self.tokens[:most]
        if not given["streaming"].item():
            yield said, len(said), True
            return
        for place, token in enumerate(said):
            yield [token], place + 1, place + 1 == most
        if len(said) < most:  # the step that draws the end token adds none
            yield [], len(said), True


def inputs(request: service_pb2.ModelInferRequest) -> dict[str, Any]:
    """Read the inputs by name; a string's bytes as they are."""
    return {
        tensor.name: content if tensor.datatype == "BYTES" else np.frombuffer(content, DTYPES[tensor.datatype])
        for tensor, content in zip(request.inputs, request.raw_input_contents, strict=True)
    }


def response(
    new: Sequence[int], log_probs: Sequence[float] | None, is_final: bool
) -> service_pb2.ModelStreamInferResponse:
    """Make a response of one beam."""
    told = service_pb2.ModelInferResponse(model_name="llm")
    told.parameters["triton_final_response"].bool_param = is_final
    tensors = {"output_ids": np.array([[new]], np.int32), "sequence_length": np.array([[len(new)]], np.int32)}
    if log_probs is not None:
        tensors["output_log_probs"] = np.array([[log_probs]], np.float32)
    for name, array in tensors.items():
        datatype = "FP32" if array.dtype == np.float32 else "INT32"
        told.outputs.add(name=name, datatype=datatype, shape=array.shape)
        told.raw_output_contents.append(array.tobytes())
    return service_pb2.ModelStreamInferResponse(infer_response=told)


def failed(text: str) -> service_pb2.ModelStreamInferResponse:
    return service_pb2.ModelStreamInferResponse(error_message=text)


@asynccontextmanager
async def listening(model: TensorRtLlm) -> AsyncIterator[str]:
    """Serve for the block, and give the address."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(model, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
