"""The gateway's side of the tensor contract, and the only file that knows Triton's client.

One gRPC channel an address, shared by every request; one decoupled stream a generation. Foreign errors become
GlimpseError here and nowhere else. MODELS is the contract: the tests compare it with every `config.pbtxt` and with the
exported graphs.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc

from service.core import (
    CELLS,
    CROPS,
    GRID,
    IMAGE_SIZE,
    MAX_VISUAL_TOKENS,
    QUESTION_TOKENS,
    Budget,
    CloserFeatures,
    Engines,
    ModelCard,
    Prompt,
    Question,
    Relevance,
    Sampling,
    Seen,
    UInt8Array,
    VisionFeatures,
    dense,
)
from service.errors import (
    DeadlineExceeded,
    GlimpseError,
    InternalError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from service.streams import LINGER_S, Stream

PATCHES = GRID * GRID


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor on the wire, batch dimension left out: -1 varies, "D" and "H" are the card's widths."""

    name: str
    datatype: str  # FP32 here stands for the checkpoint's float: FP16 on GPUs
    dims: tuple[int | str, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """One model the gateway calls, and the models that must live for it to answer."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    through: tuple[str, ...]
    decoupled: bool = False


_IMAGE = Tensor("image", "UINT8", (3, IMAGE_SIZE, IMAGE_SIZE))
_VISION = (
    Tensor("features", "FP32", (PATCHES + 1, "D")),
    Tensor("saliency", "FP32", (PATCHES,)),
    Tensor("entropy", "FP32", (PATCHES,)),
    Tensor("texture", "FP32", (13, GRID, GRID)),
)
_ASKED = (
    Tensor("question_ids", "INT32", (QUESTION_TOKENS,)),
    Tensor("question_mask", "INT32", (QUESTION_TOKENS,)),
    Tensor("budget", "INT32", (4,)),
)
_SEEN = (
    Tensor("visual_tokens", "FP32", (MAX_VISUAL_TOKENS, "H")),
    Tensor("visual_count", "INT32", (1,)),
    Tensor("relevance", "FP32", (PATCHES,)),
    Tensor("scores", "FP32", (3, PATCHES)),
    Tensor("levels", "INT32", (CELLS * CELLS,)),
    Tensor("tensions", "FP32", (3,)),
)

MODELS: Mapping[str, Model] = {
    "see": Model(
        inputs=(_IMAGE, *_ASKED),
        outputs=(*_SEEN, *_VISION),
        through=("vision_encoder", "relevance_allocator", "qformer"),
    ),
    "attend": Model(
        inputs=(*_VISION, *_ASKED),
        outputs=_SEEN,
        through=("relevance_allocator", "qformer"),
    ),
    # The four crops of a closer view in one request, as a batch.
    "vision_encoder": Model(inputs=(_IMAGE,), outputs=_VISION, through=("vision_encoder",)),
    # Only where the model card has a closer view.
    "attend_448": Model(
        inputs=(*_VISION, Tensor("detail_features", "FP32", (CROPS * PATCHES, "D")), *_ASKED),
        outputs=_SEEN,
        through=("relevance_allocator_448", "qformer"),
    ),
    "llm": Model(
        inputs=(
            Tensor("input_ids", "INT32", (-1,)),
            Tensor("input_lengths", "INT32", (1,)),
            Tensor("request_output_len", "INT32", (1,)),
            Tensor("prompt_embedding_table", "FP32", (-1, "H")),
            Tensor("prompt_vocab_size", "INT32", (1,)),
            Tensor("prompt_table_extra_ids", "UINT64", (-1,)),
            Tensor("end_id", "INT32", (1,)),
            Tensor("pad_id", "INT32", (1,)),
            Tensor("streaming", "BOOL", (1,)),
            Tensor("temperature", "FP32", (1,), optional=True),
            Tensor("runtime_top_k", "INT32", (1,), optional=True),
            Tensor("runtime_top_p", "FP32", (1,), optional=True),
            Tensor("seed", "UINT64", (1,), optional=True),
            Tensor("repetition_penalty", "FP32", (1,), optional=True),
            Tensor("stop", "BOOL", (1,), optional=True),
        ),
        outputs=(Tensor("output_ids", "INT32", (-1, -1)),),
        through=("llm",),
        decoupled=True,
    ),
    "vqa": Model(
        inputs=(
            Tensor("image_bytes", "UINT8", (-1,)),
            Tensor("question", "UINT8", (-1,)),
            Tensor("max_tokens", "INT32", (1,), optional=True),
        ),
        outputs=(Tensor("answer", "UINT8", (-1,)),),
        through=("prepare", "vision_encoder", "relevance_allocator", "qformer", "compose", "llm", "finish"),
        decoupled=True,
    ),
}

_VISION_MODELS = {"see", "attend", "attend_448"}
_VISION_MODELS |= {step for model in _VISION_MODELS for step in MODELS[model].through}

# Text that Triton puts in an error, whatever its code, and then the codes. What is in neither is ours to mend.
ERROR_TEXTS: tuple[tuple[str, type[GlimpseError]], ...] = (
    ("Exceeds maximum queue size", Overloaded),
    ("is not healthy", Unavailable),  # "Stub process 'llm_0_0' is not healthy.": the model's process died
    ("unknown model", Unavailable),  # it is not loaded, or not at the moment
    ("Server not ready", Unavailable),  # it starts, or it stops
    ("message larger than max", InternalError),
)
ERROR_CODES: Mapping[grpc.StatusCode, type[GlimpseError]] = {
    grpc.StatusCode.UNAVAILABLE: Unavailable,  # no connection, the model is loading, the server is stopping
    grpc.StatusCode.NOT_FOUND: Unavailable,  # the model is not loaded
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Unavailable,  # by the server: our own cancels raise CancelledError
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
}
_CODED = re.compile(r"(?:\[request id: [^]]*\] )?(?P<code>[A-Z_]+): (?P<text>.*)", re.DOTALL)
MESSAGES: Mapping[type[GlimpseError], str] = {
    Unavailable: "the model {model} does not answer: try again in a few seconds",
    Overloaded: "the model {model} has no room for another request: try again",
    DeadlineExceeded: "the model {model} did not finish in time",
    InternalError: "the model {model} failed",
}

_DATATYPES: Mapping[np.dtype[Any], str] = {
    np.dtype(np.uint8): "UINT8",
    np.dtype(np.int32): "INT32",
    np.dtype(np.uint64): "UINT64",
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.float16): "FP16",
    np.dtype(np.float32): "FP32",
}
_DTYPES: Mapping[str, np.dtype[Any]] = {name: dtype for dtype, name in _DATATYPES.items()}

# What `probe` shows the vqa ensemble: 1x1, black.
_PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # A connection that died without a word (a lost node) is noticed in 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A restarted Triton is found again within half a second; gRPC's own back-off grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)
PROBE_SHARE = 0.02  # a ViT-B costs a CPU 0.5 s a probe, a tenth of its time every 5 s

Arrays = Mapping[str, npt.NDArray[Any]]


def read_engines(repository: Path) -> Engines:
    """What the repository's configurations say. Raises OSError, ValueError for one that is missing or is none."""
    encoder, llm = (_configuration(repository / model / "config.pbtxt") for model in ("vision_encoder", "llm"))
    batch = encoder.max_batch_size if encoder.HasField("dynamic_batching") else 1
    instances = sum(group.count or 1 for group in encoder.instance_group)
    rows = llm.parameters["max_rows"].string_value if "max_rows" in llm.parameters else llm.max_batch_size
    return Engines(encoder_images=max(batch, 1) * max(instances, 1), llm_rows=max(int(rows), 1))


def _configuration(path: Path) -> Any:
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except text_format.ParseError as exc:
        raise ValueError(f"{path}: {exc}") from exc


class TritonClient:
    """See, attend and generate on one or two Tritons. Every method raises GlimpseError only."""

    def __init__(self, vision_url: str, llm_url: str) -> None:
        """`host:port` of Triton's gRPC; the two may be equal, and then share one channel."""
        self._vision_url = vision_url
        self._llm_url = llm_url
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._stubs: dict[str, service_pb2_grpc.GRPCInferenceServiceStub] = {}
        self._streams: dict[str, grpc.aio.UnaryStreamMultiCallable] = {}
        self._open: dict[str, set[grpc.aio.Call]] = {model: set() for model in MODELS}
        self._abandoned: set[grpc.aio.Call] = set()
        self._answered: dict[str, float] = {}  # by model of MODELS, the monotonic time of its last good response
        self._probe_took: dict[str, float] = {}  # seconds, the least: more is waiting
        self._tasks: set[asyncio.Task[Any]] = set()  # of calls that go on to their ends

    async def __aenter__(self) -> TritonClient:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Opens the channels; the connections themselves come with the first call."""
        for url in {self._vision_url, self._llm_url} - self._channels.keys():
            self._channels[url] = channel = grpc.aio.insecure_channel(url, options=_CHANNEL_OPTIONS)
            self._stubs[url] = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            # We send one request a stream. Called as what it then is, head, request and end of the request leave
            # together: as a stream of requests they are three packets and two tasks.
            self._streams[url] = channel.unary_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                request_serializer=service_pb2.ModelInferRequest.SerializeToString,
                response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
            )

    async def close(self) -> None:
        """Ends what is in flight with Unavailable and closes the channels."""
        for model in MODELS:
            self._abandon_calls(model)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        self._stubs.clear()
        self._streams.clear()

    @property
    def in_flight(self) -> int:
        """Calls that `abandon` could still end."""
        return sum(len(calls) for calls in self._open.values())

    async def see(
        self, image: UInt8Array, question: Question, budget: Budget, timeout_s: float
    ) -> tuple[VisionFeatures, Seen]:
        """`image` is RGB [3, 224, 224]."""
        arrays = await self._infer("see", {"image": image[np.newaxis], **_asked(question, budget)}, timeout_s)
        return _features(arrays)[0], _seen(arrays, budget)

    async def encode(self, images: UInt8Array, timeout_s: float) -> list[VisionFeatures]:
        """`images` is RGB [N, 3, 224, 224]: one batch, and no question."""
        return _features(await self._infer("vision_encoder", {"image": images}, timeout_s))

    async def attend(
        self,
        vision: VisionFeatures,
        question: Question,
        budget: Budget,
        timeout_s: float,
        closer: CloserFeatures | None = None,
    ) -> Seen:
        """What `see` gives, from features that an earlier `see` or `encode` found; with level 2 where there are those
        of a closer view too."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "features": dense(vision.features)[np.newaxis],
            "saliency": vision.saliency[np.newaxis],
            "entropy": vision.entropy[np.newaxis],
            "texture": vision.texture[np.newaxis],
            **_asked(question, budget),
        }
        if closer is None:
            return _seen(await self._infer("attend", tensors, timeout_s), budget)
        tensors["detail_features"] = dense(closer.features)[np.newaxis]
        return replace(_seen(await self._infer("attend_448", tensors, timeout_s), budget), detail="high")

    async def generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        *,
        end_id: int,
        pad_id: int,
        request_id: str,
        timeout_s: float,
        stall_timeout_s: float,
    ) -> AsyncGenerator[tuple[int, ...], None]:
        """Token ids as they come, `end_id` included if generated.

        Closing the generator stops the sequence; the stream then ends by itself. Raises Unavailable when no token
        follows the last one within `stall_timeout_s`.
        """
        _require_consistent(prompt)
        inputs = _llm_inputs(prompt, sampling, end_id, pad_id)

        def stop() -> grpc.aio.UnaryStreamCall:
            return self._stream("llm")(_request("llm", inputs | {"stop": np.array([[True]])}, request_id))

        request = _request("llm", inputs, request_id)
        responses = self._responses("llm", request, timeout_s, stall_timeout_s, stop)
        async with contextlib.aclosing(responses):
            async for response in responses:
                if tokens := _tokens(response):
                    yield tokens

    async def answer(
        self, image_bytes: bytes, question: str, *, max_tokens: int, timeout_s: float, stall_timeout_s: float = 5.0
    ) -> AsyncGenerator[bytes, None]:
        """The greedy answer of the `vqa` ensemble, piece by piece, as a plain Triton client gets it.

        The gateway itself never asks for it: a cancel does not reach a running step of an ensemble.
        """
        tensors: dict[str, npt.NDArray[Any]] = {
            "image_bytes": np.frombuffer(image_bytes, np.uint8)[np.newaxis],
            "question": np.frombuffer(question.encode(), np.uint8)[np.newaxis],
            "max_tokens": np.array([[max_tokens]], np.int32),
        }
        responses = self._responses("vqa", _request("vqa", tensors), timeout_s, stall_timeout_s)
        async with contextlib.aclosing(responses):
            async for response in responses:
                for content in response.raw_output_contents:
                    yield content

    async def _responses(
        self,
        model: str,
        request: Any,
        timeout_s: float,
        stall_timeout_s: float,
        stop: Callable[[], grpc.aio.UnaryStreamCall] | None = None,
    ) -> AsyncGenerator[Any, None]:
        """One decoupled request on a stream of its own: its ModelInferResponses up to the final one. Left before that,
        `stop` ends the work on it: in band, as a cancel would take Triton some 33 ms to tell and may kill it."""
        deadline = time.monotonic() + timeout_s
        silence_s = math.inf  # the first response waits for the queue and has the deadline alone
        if timeout_s <= 0:
            raise translate(model, grpc.StatusCode.DEADLINE_EXCEEDED, "before it was asked")
        stream = Stream(self._stream(model)(request))
        self._keep(stream.reader)
        final = False
        try:
            with self._in_flight(model, stream.call):
                while not final:
                    left_s = deadline - time.monotonic()
                    try:
                        async with asyncio.timeout(min(silence_s, left_s)):
                            response = await stream.read()
                    except TimeoutError as exc:
                        if left_s <= silence_s:
                            raise translate(model, grpc.StatusCode.DEADLINE_EXCEEDED, "no final response") from exc
                        text = f"the model {model} fell silent for {stall_timeout_s:g} s: try again"
                        raise Unavailable(text) from exc
                    silence_s = stall_timeout_s
                    if response is grpc.aio.EOF:
                        raise InternalError(f"the model {model} ended without a final response")
                    if response.error_message:
                        final = True
                        raise translate(model, None, response.error_message)
                    final = bool(response.infer_response.parameters["triton_final_response"].bool_param)
                    self._answered[model] = time.monotonic()
                    yield response.infer_response
        finally:
            if not (final or stream.is_over):
                self._keep(asyncio.create_task(stream.wind_up(stop)))

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """From the garbage collector, until it is done; what it fails of is told to whoever still waits for it."""
        self._tasks.add(task)
        task.add_done_callback(self._let_go)

    def _let_go(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def probe(self, model: str, card: ModelCard, timeout_s: float = 5.0, fresh_s: float = 0.0) -> None:
        """Really infers one of MODELS with the least work it can do. Raises Unavailable, whatever went wrong.

        One whose every step answered anybody within the last `fresh_s` is not asked; where not 0, that is as long at
        the least as keeps probes of an idle model under PROBE_SHARE of the time. One that shares steps which answer
        others while the probe waits is busy, not gone: a probe comes last in its queue.
        """
        begun = time.monotonic()
        steps = set(MODELS[model].through) if model in MODELS else {model}
        if fresh_s:
            fresh_s = max(fresh_s, self._probe_took.get(model, 0.0) / PROBE_SHARE)
        if steps <= self._answering_since(begun - fresh_s):
            return
        try:
            await self._probe(model, card, timeout_s)
            took = time.monotonic() - begun
            self._probe_took[model] = min(took, self._probe_took.get(model, took))
        except Overloaded:
            return  # it lives
        except Unavailable:
            raise
        except GlimpseError as exc:
            shared = steps & {step for name, other in MODELS.items() if name != model for step in other.through}
            if isinstance(exc, DeadlineExceeded) and shared and shared <= self._answering_since(begun):
                return
            why = f"no answer in {timeout_s:g} s" if isinstance(exc, DeadlineExceeded) else exc.message
            raise Unavailable(f"the model {model} does not answer its probe: {why}", cause=exc.cause) from exc

    def _answering_since(self, moment: float) -> set[str]:
        """The models that have answered since, whoever went through them."""
        return {step for name, at in self._answered.items() if at > moment for step in MODELS[name].through}

    async def _probe(self, model: str, card: ModelCard, timeout_s: float) -> None:
        question = Question(np.zeros(QUESTION_TOKENS, np.int32), np.zeros(QUESTION_TOKENS, np.int32))
        budget = Budget((card.vision_tokens[0],) * 2, (card.visual_tokens[0],) * 2)
        match model:
            case "see":
                await self.see(np.zeros((3, IMAGE_SIZE, IMAGE_SIZE), np.uint8), question, budget, timeout_s)
            case "attend" | "attend_448":
                first, second = (
                    {name: np.zeros(shape, _DTYPES[card.type_of(name)]) for name, shape in shapes.items()}
                    for shapes in card.feature_shapes.values()
                )
                closer = CloserFeatures(**second) if model == "attend_448" else None
                await self.attend(VisionFeatures(**first), question, budget, timeout_s, closer)
            case "llm":
                prompt = Prompt(
                    input_ids=np.array([card.vocab_size, card.bos_id], np.int32),
                    visual_tokens=np.zeros((1, card.hidden_size), _DTYPES[card.float_type]),
                    extra_ids=np.array([1, 0], np.uint64),
                )
                tokens = self.generate(
                    prompt,
                    Sampling(max_tokens=1),
                    end_id=card.end_id,
                    pad_id=card.pad_id,
                    request_id=f"probe-{uuid4().hex}",  # closing a stream stops by id, and another gateway probes too
                    timeout_s=timeout_s,
                    stall_timeout_s=timeout_s,
                )
                async with contextlib.aclosing(tokens):
                    async for _ in tokens:
                        pass
            case "vqa":
                pieces = self.answer(_PNG, "?", max_tokens=1, timeout_s=timeout_s)
                async with contextlib.aclosing(pieces):
                    async for _ in pieces:
                        pass
            case _:
                raise InternalError(f"no probe for the model {model}")

    async def ready(self, timeout_s: float = 1.0) -> bool:
        """Whether every server says so; Triton does even when a model's process is dead: see `probe`."""
        try:
            for stub in self._stubs.values():
                if not (await stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=timeout_s)).ready:
                    return False
        except (grpc.RpcError, grpc.aio.BaseError):
            return False
        return bool(self._stubs)

    async def load(self, model: str, timeout_s: float = 60.0) -> None:
        """Loads a model, and whatever ensembles wait for it."""
        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        with _translated(model):
            await self._stub(model).RepositoryModelLoad(request, timeout=timeout_s)

    async def unload(self, model: str, timeout_s: float = 60.0) -> None:
        request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
        with _translated(model):
            await self._stub(model).RepositoryModelUnload(request, timeout=timeout_s)

    def abandon(self, lost: str) -> None:
        """Ends with Unavailable, at once, every request in flight that needs the model `lost`.

        For who knows that its process died: Triton lets such requests hang, or fails them one a second.
        """
        for name, model in MODELS.items():
            if lost in model.through:
                self._answered.pop(name, None)
                self._abandon_calls(name)

    def _abandon_calls(self, model: str) -> None:
        for call in list(self._open[model]):
            self._abandoned.add(call)
            call.cancel()

    def _stub(self, model: str) -> service_pb2_grpc.GRPCInferenceServiceStub:
        return self._of(self._stubs, model)

    def _stream(self, model: str) -> grpc.aio.UnaryStreamMultiCallable:
        return self._of(self._streams, model)

    def _of(self, known: Mapping[str, Any], model: str) -> Any:
        """What is known for the address of the model's server. Raises Unavailable."""
        try:
            return known[self._vision_url if model in _VISION_MODELS else self._llm_url]
        except KeyError:
            raise Unavailable("not connected to Triton") from None

    async def _infer(self, model: str, tensors: Arrays, timeout_s: float) -> dict[str, npt.NDArray[Any]]:
        """One unary inference; every tensor's rows are first. Left before its end it goes on: see service.streams."""
        if timeout_s <= 0:
            raise translate(model, grpc.StatusCode.DEADLINE_EXCEEDED, "before it was asked")
        call = self._stub(model).ModelInfer(_request(model, tensors), timeout=timeout_s + LINGER_S)
        task = asyncio.create_task(_response(call))
        self._keep(task)
        with self._in_flight(model, call):
            try:
                async with asyncio.timeout(timeout_s):
                    response = await asyncio.shield(task)
            except TimeoutError as exc:
                raise translate(model, grpc.StatusCode.DEADLINE_EXCEEDED, "no response") from exc
        self._answered[model] = time.monotonic()
        return {
            output.name: np.frombuffer(content, _DTYPES[output.datatype]).reshape(tuple(output.shape))
            for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
        }

    @contextlib.contextmanager
    def _in_flight(self, model: str, call: grpc.aio.Call) -> Iterator[None]:
        """Translates the call's errors, and lets `abandon` reach it."""
        self._open[model].add(call)
        try:
            with _translated(model):
                yield
        except Unavailable:
            self._answered.pop(model, None)
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if call in self._abandoned and not (task and task.cancelling()):
                raise Unavailable(MESSAGES[Unavailable].format(model=model)) from None
            raise
        finally:
            self._abandoned.discard(call)
            self._open[model].discard(call)


