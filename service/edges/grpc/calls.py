"""Wrap every call: its caller, its one reservation, its status, its count, and its end when the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from urllib.parse import unquote

import grpc  # type: ignore[import-untyped]
import structlog
from structlog.contextvars import bound_contextvars

from service.core.access import Scope
from service.core.errors import (
    Cancelled,
    GlimpseError,
    InvalidRequest,
    Overloaded,
    SlowBody,
    TooLarge,
    internal_error,
    status_of,
    without_frames,
)
from service.edges.caller import (
    API_KEY_KEY,
    AUTHORIZATION_KEY,
    SESSION_KEY,
    TENANT_KEY,
    TRACE_ID_KEY,
    TRACEPARENT_KEY,
    VARIANT_KEY,
    Caller,
    admitted,
    key_in,
    present,
    route_in,
    trace_id_in,
)
from service.edges.grpc.edge import GrpcEdge
from service.edges.grpc.messages import chunk_in
from service.edges.grpc.status import abort
from service.edges.http.schema import LEAST_TIMEOUT_S
from service.edges.proxies import FORWARDED_KEY
from service.pipeline import Reservation, Size

log = structlog.get_logger()

# A question ends so long before its call's deadline that its caller still gets our error with its details.
ANSWERING_S = 0.02
ANSWERING_SHARE = 0.1  # at most this share of a short deadline
PROMPT_S = 0.5  # a message that is not whole after this time counts as one of the largest
MAX_PAUSES = (
    16  # so many calls wait for their callers' next message without that, because most callers send nothing yet
)


async def never() -> None:
    await asyncio.Event().wait()


@dataclass(frozen=True, slots=True)
class Call:
    """Hold one call in work."""

    context: grpc.aio.ServicerContext
    caller: Caller
    reservation: Reservation
    edge: GrpcEdge
    calls: Calls

    def timeout_s(self) -> float | None:
        """Return the time that the caller's deadline leaves for the work, as far as the service allows; None without a
        deadline."""
        left_s = self.time_left_s()
        return None if left_s is None else min(left_s, self.edge.questions.max_timeout_s)

    def time_left_s(self) -> float | None:
        """Return the time that the caller's deadline leaves for the work; None without a deadline."""
        left_s: float | None = self.context.time_remaining()
        if left_s is None:
            return None
        return max(LEAST_TIMEOUT_S, left_s - min(ANSWERING_S, ANSWERING_SHARE * left_s))

    def present(self, timeout_s: float) -> AbstractAsyncContextManager[None]:
        """Give up the block if its caller does not read its answer. Raises DeadlineExceeded.

        gRPC itself cancels the call of a caller that has gone.
        """
        return present(never, timeout_s)

    async def message(self) -> bytes:
        """Read the one message of the call. Raises SlowBody, InvalidRequest, Overloaded."""
        data = await self._read(self.edge.bodies.timeout_s, 0)
        if data is None:  # one over the limit comes here too, but gRPC has answered it
            raise InvalidRequest("the call has no message: send one")
        self.reservation.reserve_bytes(len(data))
        return data

    async def next_message(self) -> bytes | None:
        """Read the next of several messages; None at their end. Its caller may pause before it. Raises Overloaded."""
        self.calls.pausing += 1
        try:
            return await self._read(None, 0)
        finally:
            self.calls.pausing -= 1

    async def image(self) -> bytes:
        """Read an image in chunks. Raises SlowBody, TooLarge, InvalidRequest, Overloaded."""
        limits, loop = self.edge.bodies, asyncio.get_running_loop()
        started, chunks, came = loop.time(), [], 0
        while (data := await self._read(started + limits.patience_s(came) - loop.time(), came)) is not None:
            chunk = chunk_in(data)
            came += len(chunk)
            if came > limits.max_image_bytes:
                raise TooLarge(
                    f"the image is too large, the limit is {limits.max_image_bytes:,} bytes: send a smaller one",
                    param="image",
                )
            self.reservation.reserve_bytes(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)

    async def _read(self, timeout_s: float | None, came: int) -> bytes | None:
        """Return the next message's bytes, or None at the end. Without a timeout the caller may pause.

        gRPC collects a message and tells its size when it is whole. So one that takes long reserves what the largest
        needs meanwhile. Raises SlowBody, Overloaded.
        """
        refusals: list[Overloaded] = []

        def reserve_most() -> None:
            if timeout_s is None and self.calls.pausing <= MAX_PAUSES:
                return
            try:
                self.reservation.reserve_bytes(self.edge.bodies.max_body_bytes)
            except Overloaded as refusal:
                refusals.append(refusal)
                if not patience.expired():
                    patience.reschedule(loop.time())

        loop = asyncio.get_running_loop()
        with self.reservation.work():
            timer = loop.call_later(PROMPT_S, reserve_most)
            try:
                async with asyncio.timeout(timeout_s) as patience:
                    data = await self.context.read()
            except TimeoutError as exc:
                if refusals:
                    raise refusals[0] from exc
                raise SlowBody(f"only {came:,} bytes of the message came in time: try again") from exc
            finally:
                timer.cancel()
        return None if data is grpc.aio.EOF else data


