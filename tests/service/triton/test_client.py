"""The client against a real Triton: see, attend, generate, and every way they fail."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import grpc
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from service.core.answer import LogProb
from service.core.card import ModelCard
from service.core.errors import (
    Cancelled,
    DeadlineExceeded,
    GlimpseError,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from service.core.guide import guide_of
from service.core.models import Generation
from service.core.prompt import Prompt, Question
from service.core.request import Budget, Sampling
from service.core.tensors import DTYPES
from service.core.vision import (
    CROPS,
    IMAGE_SIZE,
    MAX_VISION_TOKENS,
    CloserFeatures,
    Int8Rows,
    Seen,
    UInt8Array,
    VisionFeatures,
)
from service.text.prompt import PromptBuilder
from service.triton import CALLED, TritonClient
from service.triton.errors import ERROR_CODES, ERROR_TEXTS, MESSAGES, translate
from service.triton_server.supervision import EmbeddedTriton
from tests.support.servers import eventually_async, free_ports
from triton_models.gauges import PERIOD_S

pytestmark = pytest.mark.asyncio(loop_scope="session")

QUESTION = "what colour is the small circle?"
NEVER = -1  # an end id that the model cannot generate
# An answer alone comes to more states of this constraint than a guide may have: counts by letters.
TOO_COMPLEX = {"aeiou": 200, "bcdfg": 190, "hjklm": 180, "npqrs": 170, "tvwx": 160}


class Asker:
    """Prompts and generations for one card."""

    def __init__(self, client: TritonClient, prompts: PromptBuilder, card: ModelCard) -> None:
        self.client = client
        self.card = card
        self.prompts = prompts

    def prompt(self, question: str = QUESTION, visual_tokens: int = 32) -> Prompt:
        table = np.linspace(-1, 1, visual_tokens * self.card.hidden_size, dtype=np.float32)
        return self.prompts.compose(question, [(table.reshape(visual_tokens, -1), b"a test's image")])

    def room(self) -> int:
        """The longest answer that fits behind `prompt()`."""
        return self.card.max_positions - self.prompt().input_ids.size

    def generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        timeout_s: float = 20,
        stall_timeout_s: float = 5,
        log_probs: list[LogProb] | None = None,
        end_id: int = NEVER,
    ):
        generation = Generation(
            prompt,
            sampling,
            end_id=end_id,
            pad_id=self.card.pad_id,
            request_id=f"test-{time.monotonic_ns()}",
            stall_timeout_s=stall_timeout_s,
            log_probs=log_probs,
        )
        return self.client.generate(generation, timeout_s)

    async def tokens(self, prompt: Prompt, sampling: Sampling) -> list[int]:
        return [token async for tokens in self.generate(prompt, sampling) for token in tokens]


@pytest.fixture
def asker(client: TritonClient, prompts: PromptBuilder, card: ModelCard) -> Asker:
    return Asker(client, prompts, card)


async def look(
    client: TritonClient, prompts: PromptBuilder, pixels: UInt8Array, budget: Budget
) -> tuple[VisionFeatures, Seen]:
    return await client.see(pixels, prompts.question(QUESTION), budget, timeout_s=10)


async def test_see_gives_visual_tokens_relevance_and_features(
    client: TritonClient, prompts: PromptBuilder, pixels: UInt8Array, card: ModelCard
) -> None:
    vision, seen = await look(client, prompts, pixels, Budget((100, 100), (32, 32)))
    assert seen.visual_tokens.shape == (32, card.hidden_size)
    assert vision.features.shape == (257, card.vision_width)
    assert vision.saliency.shape == vision.entropy.shape == (256,)
    assert vision.texture.shape == (13, 16, 16)
    assert seen.relevance.map.shape == (16, 16)
    assert seen.relevance.scores.shape == (3, 16, 16)
    assert seen.relevance.levels.shape == (8, 8)
    assert seen.relevance.tensions.shape == (3,)
    assert 0 <= seen.relevance.map.min() <= seen.relevance.map.max() <= 1
    assert 64 <= seen.relevance.vision_tokens <= 100


async def test_attend_on_cached_features_is_what_see_saw(
    client: TritonClient, prompts: PromptBuilder, pixels: UInt8Array
) -> None:
    budget = Budget((64, 256), (32, 32))
    vision, seen = await look(client, prompts, pixels, budget)
    again = await client.attend(vision, prompts.question(QUESTION), budget, timeout_s=10)
    np.testing.assert_array_equal(again.visual_tokens, seen.visual_tokens)
    np.testing.assert_array_equal(again.relevance.map, seen.relevance.map)


async def test_a_batch_of_crops_is_encoded_as_each_of_them_alone(
    client: TritonClient, pixels: UInt8Array, card: ModelCard
) -> None:
    crops = np.stack([pixels, pixels[:, ::-1], pixels[::-1], 255 - pixels])
    encoded = await client.encode(crops, timeout_s=20)
    assert len(encoded) == 4
    for crop, features in zip(crops, encoded, strict=True):
        (alone,) = await client.encode(crop[np.newaxis], timeout_s=20)
        for name, shape in card.feature_shapes[IMAGE_SIZE].items():
            assert getattr(features, name).shape == shape
            np.testing.assert_allclose(getattr(features, name), getattr(alone, name), atol=1e-3)


async def test_see_and_encode_find_the_same(client: TritonClient, prompts: PromptBuilder, pixels: UInt8Array) -> None:
    """To the bit: what either finds is kept under one key."""
    seen, _ = await look(client, prompts, pixels, Budget())
    (encoded,) = await client.encode(pixels[np.newaxis], timeout_s=20)
    np.testing.assert_array_equal(encoded.features, seen.features)
    np.testing.assert_array_equal(encoded.texture, seen.texture)


async def test_the_closer_view_gives_cells_at_level_two(
    client: TritonClient, prompts: PromptBuilder, pixels: UInt8Array, card: ModelCard
) -> None:
    if not card.closer_view:
        pytest.skip(f"{card.name} has no closer view")
    (vision,) = await client.encode(pixels[np.newaxis], timeout_s=20)
    closer = CloserFeatures.joined(await client.encode(np.stack([pixels] * CROPS), timeout_s=20))
    budget = Budget((MAX_VISION_TOKENS, MAX_VISION_TOKENS))
    seen = await client.attend(vision, prompts.question(QUESTION), budget, timeout_s=20, closer=closer)
    assert seen.detail == "high"
    assert seen.relevance.levels.max() == 2
    assert MAX_VISION_TOKENS - 12 < seen.relevance.vision_tokens <= MAX_VISION_TOKENS
    assert seen.visual_tokens.shape[1] == card.hidden_size


async def test_generate_streams_as_many_tokens_as_asked(asker: Asker) -> None:
    pieces = [tokens async for tokens in asker.generate(asker.prompt(), Sampling(max_tokens=7))]
    assert len(pieces[0]) == 1  # the first is never late; how many come together then is a matter of time
    assert sum(map(len, pieces)) == 7
    assert all(0 <= token < asker.card.vocab_size for tokens in pieces for token in tokens)


@pytest.mark.parametrize("streaming", [True, False])
async def test_each_token_comes_with_its_log_probability_if_asked(asker: Asker, streaming: bool) -> None:
    sampling = Sampling(max_tokens=7, streaming=streaming)
    told: list[LogProb] = []
    lengths, tokens = [], []
    asked = replace(sampling, log_probs=True, top_log_probs=5)
    async for piece in asker.generate(asker.prompt(), asked, log_probs=told):
        tokens += piece
        lengths.append((len(tokens), len(told)))
    assert all(said == explained for said, explained in lengths)
    assert (lengths[0], lengths[-1]) == ((1, 1) if streaming else (7, 7), (7, 7))
    assert all(-50 < each.value <= 0 for each in told)
    assert [each.top[0] for each in told] == [(token, each.value) for token, each in zip(tokens, told, strict=True)]
    assert [len(each.top) for each in told] == [5] * 7
    assert tokens == await asker.tokens(asker.prompt(), sampling)


async def test_the_prompt_chooses_the_weights_that_answer_it(asker: Asker) -> None:
    assert asker.card.clip_weights
    sure = []
    for clips in (False, True, False):
        told: list[LogProb] = []
        async for _ in asker.generate(
            replace(asker.prompt(), clip_weights=clips), Sampling(max_tokens=1, log_probs=True), log_probs=told
        ):
            pass
        sure.append(told[0].value)
    assert sure[0] == pytest.approx(sure[2], abs=1e-4)
    assert abs(sure[0] - sure[1]) > 0.01


async def test_greedy_and_seeded_answers_repeat(asker: Asker) -> None:
    greedy = Sampling(max_tokens=8)
    drawn = Sampling(max_tokens=8, temperature=9.0, top_k=50, top_p=0.95, seed=7, repetition_penalty=1.2)
    for sampling in (greedy, drawn):
        assert await asker.tokens(asker.prompt(), sampling) == await asker.tokens(asker.prompt(), sampling)
    other_seeds = [await asker.tokens(asker.prompt(), replace(drawn, seed=seed)) for seed in range(4)]
    assert len(set(map(tuple, other_seeds))) > 1


async def test_end_id_is_the_last_token(asker: Asker) -> None:
    first, *_ = await asker.tokens(asker.prompt(), Sampling(max_tokens=1))
    generation = Generation(
        asker.prompt(),
        Sampling(max_tokens=8),
        end_id=first,
        pad_id=asker.card.pad_id,
        request_id="ends",
        stall_timeout_s=5,
    )
    assert [piece async for piece in asker.client.generate(generation, timeout_s=10)] == [(first,)]


def inconsistent(prompt: Prompt) -> dict[str, Prompt]:
    """Prompts of two visual tokens or more, each wrong in one way."""
    ids, extra, table = prompt.input_ids, prompt.extra_ids, prompt.visual_tokens
    other = extra.copy()
    other[1] = other[0]
    unnamed = extra.copy()
    unnamed[1] = 0
    twice = ids.copy()
    twice[1] = twice[0]
    return {
        "extra ids for": replace(prompt, extra_ids=extra[:-1]),
        "do not name the 3 rows": replace(prompt, visual_tokens=np.concatenate([table, table[:1]])[:3]),
        "1 visual ids": replace(prompt, extra_ids=unnamed),
        "do not name the 2 rows": replace(prompt, input_ids=twice),
        "has no extra id": replace(prompt, extra_ids=unnamed, visual_tokens=table[:1]),
        "one extra id": replace(prompt, extra_ids=other),
    }


async def test_a_prompt_that_could_mix_up_two_images_is_never_sent(asker: Asker) -> None:
    prompt = asker.prompt(visual_tokens=2)
    for told, wrong in inconsistent(prompt).items():
        with pytest.raises(InternalError, match=told):
            async for _ in asker.generate(wrong, Sampling(max_tokens=1)):
                pass
    same = replace(prompt, visual_tokens=np.repeat(prompt.visual_tokens[:1], 2, axis=0))
    extra = same.extra_ids.copy()
    extra[1] = extra[0]
    assert await asker.tokens(replace(same, extra_ids=extra), Sampling(max_tokens=1))  # one image twice may share


async def test_every_model_can_be_probed(client: TritonClient, card: ModelCard) -> None:
    for model in (*card.called, "vqa"):
        await client.probe(model, card, timeout_s=10)
    with pytest.raises(Unavailable, match="no probe"):
        await client.probe("nothing", card, timeout_s=1)


async def test_a_model_whose_answers_have_no_end_id_can_be_probed(client: TritonClient, card: ModelCard) -> None:
    await client.probe("llm", replace(card, end_id=-1))


async def test_a_probe_that_waits_behind_others_work_is_no_fault(asker: Asker) -> None:
    """All rows are at work and more wait: a probe comes last, and everybody sees that the model lives."""
    at_work = asyncio.Event()
    said = 0

    async def speak() -> None:
        nonlocal said
        async with aclosing(asker.generate(asker.prompt(), Sampling(max_tokens=200), timeout_s=60)) as tokens:
            async for _ in tokens:
                said += 1
                if said >= 40:
                    at_work.set()

    async with asyncio.TaskGroup() as crowd:
        speakers = [crowd.create_task(speak()) for _ in range(50)]
        await at_work.wait()
        with pytest.raises(DeadlineExceeded):
            async with aclosing(asker.generate(asker.prompt(), Sampling(max_tokens=1), timeout_s=0.2)) as tokens:
                await anext(tokens)
        await asker.client.probe("llm", asker.card, timeout_s=0.2)
        for speaker in speakers:
            speaker.cancel()


async def test_too_long_a_request_is_the_callers_mistake(asker: Asker) -> None:
    with pytest.raises(InvalidRequest, match=str(asker.card.max_positions)):
        await asker.tokens(asker.prompt(), Sampling(max_tokens=asker.room() + 1))


async def test_a_tensor_of_the_wrong_shape_is_our_mistake(
    client: TritonClient, prompts: PromptBuilder, asker: Asker
) -> None:
    with pytest.raises(InternalError):
        await look(client, prompts, np.zeros((3, 8, 8), np.uint8), Budget())
    prompt = asker.prompt()
    with pytest.raises(InternalError):
        await asker.tokens(replace(prompt, visual_tokens=prompt.visual_tokens[:, :-1]), Sampling())


async def test_a_full_queue_is_overload(asker: Asker) -> None:
    """Rows and queue of the LLM are finite: enough long answers at once, and some are refused at once."""
    sampling = Sampling(max_tokens=asker.room())
    refused = asyncio.Event()

    async def ask() -> None:
        try:
            async with aclosing(asker.generate(asker.prompt(), sampling)) as tokens:
                async for _ in tokens:
                    if refused.is_set():
                        return
        except Overloaded:
            refused.set()

    await asyncio.gather(*(ask() for _ in range(140)))
    assert refused.is_set()


async def test_the_deadline_ends_see_and_generate(
    client: TritonClient, prompts: PromptBuilder, pixels: UInt8Array, asker: Asker
) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.see(pixels, prompts.question(QUESTION), Budget(), timeout_s=0.0005)
    with pytest.raises(DeadlineExceeded):
        async for _ in asker.generate(asker.prompt(), Sampling(max_tokens=asker.room()), timeout_s=0.02):
            pass
    with pytest.raises(DeadlineExceeded):
        await client.see(pixels, prompts.question(QUESTION), Budget(), timeout_s=-1)
    with pytest.raises(DeadlineExceeded):
        async for _ in asker.generate(asker.prompt(), Sampling(), timeout_s=-1):
            pass


async def test_closing_frees_the_llms_row(asker: Asker, repository: Path) -> None:
    """All rows taken: one more request waits, until one of those decoding is closed; it does not wait for their end."""
    configuration = (repository / "llm" / "config.pbtxt").read_text()
    parsed = text_format.Parse(configuration, model_config_pb2.ModelConfig())
    rows = int(parsed.parameters["max_rows"].string_value)
    started = asyncio.Semaphore(0)

    async def decode() -> None:
        async for _ in asker.generate(asker.prompt(), Sampling(max_tokens=asker.room())):
            started.release()

    decoding = [asyncio.create_task(decode()) for _ in range(rows)]
    try:
        for _ in range(2 * rows):
            await started.acquire()
        waiting = asyncio.create_task(asker.tokens(asker.prompt(), Sampling(max_tokens=1)))
        decoding[0].cancel()
        assert len(await waiting) == 1
        assert not any(task.done() for task in decoding[1:])
    finally:
        for task in decoding:
            task.cancel()
        await asyncio.gather(*decoding, return_exceptions=True)


async def test_the_llm_soon_works_no_more_for_a_closed_stream(asker: Asker, triton: EmbeddedTriton) -> None:
    """Two to four tokens later on a quiet machine. On a busy one the closing itself waits: the bound is wide, yet far
    below the whole answer, and the best of a few tries counts."""

    async def llm(http: httpx.AsyncClient) -> tuple[int, bool]:
        """Tokens generated since the start, and whether nothing runs."""
        text = (await http.get(f"http://127.0.0.1:{triton.access.ports.metrics}/metrics")).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("glimpse_llm_"))
        running = next(value for name, value in values.items() if 'state="running"' in name)
        return int(float(values["glimpse_llm_tokens_total"])), float(running) == 0

    async def settled(http: httpx.AsyncClient, least: int) -> int:
        """The tokens, once nothing runs and they were told again since."""
        since: dict[int, float] = {}

        async def told() -> bool:
            total, idle = await llm(http)
            seen = since.setdefault(total, time.monotonic())
            return idle and total >= least and time.monotonic() - seen > 1.5 * PERIOD_S

        await eventually_async(told, 20, "the LLM's metrics")
        return max(since)

    in_vain: list[int] = []
    async with httpx.AsyncClient() as http:
        before = await settled(http, 0)
        while not in_vain or (min(in_vain) > 64 and len(in_vain) < 5):
            tokens = asker.generate(asker.prompt(), Sampling(max_tokens=asker.room()))
            read = len(await anext(tokens)) + len(await anext(tokens))
            await tokens.aclose()
            after = await settled(http, before + read)
            in_vain.append(after - before - read)
            before = after
    assert 0 <= min(in_vain) <= 64 < asker.room() - 4, in_vain


async def test_a_closed_stream_leaves_nothing_open(asker: Asker) -> None:
    tokens = asker.generate(asker.prompt(), Sampling(max_tokens=asker.room()))
    await anext(tokens)
    await tokens.aclose()
    assert asker.client.in_flight == 0
    finished = asker.generate(asker.prompt(), Sampling(max_tokens=2))
    await anext(finished)
    await anext(finished)  # the final response: the stream now ends by itself, whatever the caller does
    await finished.aclose()
    assert asker.client.in_flight == 0


async def test_cancelling_the_task_is_a_cancellation(asker: Asker) -> None:
    started = asyncio.Event()

    async def ask() -> None:
        async for _ in asker.generate(asker.prompt(), Sampling(max_tokens=asker.room())):
            started.set()

    task = asyncio.create_task(ask())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_abandoned_requests_end_at_once_and_typed(asker: Asker) -> None:
    tokens = asker.generate(asker.prompt(), Sampling(max_tokens=asker.room()))
    await anext(tokens)
    asker.client.abandon("vision_encoder")  # not on the LLM's path
    await anext(tokens)
    asker.client.abandon("llm")
    with pytest.raises(Unavailable, match="llm"):
        async for _ in tokens:
            pass
    assert await asker.tokens(asker.prompt(), Sampling(max_tokens=1))


async def test_nothing_listens() -> None:
    (port,) = free_ports(1)
    card_free = Prompt(np.zeros(1, np.int32), np.zeros((1, 8), np.float32), np.ones(1, np.uint64))
    async with TritonClient(f"127.0.0.1:{port}", f"127.0.0.1:{port}") as client:
        assert not await client.ready()
        with pytest.raises(Unavailable):
            await client.load("llm", timeout_s=2)
        tokens = client.generate(
            Generation(card_free, Sampling(), end_id=0, pad_id=0, request_id="", stall_timeout_s=1), timeout_s=5
        )
        with pytest.raises(Unavailable):
            await anext(tokens)
    with pytest.raises(Unavailable):
        await client.unload("llm")


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton that answers one token, then as told: falls silent, ends without a final response, or fails.

    It may also send less than a token.
    """

    def __init__(self, then: str) -> None:
        self.then = then

    async def ModelStreamInfer(self, requests, context):
        async for _ in requests:
            yield service_pb2.ModelStreamInferResponse(infer_response=token_response())
            match self.then:
                case "silent":
                    await asyncio.Event().wait()
                case "text":
                    yield service_pb2.ModelStreamInferResponse(error_message="Stub process 'llm_0_0' is not healthy.")
                case "half":
                    half = token_response()
                    half.raw_output_contents[0] = half.raw_output_contents[0][:2]
                    yield service_pb2.ModelStreamInferResponse(infer_response=half)
                case "broken":
                    await context.abort(grpc.StatusCode.DATA_LOSS, "wires crossed")