async def _response(call: grpc.aio.UnaryUnaryCall) -> Any:
    return await call


@contextlib.contextmanager
def _translated(model: str) -> Iterator[None]:
    """The one place where gRPC's errors become ours."""
    try:
        yield
    except grpc.aio.AioRpcError as exc:
        raise translate(model, exc.code(), exc.details() or "") from exc
    except grpc.aio.BaseError as exc:  # the channel was closed under the call
        raise Unavailable(MESSAGES[Unavailable].format(model=model)) from exc


def translate(model: str, code: grpc.StatusCode | None, text: str) -> GlimpseError:
    """Triton's code and text as our error. A stream carries the text alone, and our LLM's begins with the code: that
    Triton 2.51 sends it as a status, which a client may ask for (triton_grpc_error), may kill it."""
    if code is None and (coded := _CODED.fullmatch(text)) and coded["code"] in grpc.StatusCode.__members__:
        code, text = grpc.StatusCode[coded["code"]], coded["text"]
    by_text = (error for part, error in ERROR_TEXTS if part in text)
    kind = next(by_text, ERROR_CODES.get(code, InternalError) if code else InternalError)
    if kind is InvalidRequest:
        # Only the LLM checks what a caller may choose (lengths, sampling); a wrong tensor elsewhere is our mistake.
        if model == "llm" and "unexpected" not in text and "expected number of inputs" not in text:
            return InvalidRequest(text.split("] ", 1)[-1] if text.startswith("[request id") else text)
        kind = InternalError
    return kind(MESSAGES[kind].format(model=model), cause=f"{code.name}: {text}" if code else text)


