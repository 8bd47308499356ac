"""Make calls to one or two Tritons: own the gRPC channels and the calls in flight on them.

Every address has one gRPC channel, which all requests share. Every generation has its own decoupled stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy.typing as npt
from tritonclient.grpc import service_pb2, service_pb2_grpc

from service.core.errors import InternalError, Unavailable
from service.core.tensors import MAX_MESSAGE_BYTES, Arrays
from service.triton import codec
from service.triton.contract import CALLED, VISION_MODELS
from service.triton.errors import MESSAGES, translate, translated, unhealthy_model
from service.triton.streams import LINGER_S, Silent, Stream

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),  # a proxy of the environment is for the web, and knows no address of this machine
    # A lost connection makes a name be asked again, so that a Triton with a new address is found.
    ("grpc.dns_min_time_between_resolutions_ms", 2_000),
    # A connection to a lost node is noticed in 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # The client reconnects to a restarted Triton within 0.5 s; gRPC's default back-off grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # no back-off, but the time for one attempt: a busy Triton greets late
    ("grpc.max_reconnect_backoff_ms", 500),
)
SILENCE_S = 5.0  # without an answer of any request: the model does not answer

Metadata = tuple[tuple[str, str], ...]


class Calls:
    """Call the models of CALLED. Every method raises GlimpseError only."""

    def __init__(self, vision_url: str, llm_url: str, metadata: Metadata = ()) -> None:
        """`metadata` goes with the calls that change the server: see Access."""
        self._vision_url = vision_url
        self._metadata = metadata
        self._llm_url = llm_url
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._stubs: dict[str, service_pb2_grpc.GRPCInferenceServiceStub] = {}
        self._infers: dict[str, grpc.aio.UnaryUnaryMultiCallable] = {}  # of requests that are serialised already
        self._streams: dict[str, grpc.aio.UnaryStreamMultiCallable] = {}
        self._open: dict[str, set[grpc.aio.Call]] = {model: set() for model in CALLED}
        self._abandoned: set[grpc.aio.Call] = set()
        self._answered: dict[str, float] = {}  # by model of CALLED, the monotonic time of its last good response
        self._failed: dict[str, float] = {}  # likewise, when a request last found that it does not answer
        self._unhealthy: set[str] = set()  # models whose process did not report to Triton, since the last question
        self._tasks: set[asyncio.Task[Any]] = set()  # of calls that nobody waits for any more, until they end

    async def connect(self) -> None:
        """Open the channels. The first call opens the connections."""
        for url in {self._vision_url, self._llm_url} - self._channels.keys():
            self._channels[url] = channel = grpc.aio.insecure_channel(url, options=_CHANNEL_OPTIONS)
            self._stubs[url] = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            self._infers[url] = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                response_deserializer=service_pb2.ModelInferResponse.FromString,
            )
            # A stream carries one request. With unary_stream its header, request and end leave in one packet; with
            # stream_stream they would be three packets and two tasks.
            self._streams[url] = channel.unary_stream(
                "/inference.GRPCInferenceService/ModelStreamInfer",
                response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
            )

    async def close(self) -> None:
        """End the calls in flight with Unavailable and close the channels."""
        for model in CALLED:
            self._abandon_calls(model)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()
        self._stubs.clear()
        self._infers.clear()
        self._streams.clear()

    @property
    def in_flight(self) -> int:
        """Calls that `abandon` could still end."""
        return sum(len(calls) for calls in self._open.values())

    @property
    def is_idle(self) -> bool:
        """Whether no call is in flight, also none that nobody waits for."""
        return not self.in_flight and not self._tasks

    async def ready(self, timeout_s: float = 1.0) -> bool:
        """Return whether every server reports ready. Triton reports so even if a model's process is dead."""
        try:
            for stub in self._stubs.values():
                if not (await stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=timeout_s)).ready:
                    return False
        except (grpc.RpcError, grpc.aio.BaseError):
            return False
        return bool(self._stubs)

    async def load(self, model: str, timeout_s: float = 60.0) -> None:
        """Load a model and the ensembles that wait for it."""
        request = service_pb2.RepositoryModelLoadRequest(model_name=model)
        with translated(model):
            await self._stub(model).RepositoryModelLoad(request, timeout=timeout_s, metadata=self._metadata)

    async def unload(self, model: str, timeout_s: float = 60.0) -> None:
        request = service_pb2.RepositoryModelUnloadRequest(model_name=model)
        with translated(model):
            await self._stub(model).RepositoryModelUnload(request, timeout=timeout_s, metadata=self._metadata)

    def abandon(self, lost: str) -> None:
        """End every request in flight that needs the model `lost`, at once, with Unavailable.

        Call it if the model's process died: Triton lets such requests hang, or fails one a second.
        """
        for name, model in CALLED.items():
            if lost in model.through:
                self._note_failure(name)
                self._abandon_calls(name)

    def _abandon_calls(self, model: str) -> None:
        for call in list(self._open[model]):
            self._abandoned.add(call)
            call.cancel()

    def answering_since(self, moment: float) -> set[str]:
        """Return the models that have answered any request since that moment."""
        return {step for name, at in self._answered.items() if at > moment for step in CALLED[name].through}

    def failing(self) -> set[str]:
        """The models of CALLED that did not answer a request, and have answered none since."""
        return {name for name, at in self._failed.items() if not self._has_answered(name, at)}

    def unhealthy(self) -> set[str]:
        """Return the models whose process did not report to Triton, by requests since the last call of this."""
        found, self._unhealthy = self._unhealthy, set()
        return found

    def _has_answered(self, model: str, since: float) -> bool:
        return set(CALLED[model].through) <= self.answering_since(since)

    def _note_failure(self, model: str) -> None:
        self._answered.pop(model, None)
        self._failed[model] = time.monotonic()

    def _note_silence(self, model: str, begun: float) -> None:
        """A request's deadline passed. A short deadline tells nothing of the model, nor does a busy model's."""
        if time.monotonic() - begun >= SILENCE_S and not self._has_answered(model, begun):
            self._note_failure(model)

    async def infer(self, model: str, tensors: Arrays, timeout_s: float) -> dict[str, npt.NDArray[Any]]:
        """Run one unary inference. If its caller leaves, the call still runs to its end: see streams."""
        return await self.send(model, codec.request(model, tensors), timeout_s)

    async def send(self, model: str, request: bytes, timeout_s: float) -> dict[str, npt.NDArray[Any]]:
        """`infer` for a request that is made already."""
        if timeout_s <= 0:
            raise translate(model, grpc.StatusCode.DEADLINE_EXCEEDED, "before it was asked")
        begun = time.monotonic()
        call = self._of(self._infers, model)(request, timeout=timeout_s + LINGER_S)
        task = asyncio.create_task(_response(call))
        self._keep(task)
        with self._in_flight(model, call):
            try:
                async with asyncio.timeout(timeout_s):
                    response = await asyncio.shield(task)
            except TimeoutError as exc:
                self._note_silence(model, begun)
                raise translate(model, grpc.StatusCode.DEADLINE_EXCEEDED, "no response") from exc
        try:
            found = codec.outputs(model, response)
        except ValueError as exc:
            self._note_failure(model)
            raise Unavailable(MESSAGES[Unavailable].format(model=model), cause=str(exc)) from exc
        self._answered[model] = time.monotonic()
        return found

    async def responses(
        self,
        model: str,
        request: bytes,
        timeout_s: float,
        stall_timeout_s: float,
        stop: Callable[[], grpc.aio.UnaryStreamCall] | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Run one decoupled request on a stream of its own and yield its ModelInferResponses.

        If the caller leaves before the final one, `stop` ends the work in band. A cancel would reach the model only
        after about 33 ms and may kill Triton.
        """
        begun = time.monotonic()
        if timeout_s <= 0:
            raise translate(model, grpc.StatusCode.DEADLINE_EXCEEDED, "before it was asked")
        stream = Stream(self.stream(model, request), timeout_s, stall_timeout_s)
        self._keep(stream.reader)
        final = False
        try:
            with self._in_flight(model, stream.call):
                while not final:
                    try:
                        response = await stream.read()
                    except Silent as exc:
                        text = f"the model {model} sent no token for {stall_timeout_s:g} s: try again"
                        raise Unavailable(text) from exc
                    except TimeoutError as exc:
                        self._note_silence(model, begun)
                        raise translate(model, grpc.StatusCode.DEADLINE_EXCEEDED, "no final response") from exc
                    if response is grpc.aio.EOF:
                        raise InternalError(f"the model {model} ended without a final response")
                    if response.error_message:
                        final = True
                        raise translate(model, None, response.error_message)
                    final = bool(response.infer_response.parameters["triton_final_response"].bool_param)
                    self._answered[model] = time.monotonic()
                    yield response.infer_response
        finally:
            stream.close()
            if not (final or stream.is_over):
                self._keep(asyncio.create_task(stream.wind_up(stop)))

    def stream(self, model: str, request: bytes) -> grpc.aio.UnaryStreamCall:
        """Send a decoupled request."""
        return self._of(self._streams, model)(request)

    def _keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a reference until the task is done. Its error goes to the callers that still wait for it."""
        self._tasks.add(task)
        task.add_done_callback(self._let_go)

    def _let_go(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    def _stub(self, model: str) -> service_pb2_grpc.GRPCInferenceServiceStub:
        return self._of(self._stubs, model)

    def _of(self, known: Mapping[str, Any], model: str) -> Any:
        """Return the entry for the address of the model's server. Raises Unavailable."""
        try:
            return known[self._vision_url if model in VISION_MODELS else self._llm_url]
        except KeyError:
            raise Unavailable("the gateway is not connected to Triton: try again in a few seconds") from None

    @contextlib.contextmanager
    def _in_flight(self, model: str, call: grpc.aio.Call) -> Iterator[None]:
        """Translate the call's errors, and let `abandon` end it."""
        self._open[model].add(call)
        try:
            with translated(model):
                yield
        except Unavailable as error:
            self._note_failure(model)
            if (unhealthy := unhealthy_model(error.cause)) is not None:
                self._unhealthy.add(unhealthy)
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