class Patient(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton that sends one token, then waits until it is told to stop. It notes cancelled calls."""

    def __init__(self) -> None:
        self.stopped = asyncio.Event()
        self.asked = asyncio.Event()
        self.ended: asyncio.Queue[str] = asyncio.Queue()

    async def ModelStreamInfer(self, requests, context):
        async for request in requests:
            if any(tensor.name == "stop" for tensor in request.inputs):
                self.stopped.set()
            else:
                yield service_pb2.ModelStreamInferResponse(infer_response=token_response())
                await self._until_stopped("stream")
            final = service_pb2.ModelInferResponse()
            final.parameters["triton_final_response"].bool_param = True
            yield service_pb2.ModelStreamInferResponse(infer_response=final)

    async def ModelInfer(self, request, context):
        await self._until_stopped("unary")
        return service_pb2.ModelInferResponse()

    async def _until_stopped(self, call: str) -> None:
        self.asked.set()
        try:
            await self.stopped.wait()
        except asyncio.CancelledError:
            self.ended.put_nowait(f"{call} cancelled")
            raise
        self.ended.put_nowait(f"{call} ended")


def token_response() -> service_pb2.ModelInferResponse:
    response = service_pb2.ModelInferResponse()
    response.outputs.add(name="output_ids", datatype="INT32", shape=[1, 1, 1])
    response.raw_output_contents.append(np.int32(3).tobytes())
    return response


class OnlyAttends(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton without any other model."""

    def __init__(self, hidden_size: int) -> None:
        self.hidden_size = hidden_size
        self.asked = 0

    async def ModelInfer(self, request, context):
        self.asked += 1
        if request.model_name != "attend":
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.model_name}'")
        response = service_pb2.ModelInferResponse()
        for output in CALLED["attend"].outputs:
            tensor = output.sized("FP32", {"H": self.hidden_size})
            shape = [1, *tensor.dims]
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
            response.raw_output_contents.append(bytes(4 * int(np.prod(shape))))
        return response