def _request(model: str, tensors: Arrays, request_id: str = "") -> service_pb2.ModelInferRequest:
    """Every tensor's rows are first."""
    inputs, contents = [], []
    for name, array in tensors.items():
        datatype = _DATATYPES[array.dtype]
        inputs.append(service_pb2.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=array.shape))
        contents.append(array.tobytes())
    request = service_pb2.ModelInferRequest(
        model_name=model, id=request_id, inputs=inputs, raw_input_contents=contents, outputs=_OUTPUTS[model]
    )
    if MODELS[model].decoupled:
        # Without it an empty last response is swallowed, and the end with it.
        request.parameters["triton_enable_empty_final_response"].bool_param = True
    return request


def _asked(question: Question, budget: Budget) -> dict[str, npt.NDArray[Any]]:
    return {
        "question_ids": question.ids[np.newaxis],
        "question_mask": question.mask[np.newaxis],
        "budget": budget.to_array()[np.newaxis],
    }


def _require_consistent(prompt: Prompt) -> None:
    """Raises InternalError, as it is our mistake, for what TensorRT-LLM's backend would let pass: it drops extra ids of
    the wrong length and does not look at the table's size, and then two images could share keys and values."""
    ids, extra, rows = prompt.input_ids, prompt.extra_ids, len(prompt.visual_tokens)
    if extra.shape != ids.shape:
        raise InternalError(f"{extra.size} extra ids for {ids.size} input ids")
    visual = extra > 0
    named = ids[visual]
    first = int(named.min(initial=np.iinfo(np.int32).max))
    if not np.array_equal(np.sort(named), np.arange(first, first + rows, dtype=np.int64)):
        raise InternalError(f"{len(named)} visual ids do not name the {rows} rows of the prompt embedding table")
    if ids[~visual].max(initial=-1) >= first:
        raise InternalError("an input id names a row of the prompt embedding table and has no extra id")
    if len(set(extra[visual].tolist())) < rows:  # the same image twice
        _, at, of = np.unique(extra[visual], return_index=True, return_inverse=True)
        table = prompt.visual_tokens[named - first]
        if not np.array_equal(table, table[at][of]):
            raise InternalError("two different visual tokens have one extra id")