def address_in(peer: str) -> str:
    """Return the address of gRPC's name for a peer, such as ipv4:127.0.0.1:5000 or ipv6:%5B::1%5D:5000."""
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")


def metadata_of(trace_id: str, reservation: Reservation) -> tuple[tuple[str, str], ...]:
    """Return the trailing metadata: the request's id, and the variant that answered."""
    served = reservation.served
    variant = ((VARIANT_KEY, served.variant),) if served is not None and served.is_named else ()
    return ((TRACE_ID_KEY, trace_id), *variant)


class Calls:
    """Hold the calls in work."""

    def __init__(self, edge: GrpcEdge) -> None:
        self.edge = edge
        self.pausing = 0  # calls that wait for the next of several messages
        self._open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()

    @asynccontextmanager
    async def scope(self, context: grpc.aio.ServicerContext, method: str, scope: Scope) -> AsyncIterator[Call]:
        """Open a call's one reservation, if its key has the scope. Answer errors of the block with their status, and
        count the call."""
        metadata = context.invocation_metadata() or ()
        trace_id = trace_id_in(str(value) for key, value in metadata if key == TRACE_ID_KEY)
        context.set_trailing_metadata(((TRACE_ID_KEY, trace_id),))
        try:
            with self._counted(), self._client_told(context, metadata):
                self.edge.pipeline.refuse_early(self._open, self.edge.lag_s(), None)
                caller = self._caller(metadata, trace_id, scope)
                with self.edge.pipeline.reservation(caller.tenant, caller.key, size=Size.UNKNOWN) as reservation:
                    async with reservation.until_end():
                        await reservation.account.enter()
                        try:
                            yield Call(context, caller, reservation, self.edge, self)
                        finally:
                            context.set_trailing_metadata(metadata_of(trace_id, reservation))
        except asyncio.CancelledError as gone:  # by gRPC, for a caller that has gone
            self.edge.count(method, status_of(Cancelled(""))[1])
            without_frames(gone)
            raise asyncio.CancelledError from None  # a new one: contextlib gives the same one its traceback again
        except Exception as exc:
            error = self._told(exc, method, trace_id)
            self.edge.count(method, status_of(error)[1])
            without_frames(exc)
            await abort(context, error, trace_id)
        else:
            self.edge.count(method, "OK")

    def _caller(self, metadata: Sequence[tuple[str, str | bytes]], trace_id: str, scope: Scope) -> Caller:
        """Raises Unauthenticated, Forbidden, Unavailable, InvalidRequest."""

        def words(name: str) -> list[str]:
            return [str(value) for key, value in metadata if key == name]

        def key() -> str:
            return key_in(words(AUTHORIZATION_KEY), words(API_KEY_KEY))

        grant = admitted(self.edge.access, key, scope, next(iter(words(TENANT_KEY)), ""))
        route = route_in(words(VARIANT_KEY), words(SESSION_KEY))
        return Caller(grant.tenant, trace_id, next(iter(words(TRACEPARENT_KEY)), ""), grant.key, route)

    async def finished(self, timeout_s: float) -> None:
        """Wait until no call is open, but no longer than this."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()

    def _client_told(
        self, context: grpc.aio.ServicerContext, metadata: Sequence[tuple[str, str | bytes]]
    ) -> AbstractContextManager[object]:
        """Add the caller's address to the block's lines in the log, if the operator wants it."""
        if not self.edge.log_client_address:
            return nullcontext()
        forwarded = (str(value) for key, value in metadata if key == FORWARDED_KEY)
        return bound_contextvars(client=self.edge.proxies.client(address_in(context.peer()), forwarded))

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._open += 1
        self._none_open.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._none_open.set()

    def _told(self, exc: Exception, method: str, trace_id: str) -> GlimpseError:
        if isinstance(exc, GlimpseError):
            return exc
        log.error("fault", request_id=trace_id, method=method, exc_info=exc)
        return internal_error(trace_id)
