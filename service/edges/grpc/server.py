"""Answer the calls of glimpse.v1.VisualQuestionAnswering, and run the server that carries them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass

import grpc  # type: ignore[import-untyped]
from grpc_health.v1.health import SERVICE_NAME as HEALTH  # type: ignore[import-untyped]

from service.core.access import Scope
from service.core.answer import Delta, TokenLogProb
from service.core.errors import naming_field
from service.core.request import Request
from service.edges.asking import Names, naming, to_request
from service.edges.grpc.batch import BatchCall
from service.edges.grpc.calls import Call, Calls
from service.edges.grpc.edge import MAX_CALLS, GrpcEdge
from service.edges.grpc.health import Health
from service.edges.grpc.messages import answer_message, event_message, fields_of, kept_message, question_in
from service.edges.grpc.reflection import Reflection
from service.edges.grpc.stubs import vqa_pb2 as pb
from service.edges.whole import whole

SERVICE = pb.DESCRIPTOR.services_by_name["VisualQuestionAnswering"].full_name
TELLING_S = 1.0  # for callers to be told that the server ended their calls


@dataclass(frozen=True, slots=True)
class Question:
    """Hold a question as a core Request, whether to explain its answer, and the message's names of our fields."""

    request: Request
    explain: bool
    names: Names


class VisualQuestionAnswering:
    """Answer the service's calls. A handler reads its own message, so that its cost is reserved before it is parsed."""

    def __init__(self, edge: GrpcEdge, calls: Calls) -> None:
        self.edge = edge
        self.calls = calls

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """Return the handlers by the names of their methods.

        To a client, a call with one message is the same whether the server takes it for one message or for a stream.
        """
        encode = pb.AnswerResponse.SerializeToString
        return {
            "Answer": grpc.stream_unary_rpc_method_handler(self.answer, None, encode),
            "StreamAnswer": grpc.stream_stream_rpc_method_handler(
                self.stream_answer, None, pb.AnswerEvent.SerializeToString
            ),
            "Batch": grpc.stream_stream_rpc_method_handler(self.batch, None, pb.BatchResponse.SerializeToString),
            "PutImage": grpc.stream_unary_rpc_method_handler(
                self.put_image, None, pb.PutImageResponse.SerializeToString
            ),
        }

    async def answer(self, _: object, context: grpc.aio.ServicerContext) -> pb.AnswerResponse:
        async with self.calls.scope(context, "Answer", Scope.ASK) as call:
            asked = await self.read_question(call, stream=False)
            with naming(asked.names):
                said, end = await whole(self.edge.pipeline.answer(asked.request, call.reservation))
            return answer_message(asked.request.id, self.model, said.text, end, asked.explain, said.log_probs)

    async def stream_answer(self, _: object, context: grpc.aio.ServicerContext) -> None:
        async with self.calls.scope(context, "StreamAnswer", Scope.ASK) as call:
            asked = await self.read_question(call, stream=True)
            request = asked.request
            answer = self.edge.pipeline.answer(request, call.reservation)
            told: list[TokenLogProb] = []
            with naming(asked.names):
                async with call.present(request.timeout_s), aclosing(answer) as events:
                    async for event in events:
                        if isinstance(event, Delta):
                            told += event.log_probs
                        await context.write(event_message(request.id, self.model, event, asked.explain, told))

    async def batch(self, _: object, context: grpc.aio.ServicerContext) -> None:
        async with self.calls.scope(context, "Batch", Scope.ASK) as call:
            await BatchCall(call, self.edge).run()

    async def put_image(self, _: object, context: grpc.aio.ServicerContext) -> pb.PutImageResponse:
        async with self.calls.scope(context, "PutImage", Scope.UPLOAD) as call:
            with naming_field("data"):
                image = await call.image()
                return kept_message(await self.edge.pipeline.keep_image(image, call.reservation))

    async def read_question(self, call: Call, *, stream: bool) -> Question:
        """Reserve, read and parse a question.

        Raises InvalidRequest, TooLarge, SlowBody, Overloaded.
        """
        received = await call.message()
        await self.edge.turns.next()
        message = question_in(received)
        fields, names = fields_of(message, stream=stream, timeout_s=call.timeout_s())
        card = self.edge.pipeline.card_for(call.caller.route)
        with naming(names):
            return Question(to_request(fields, card, self.edge.questions, call.caller), message.explain, names)

    @property
    def model(self) -> str:
        return self.edge.pipeline.card.name


class GrpcServer:
    """Run the services in the current event loop."""

    def __init__(self, edge: GrpcEdge) -> None:
        self.calls = Calls(edge)
        self.health = Health(edge, (SERVICE,))
        self.server = grpc.aio.server(options=edge.options(), maximum_concurrent_rpcs=MAX_CALLS)
        handlers = VisualQuestionAnswering(edge, self.calls).handlers()
        ours = grpc.method_handlers_generic_handler(SERVICE, handlers)
        keyless = (self.health.handler(), Reflection(edge, (SERVICE, HEALTH)).handler())
        self.server.add_generic_rpc_handlers((ours, *keyless))

    def listen(self, host: str, port: int) -> int:
        """Bind an address of this machine -> the port, which is chosen for 0. Raises OSError."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            return int(self.server.add_insecure_port(address))
        except RuntimeError as exc:  # gRPC says nothing more about it
            raise OSError(f"gRPC cannot listen on {address}") from exc

    async def run(self, stopped: asyncio.Event, grace_s: float) -> None:
        """Serve until `stopped` is set, then stop gracefully; at once if cancelled."""
        start = asyncio.create_task(self.server.start())
        try:
            await asyncio.shield(start)  # gRPC logs an error of its own if its start is cancelled
            await stopped.wait()
            await self._drain(grace_s)
        finally:
            await start
            await self.server.stop(None)

    async def _drain(self, grace_s: float) -> None:
        """Refuse new calls and let those in work finish. Admission ends those that outlive the grace, and they still
        have the time to tell their callers.

        The server's own stop ends when the last message of every call and watch is sent. Only a stream that its client
        keeps open, such as one of reflection, uses up the time and is cut.
        """
        self.health.stop()
        refusing = asyncio.create_task(self.server.stop(grace_s + TELLING_S))
        await self.calls.finished(grace_s + TELLING_S)
        await asyncio.wait((refusing,), timeout=TELLING_S)
        await self.server.stop(None)
        await refusing