def _llm_inputs(prompt: Prompt, sampling: Sampling, end_id: int, pad_id: int) -> dict[str, npt.NDArray[Any]]:
    """The LLM's inputs; of the sampling ones only those that are not neutral, so that a greedy request is small."""
    inputs: dict[str, npt.NDArray[Any]] = {
        "input_ids": prompt.input_ids[np.newaxis],
        "input_lengths": np.array([[prompt.input_ids.size]], np.int32),
        "request_output_len": np.array([[sampling.max_tokens]], np.int32),
        "prompt_embedding_table": prompt.visual_tokens[np.newaxis],
        "prompt_vocab_size": np.array([[len(prompt.visual_tokens)]], np.int32),
        "prompt_table_extra_ids": prompt.extra_ids[np.newaxis],
        "end_id": np.array([[end_id]], np.int32),
        "pad_id": np.array([[pad_id]], np.int32),
        "streaming": np.array([[sampling.streaming]]),
        "temperature": np.array([[sampling.temperature]], np.float32),
    }
    if sampling.temperature > 0:
        inputs["runtime_top_k"] = np.array([[sampling.top_k]], np.int32)
        inputs["runtime_top_p"] = np.array([[sampling.top_p]], np.float32)
        inputs["seed"] = np.array([[sampling.seed]], np.uint64)
    if sampling.repetition_penalty != 1.0:
        inputs["repetition_penalty"] = np.array([[sampling.repetition_penalty]], np.float32)
    return inputs


def _features(arrays: Arrays) -> list[VisionFeatures]:
    """One a row."""
    rows = zip(arrays["features"], arrays["saliency"], arrays["entropy"], arrays["texture"], strict=True)
    return [VisionFeatures(*row) for row in rows]


def _seen(arrays: Arrays, budget: Budget) -> Seen:
    count = int(arrays["visual_count"][0, 0])
    relevance = Relevance(
        map=arrays["relevance"][0].reshape(GRID, GRID),
        scores=arrays["scores"][0].reshape(3, GRID, GRID),
        levels=arrays["levels"][0].reshape(CELLS, CELLS),
        tensions=arrays["tensions"][0],
    )
    return Seen(arrays["visual_tokens"][0, :count].copy(), relevance, budget)  # without the rows past the count


def _tokens(response: Any) -> tuple[int, ...]:
    """`output_ids` int32 [1, 1, new tokens], all that was asked for; an empty final response has nothing."""
    return tuple(token for content in response.raw_output_contents for token in memoryview(content).cast("i"))


_OUTPUTS = {
    name: [service_pb2.ModelInferRequest.InferRequestedOutputTensor(name=output.name) for output in model.outputs]
    for name, model in MODELS.items()
}