class Hollow(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton whose responses lack outputs, or hold bytes that do not fit their shape."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    async def ModelInfer(self, request, context):
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        if self.kind != "empty":
            response.outputs.add(name="visual_count", datatype="INT32", shape=[1, 1])
            response.raw_output_contents.append(bytes(4 if self.kind == "one output" else 3))
        return response


class AttendsClips(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton that attends to clips, and keeps the last request."""

    asked: service_pb2.ModelInferRequest

    async def ModelInfer(self, request, context):
        self.asked = request
        response = service_pb2.ModelInferResponse()
        frames = request.inputs[0].shape[0]
        for output in CALLED["attend_clip"].outputs:
            tensor = output.sized("FP32", {"H": 4})
            shape = [frames if size == -1 else size for size in tensor.dims]
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
            response.raw_output_contents.append(bytes(4 * int(np.prod(shape))))
        return response


class Gives(service_pb2_grpc.GRPCInferenceServiceServicer):
    """A Triton whose vision models give zeros in the shapes of the contract, but for one output, whatever is asked."""

    def __init__(self, changed: str, array: npt.NDArray[Any], float_type: str) -> None:
        self.changed, self.array, self.float_type = changed, array, float_type

    async def ModelInfer(self, request, context):
        model = CALLED[request.model_name]
        response = service_pb2.ModelInferResponse()
        for output in model.outputs:
            tensor = output.sized(self.float_type, {"H": 4, "D": 4})
            dims = (1, *tensor.dims) if model.batched else tuple(abs(size) for size in tensor.dims)
            array = np.zeros(dims, DTYPES[tensor.datatype]) if tensor.name != "visual_count" else np.array([[32]], "i")
            if tensor.name == self.changed:
                array = self.array if self.array.ndim else np.full_like(array, self.array)
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=array.shape)
            response.raw_output_contents.append(array.tobytes())
        return response


BLANK = VisionFeatures(
    np.zeros((257, 4), np.float32), *np.zeros((2, 256), np.float32), np.zeros((13, 16, 16), np.float32)
)
LOOKS: dict[str, Callable[[TritonClient, Question, UInt8Array], Awaitable[object]]] = {
    "see": lambda client, question, pixels: client.see(pixels, question, Budget(), 5),
    "vision_encoder": lambda client, _, pixels: client.encode(pixels[np.newaxis], 5),
    "attend": lambda client, question, _: client.attend(BLANK, question, Budget(), 5),
    "attend_448": lambda client, question, _: client.attend(
        BLANK, question, Budget(), 5, CloserFeatures(np.zeros((1024, 4), np.float32))
    ),
    "attend_clip": lambda client, question, _: client.attend_clip([BLANK], [0.0], question, Budget(), 5),
}


class WatchedRows(Int8Rows):
    """Rows that note which threads made floats of them."""

    threads: ClassVar[set[int]] = set()

    def dense(self):
        self.threads.add(threading.get_ident())
        return super().dense()


@asynccontextmanager
async def served(servicer: service_pb2_grpc.GRPCInferenceServiceServicer) -> AsyncIterator[TritonClient]:
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1)])
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with TritonClient(address, address) as client:
            yield client
    finally:
        await server.stop(None)


@pytest.mark.parametrize("kind", ["empty", "one output", "too few bytes"])
async def test_a_response_without_its_outputs_is_a_model_that_does_not_answer(
    kind: str, card: ModelCard, prompts: PromptBuilder, pixels: UInt8Array
) -> None:
    """As Triton 2.51 sends when a step's process ends meanwhile."""
    async with served(Hollow(kind)) as client:
        with pytest.raises(Unavailable, match="does not answer"):
            await look(client, prompts, pixels, Budget())
        assert client.failing("see")
        with pytest.raises(Unavailable):
            await client.probe("attend", card)


@pytest.mark.parametrize("float_type", ["FP32", "FP16"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 0.0])
@pytest.mark.parametrize(
    ("model", "output"),
    [("see", "features"), ("vision_encoder", "features"),
     *((name, "visual_tokens") for name in ("see", "attend", "attend_448", "attend_clip"))],
)  # fmt: skip
async def test_what_is_not_finite_is_the_services_fault_and_is_not_given_out(
    model: str, output: str, number: float, float_type: str, prompts: PromptBuilder, pixels: UInt8Array
) -> None:
    """The LLM would blame its caller, as often as the features are found in the cache."""
    servicer = Gives(output, np.array(number), float_type)
    async with served(servicer) as client:
        look_at = LOOKS[model](client, prompts.question(QUESTION), pixels)
        if number == 0:
            await look_at
        else:
            with pytest.raises(InternalError, match="not finite"):
                await look_at
        assert not client.failing(model)


@pytest.mark.parametrize(
    ("model", "output", "shape"),
    [
        ("see", "relevance", (1, 100)),
        ("see", "texture", (2, 13, 16, 16)),
        ("attend", "levels", (1, 8, 8)),
        ("attend", "visual_count", (0, 1)),
        ("attend_448", "scores", (1, 3, 64)),
        ("attend_clip", "relevance", (2, 256)),
        ("vision_encoder", "features", (257, 4)),
        ("vision_encoder", "saliency", (1, 196)),
    ],
)
async def test_outputs_of_another_repository_are_a_model_that_does_not_answer(
    model: str, output: str, shape: tuple[int, ...], prompts: PromptBuilder, pixels: UInt8Array
) -> None:
    datatype = np.int32 if output in ("levels", "visual_count") else np.float32
    async with served(Gives(output, np.zeros(shape, datatype), "FP32")) as client:
        with pytest.raises(Unavailable) as caught:
            await LOOKS[model](client, prompts.question(QUESTION), pixels)
        assert output in caught.value.cause or "rows" in caught.value.cause
        assert client.failing(model)


async def test_a_clip_s_megabytes_are_made_beside_the_event_loop(prompts: PromptBuilder) -> None:
    rows = WatchedRows.of(np.linspace(-1, 1, 257 * 1024, dtype=np.float32).reshape(257, -1))
    places = np.linspace(0, 1, 256, dtype=np.float32)
    frame = VisionFeatures(rows, places, places, np.zeros((13, 16, 16), np.float32))
    servicer, question = AttendsClips(), prompts.question(QUESTION)
    async with served(servicer) as client:
        seen = await client.attend_clip([frame] * 8, [0.0, 1.0] * 4, question, Budget((64, 256), (64, 64)), 20)
    assert len(seen.frames) == 8
    assert WatchedRows.threads
    assert threading.get_ident() not in WatchedRows.threads
    sent = dict(zip((tensor.name for tensor in servicer.asked.inputs), servicer.asked.raw_input_contents, strict=True))
    assert sent.keys() == {tensor.name for tensor in CALLED["attend_clip"].inputs}
    np.testing.assert_array_equal(
        np.frombuffer(sent["features"], np.float32).reshape(8, 257, 1024)[5], Int8Rows.dense(rows)
    )
    assert np.frombuffer(sent["clip_budget"], np.int32).tolist() == [64, 256]


async def test_who_stops_listening_cancels_no_call(asker: Asker, prompts: PromptBuilder, pixels: UInt8Array) -> None:
    """A cancel can kill Triton as it answers: a stream is told to stop, and a unary call just ends."""
    servicer = Patient()
    async with served(servicer) as client:
        looking = asyncio.create_task(look(client, prompts, pixels, Budget()))
        await servicer.asked.wait()
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
        lonely = Asker(client, prompts, asker.card)
        tokens = lonely.generate(lonely.prompt(), Sampling())
        await anext(tokens)
        await tokens.aclose()
        assert client.in_flight == 0
        assert {await servicer.ended.get() for _ in range(2)} == {"unary ended", "stream ended"}


async def test_who_shares_a_step_with_others_that_answer_is_probed_all_the_same(card: ModelCard) -> None:
    async with served(OnlyAttends(card.hidden_size)) as client:
        await client.probe("attend", card)
        await client.probe("attend", card, fresh_s=60)
        for model in ("see", "attend_448"):
            with pytest.raises(Unavailable):
                await client.probe(model, card, fresh_s=60)


async def test_an_idle_model_is_not_probed_for_a_larger_share_of_the_time_than_is_said(card: ModelCard) -> None:
    servicer = OnlyAttends(card.hidden_size)
    async with served(servicer) as client:
        for _ in range(3):
            await client.probe("attend", card, fresh_s=1e-9)
        assert servicer.asked == 1
        await client.probe("attend", card)
        assert servicer.asked == 2


@pytest.mark.parametrize(
    ("then", "error"),
    [
        ("silent", Unavailable),
        ("ends", InternalError),
        ("text", Unavailable),
        ("half", Unavailable),
        ("broken", InternalError),
    ],
)
async def test_a_stream_that_goes_wrong_ends_typed(then: str, error: type[GlimpseError], asker: Asker) -> None:
    async with served(Scripted(then)) as client:
        lonely = Asker(client, asker.prompts, asker.card)
        tokens = lonely.generate(lonely.prompt(), Sampling(), stall_timeout_s=0.1)
        assert await anext(tokens) == (3,)
        with pytest.raises(error):
            await anext(tokens)
        assert client.in_flight == 0
        assert client.unhealthy() == ({"llm"} if then == "text" else set())
        assert client.unhealthy() == set()


async def test_every_status_code_is_mapped() -> None:
    """Every code gives a GlimpseError. An unlisted one is an InternalError without internal details."""
    for code in grpc.StatusCode:
        error = translate("see", code, "a secret of the inside")
        expected = ERROR_CODES.get(code, InternalError)
        assert type(error) is (InternalError if expected is InvalidRequest else expected)
        assert "secret" not in error.message
        assert error.cause == f"{code.name}: a secret of the inside"  # for the log
    assert type(translate("llm", None, "anything")) is InternalError
    assert set(ERROR_CODES.values()) | {kind for _, kind in ERROR_TEXTS} <= MESSAGES.keys() | {InvalidRequest}
    assert Cancelled not in ERROR_CODES.values(), "the caller is still there"


STEP_WITHOUT_OUTPUTS = (  # Triton's answer while the allocator's process ended
    "in ensemble 'attend_448', [request id: <id_unknown>] expected 5 inputs but got 3 inputs for model 'qformer'. Got "
    "input(s) ['question_mask','question_ids','vision_tokens'], but missing required input(s) ['vision_mask']."
)


@pytest.mark.parametrize(
    ("model", "code", "text", "kind"),
    [
        ("llm", grpc.StatusCode.UNAVAILABLE, "[request id: a] Exceeds maximum queue size", Overloaded),
        ("see", grpc.StatusCode.INTERNAL, "in ensemble 'see', Stub process 'qformer_0_0' is not healthy.", Unavailable),
        ("attend_448", grpc.StatusCode.INVALID_ARGUMENT, STEP_WITHOUT_OUTPUTS, Unavailable),
        ("attend", grpc.StatusCode.INVALID_ARGUMENT, "expected 9 inputs but got 8 inputs for model", InternalError),
        ("llm", None, "Stub process 'llm_0_0' is not healthy.", Unavailable),
        ("llm", None, "Request for unknown model: 'llm' has no available versions", Unavailable),
        ("llm", None, "Server not ready", Unavailable),
        ("llm", None, "UNAVAILABLE: the model is being unloaded", Unavailable),
        ("llm", None, "INVALID_ARGUMENT: 900 positions: the model has 320", InvalidRequest),
        ("llm", None, "[request id: a] INVALID_ARGUMENT: 900 positions", InvalidRequest),
        ("llm", None, "WARNING: no code", InternalError),
        ("llm", None, "INVALID_ARGUMENT: guided_decoding_guide cannot be followed: unexpected x", InvalidRequest),
        ("llm", None, "INVALID_ARGUMENT: guided_decoding_guide cannot be followed: unknown model", InvalidRequest),
        ("see", grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape for input 'image'", InternalError),
        ("llm", grpc.StatusCode.INVALID_ARGUMENT, "[request id: a] unexpected shape for input 'seed'", InternalError),
        ("llm", grpc.StatusCode.INVALID_ARGUMENT, "[request id: a] 900 positions: the model has 320", InvalidRequest),
    ],
)
async def test_text_decides_before_the_code(
    model: str, code: grpc.StatusCode | None, text: str, kind: type[GlimpseError]
) -> None:
    error = translate(model, code, text)
    assert type(error) is kind
    assert "request id" not in error.message
    assert "INVALID" not in error.message


async def test_a_constraint_that_becomes_too_complex_is_the_callers_field(asker: Asker) -> None:
    """The field that the request has, and an error that no Triton is blamed for."""
    regex = "|".join(f".*[{letters}].{{{most}}}[{letters}]" for letters, most in TOO_COMPLEX.items())
    sampling = Sampling(max_tokens=asker.room(), temperature=9.0, guide=guide_of(None, regex, None))
    with pytest.raises(InvalidRequest, match=r"^regex became too complex") as caught:
        async for _ in asker.generate(asker.prompt(), sampling, end_id=asker.card.end_id):
            pass
    assert caught.value.param == "regex"


async def test_errors_on_streams_do_not_kill_triton(asker: Asker, triton: EmbeddedTriton) -> None:
    """Asked for as status codes, one in some dozens did."""
    pid = triton.pid
    for _ in range(100):
        with pytest.raises(InvalidRequest, match=r"^\d+ prompt tokens .* positions"):
            await asker.tokens(asker.prompt(), Sampling(max_tokens=asker.room() + 1))
    assert triton.pid == pid


async def test_ready_says_what_the_servers_say(client: TritonClient, triton: EmbeddedTriton) -> None:
    assert await client.ready()
    assert triton.ready


async def test_an_unloaded_model_is_unavailable_until_it_is_loaded(
    client: TritonClient, card: ModelCard, prompts: PromptBuilder, pixels: UInt8Array
) -> None:
    await client.unload("qformer")
    with pytest.raises(Unavailable):
        await look(client, prompts, pixels, Budget())
    await client.load("qformer")

    async def back() -> bool:
        try:
            await client.probe("see", card, timeout_s=5)
        except Unavailable:
            return False
        return True

    await eventually_async(back, 10, "see is back")


async def test_a_model_that_requests_find_dead_fails_until_one_is_answered(card: ModelCard) -> None:
    """`see` has no server here; `attend` shares steps with it and is not blamed."""
    async with served(OnlyAttends(card.hidden_size)) as client:
        await client.probe("attend", card)
        assert not client.failing("see")
        with pytest.raises(Unavailable):
            await client.probe("see", card)
        assert client.failing("see")
        assert not client.failing("attend")
        client.abandon("qformer")
        assert client.failing("attend")
        await client.probe("attend", card, fresh_s=60)
        assert not client.failing("attend")
        assert client.failing("see")


async def delayed(port: int, delay_s: float) -> asyncio.Server:
    """In front of a port: what the server says first comes that much later."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait_s: float) -> None:
        with suppress(ConnectionError):
            await asyncio.sleep(wait_s)
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, back, 0.0), pump(there, writer, delay_s))

    return await asyncio.start_server(serve, "127.0.0.1", 0)


async def test_a_triton_that_greets_late_is_waited_for():
    """As a busy machine's does. An attempt that is given up too early never succeeds."""
    answer = grpc.unary_unary_rpc_method_handler(lambda *_: b"\x08\x01")  # ready: true
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ServerReady": answer})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    async with await delayed(port, 1.0) as proxy:
        url = f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
        async with TritonClient(url, url) as late:
            assert await late.ready(timeout_s=4.0)
    server.stop(0)
