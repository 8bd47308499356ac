"""What a connection may cost before the application sees a request: bytes, counts, time, and how many there are.

uvicorn and httptools read HTTP, but bound neither the headers nor the time for them (slowloris), nor pipelined
requests, nor writes to a client that never reads. A refusal here has the same body as any other error, and closes the
connection.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import resource
import termios
from collections.abc import Callable, Sequence
from typing import Any, cast

import httptools
import structlog
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.core.errors import InvalidRequest, Overloaded, SlowBody, Unavailable, status_of, without_frames
from service.edges.http.body import declared_bytes
from service.edges.http.connections import Connections
from service.edges.http.cors import early_headers
from service.edges.http.edge import ConnectionLimits, Edge
from service.edges.http.listener import Held
from service.edges.http.respond import OPEN_REQUESTS
from service.edges.http.rounds import Rounds
from service.edges.http.schema import ErrorBody, WireError

log = structlog.get_logger()

MAX_DISCARDED_BYTES = 1024 * 1024  # of a client that goes on sending after it was refused
HELD = 8192  # refused callers that are left without a response for a while: see the listener
OTHER_FILES = 256  # besides connections: Triton's channels, Redis, logs, libraries
ERROR_TYPES = {408: SlowBody.type, 429: Overloaded.type, 503: Unavailable.type}
Count = Callable[[str, str, str], None]  # of one HTTP request: its method, route and status


class Protocols:
    """What uvicorn calls for each connection."""

    def __init__(self, edge: Edge) -> None:
        limits = edge.connections
        most = most_connections(limits.max_connections)
        self.held = Held(most_held(most), limits.held_s)
        most_per_address = min(most, limits.max_connections_per_address)
        self.connections: Connections[LimitedProtocol] = Connections(
            most,
            most_per_address,
            limits.replaced_per_address_s,
            LimitedProtocol.has_sent,
            edge.proxies.__contains__,
        )
        self.rounds: Rounds[LimitedProtocol] = Rounds(limits.check_interval_s, LimitedProtocol.check)
        self._edge = edge

    def __call__(self, *args: Any, **kwargs: Any) -> LimitedProtocol:
        return LimitedProtocol(
            *args,
            limits=self._edge.connections,
            open_connections=self.connections,
            rounds=self.rounds,
            count=self._edge.count,
            cors_origins=self._edge.cors_origins,
            overload=self._overload,
            **kwargs,
        )

    def _overload(self, open_requests: int, nbytes: int | None) -> Overloaded | None:
        try:
            self._edge.pipeline.refuse_early(open_requests, self._edge.lag_s(), nbytes)
        except Overloaded as error:
            # Its frames would keep the connection and what it has sent until the next garbage collection.
            return error.with_traceback(None)
        return None


def limited_protocol(edge: Edge) -> type[asyncio.Protocol]:
    return cast(type[asyncio.Protocol], Protocols(edge))


def most_connections(wanted: int) -> int:
    """Raise the process's limit of open files as far as `wanted` connections need, and say how many it allows."""
    needed = wanted + OTHER_FILES
    files = open_files(needed)
    if files >= needed:
        return wanted
    most = max(1, files - OTHER_FILES, files // 2)
    log.warning(
        "few_open_files",
        open_files=files,
        max_connections=most,
        mend=f"for {wanted} connections raise the limit of open files to {needed} (ulimit -n, LimitNOFILE=)",
    )
    return most


def most_held(connections: int) -> int:
    """How many files there may be for refused callers, besides those that so many connections need."""
    needed = connections + OTHER_FILES
    return max(0, min(HELD, open_files(needed + HELD) - needed))


def open_files(needed: int) -> int:
    """Raise the process's limit as far as is needed, and return it; a limit that is none is as many as needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return needed if soft == resource.RLIM_INFINITY else soft


class _Refused(Exception):
    """The request breaks a limit; raised inside the parser's callbacks."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Flow(FlowControl):
    """Does not read while it is held, whoever wants to."""

    held = False
    unread = False  # whether it waits for the client to read

    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()

    def read_when_writable(self) -> None:
        """Read on once the client has read most of what was written."""
        if self.write_paused:
            self.unread = True
            self.pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.unread:
            self.unread = False
            self.resume_reading()

    def hold(self, held: bool) -> None:
        self.held = held
        if held:
            self.pause_reading()
        else:
            self.resume_reading()


class _Transport:
    """A connection's transport as uvicorn uses it, except that its end does not lose the last response.

    The kernel resets a connection that is closed while something that came is not read. The client then loses what it
    has not read either. A response's head waits for its body until the loop's next turn: one system call instead of
    two, for the client too.
    """

    def __init__(
        self, inner: asyncio.Transport, linger: Callable[[], bool], call_soon: Callable[[Callable[[], None]], object]
    ) -> None:
        """`linger` says whether the client may still be sending; then the connection is ended later."""
        self.inner = inner
        self._linger = linger
        self._call_soon = call_soon
        self._head = b""
        self._is_ending = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        elif data.endswith(b"\r\n\r\n") and data.startswith(b"HTTP/"):
            self._head = data
            self._call_soon(self._send_head)
            return
        if not self.inner.is_closing():  # uvicorn tells the end of a connection to its last request only
            self.inner.write(data)

    def _send_head(self) -> None:
        if self._head and not self.inner.is_closing():
            self.inner.write(self._head)
        self._head = b""

    def forget_protocol(self) -> None:
        """Once the connection is lost. Else both would wait for the garbage collector, with all they hold."""
        self._linger = bool

    def is_closing(self) -> bool:
        return self._is_ending or self.inner.is_closing()

    def close(self) -> None:
        self._send_head()
        if self.is_closing() or not self._linger():
            self.inner.close()
            return
        self._is_ending = True
        if self.inner.can_write_eof():
            self.inner.write_eof()


class LimitedProtocol(HttpToolsProtocol):
    """HTTP/1.1 on one connection, within the limits. An Upgrade is ignored: nothing here offers one."""

    def __init__(
        self,
        *args: Any,
        limits: ConnectionLimits,
        open_connections: Connections[LimitedProtocol],
        rounds: Rounds[LimitedProtocol],
        count: Count,
        cors_origins: Sequence[str],
        overload: Callable[[int, int | None], Overloaded | None],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.open_connections = open_connections
        self.rounds = rounds
        self.count = count
        self.cors_origins = cors_origins
        self.overload = overload
        # A head is everything up to the blank line, with any empty lines before it.
        self._head_bytes = 0  # at least so many of the head that is not whole yet
        self._head_since: float | None = None
        self._heads = 0  # that were whole
        self._begun = False  # a head has, and is not whole
        self._in_body = False  # a head was whole, its message is not
        self._fields = self._field_bytes = 0  # headers and trailers of the message
        self._bodiless_bytes = 0  # that came since the last bytes of the body
        self._deaf = False  # bytes that arrive are discarded
        self._discarded_bytes = 0
        self._end_at: float | None = None  # the connection ends then, whatever the client does
        self._unsent, self._unsent_since = 0, 0.0
        self._is_answered = False  # the request that is being read, at once
        self._answered = 0  # at once, of the bytes that came last

    # The connection's life.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        ending = cast(asyncio.Transport, _Transport(transport, self._linger, self.loop.call_soon))
        super().connection_made(ending)
        self.flow = _Flow(ending)
        now = self.loop.time()
        self._head_since = self._unsent_since = now
        self.rounds.add(self, now)
        has_room, spare = self.open_connections.enter(self, self.client[0] if self.client else "")
        if spare is not None:
            spare.transport.abort()
        if not has_room:
            self._refuse(503, "too_many_connections", "the server has too many connections: try again in a few seconds")
            transport.close()

    def has_sent(self) -> bool:
        """Whether bytes have come that are not read yet."""
        if self.transport.is_closing():
            return False
        return any(fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.FIONREAD, bytes(4)))

    def connection_lost(self, exc: Exception | None) -> None:
        self.open_connections.leave(self)
        self.rounds.discard(self)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._deaf = True
        cast(_Transport, self.transport).forget_protocol()

    def check(self, now: float) -> None:
        """End what has taken too long. One check of all limits a second costs less than a timer a request."""
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent:
            self._unsent_since = now
        self._unsent = unsent
        if self._head_since is not None and self.flow.read_paused:
            self._head_since = now  # nothing is read of it, so the client is not slow
        if now - self._unsent_since > self.limits.write_timeout_s or (self._end_at is not None and now > self._end_at):
            self.transport.abort()
        elif self._head_since is not None and not self._deaf and now - self._head_since > self.limits.head_timeout_s:
            if self._head_bytes or self._begun:
                limit_s = self.limits.head_timeout_s
                self._refuse(408, "slow_head", f"the request's headers did not come within {limit_s:g} s: try again")
            else:
                self.transport.close()

    # What comes.
    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._answered = 0
        if self._deaf:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.abort()
            return
        try:
            if self._in_body:
                self._feed_body(data)
            else:
                self._feed_head(data)
        except _Refused as refused:
            without_frames(refused)  # with the connection
            self._refuse(refused.status, refused.code, refused.message)
            return
        if self._in_body:
            self._head_since, self._head_bytes = None, 0
        elif self._begun and self._head_since is None:
            self._head_since = self.loop.time()

    def _feed_head(self, data: bytes) -> None:
        """A head that does not end is never read beyond its limit. Raises _Refused."""
        if not self._head_bytes:
            self._head_since = self.loop.time()
        heads, room = self._heads, self.limits.max_head_bytes - self._head_bytes
        self._feed(data[:room] if len(data) > room else data)
        if self._heads == heads:
            self._head_bytes += len(data)
            if len(data) > room:
                raise _head_too_large(self.limits)
            return
        self._head_bytes, self._head_since = 0, None
        if len(data) > room:
            self._feed(data[room:])

    def _feed_body(self, data: bytes) -> None:
        """What goes on between chunks without any body, as trailers do, has the limit of a head. Raises _Refused."""
        self._bodiless_bytes += len(data)
        self._feed(data)
        if self._in_body and self._bodiless_bytes > self.limits.max_head_bytes:
            raise _head_too_large(self.limits)

    def _feed(self, data: bytes) -> None:
        """Raises _Refused."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.parser.get_method() == b"CONNECT":
                raise _Refused(
                    405, "method_not_allowed", "CONNECT is not allowed: this service is not a proxy"
                ) from upgrade
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does, for pipelining
            self._feed(head + data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as exc:
            cause = exc.__context__
            if isinstance(cause, _Refused):
                raise cause from exc
            raise _not_http() from exc
        except httptools.HttpParserError as exc:
            raise _not_http() from exc

    def _head_without_upgrade(self) -> bytes:
        """The head that the parser has just read, for a new parser: after an Upgrade it would read no body."""
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + self.parser.get_http_version().encode()]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    # What the parser calls. `cycle` is uvicorn's word for a request and its response; it has the latest
    # one, or none while the connection is idle.
    def on_message_begin(self) -> None:
        if max(len(self.pipeline), self._answered) >= self.limits.max_queued_requests:
            raise _Refused(429, "too_many_requests", "the connection has too many requests at once: wait for answers")
        self._unset_keepalive_if_required()  # of a request that was answered at once, in the same bytes
        super().on_message_begin()
        self._begun = True
        self._fields = self._field_bytes = self._bodiless_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.max_url_bytes:
            limit = self.limits.max_url_bytes
            raise _Refused(
                414, "url_too_long", f"the URL is longer than {limit:,} bytes: put what you send into the body"
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._field_bytes += len(name) + len(value) + 4
        if self._fields > self.limits.max_headers:
            limit = self.limits.max_headers
            raise _Refused(431, "too_many_headers", f"the request has more than {limit} headers: send fewer")
        if self._field_bytes > self.limits.max_head_bytes:
            raise _head_too_large(self.limits)
        if not self._in_body:  # a trailer is no header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._heads += 1
        self._begun = False
        self._in_body = True
        self.open_connections.work(self)
        if (refusal := self._refusal()) is not None:
            self._answer_at_once(refusal)
            return
        super().on_headers_complete()
        cast(dict[str, Any], self.scope)[OPEN_REQUESTS] = len(self.tasks)
        if self.pipeline:
            self.flow.hold(True)  # type: ignore[attr-defined]

    def on_body(self, body: bytes) -> None:
        self._bodiless_bytes = 0
        if not self._is_answered:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._in_body = False
        self._end_at = None
        if not self._is_answered:
            super().on_message_complete()
            return
        self._is_answered = False
        self.open_connections.rest(self)
        if self.parser.should_keep_alive():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        else:
            self.transport.close()

    def on_response_complete(self) -> None:
        if self._in_body and not self.pipeline:  # refused before its body had come
            self._end_at = self.loop.time() + self.limits.linger_s
        if len(self.pipeline) <= 1 and not self._deaf:
            self.flow.hold(False)  # type: ignore[attr-defined]
        if not self.pipeline:
            self.open_connections.rest(self)
        super().on_response_complete()
        if self.cycle.response_complete and not self._in_body and not self._begun:
            # An idle connection keeps nothing of its last request, which is half of what the connection takes.
            self.cycle = self.scope = self.headers = None  # type: ignore[assignment]

    def _refusal(self) -> Overloaded | None:
        """Why the request is not even begun."""
        if not self.url.startswith(b"/v1/") or self.parser.get_method() != b"POST":
            return None
        if self.cycle is not None and not self.cycle.response_complete:
            return None  # its turn comes after the responses before it
        return self.overload(len(self.tasks), declared_bytes(self.headers))

    def _answer_at_once(self, error: Overloaded) -> None:
        """Without the application, which takes ten times as long. The connection stays; what the client still sends of
        its request is discarded."""
        self._is_answered = True
        self._answered += 1
        self._end_at = self.loop.time() + self.limits.linger_s
        status, _grpc = status_of(error)
        self.count("POST", "none", str(status))
        body = ErrorBody.of(error).model_dump_json().encode()
        lines = [name + b": " + value for name, value in self.server_state.default_headers]
        lines += self._early_lines()
        lines += [b"content-type: application/json", b"content-length: %d" % len(body)]
        lines += [b"retry-after: %d" % max(1, math.ceil(error.retry_after_s))]
        if not self.parser.should_keep_alive():
            lines.append(b"connection: close")
        self.transport.write(STATUS_LINE[status] + b"\r\n".join([*lines, b"", body]))
        self.flow.read_when_writable()  # type: ignore[attr-defined]

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer, as far as the responses before it allow, and read no more."""
        if self._deaf or self.transport.is_closing():
            return
        self._deaf = True
        self.count("other", "none", str(status))
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if not self._in_body:  # the requests before this one are answered
                cycle.keep_alive = False
                self.flow.hold(True)  # type: ignore[attr-defined]
                return
            if self.pipeline or cycle.response_started:
                self.transport.abort()
                return
            cycle.disconnected = True
            cycle.message_event.set()
        error = WireError(message=message, type=ERROR_TYPES.get(status, InvalidRequest.type), param=None, code=code)
        body = ErrorBody(error=error).model_dump_json().encode()
        lines = [*self._early_lines(), b"content-type: application/json", b"content-length: %d" % len(body)]
        self.transport.write(STATUS_LINE[status] + b"\r\n".join([*lines, b"connection: close", b"", body]))
        self.transport.close()

    def _early_lines(self) -> list[bytes]:
        """Of the request that is being read, as far as its headers have come."""
        sent = self.headers if self._begun or self._in_body else None
        return [name + b": " + value for name, value in early_headers(sent or (), self.cors_origins)]

    def _linger(self) -> bool:
        """Whether the client may still be sending. If so, discard it for a while; a client that reads ends it first."""
        if not self._in_body and not self._deaf:
            return False
        self._deaf = True
        self._end_at = self.loop.time() + self.limits.linger_s
        self.flow.hold(False)  # type: ignore[attr-defined]
        return True


def _head_too_large(limits: ConnectionLimits) -> _Refused:
    return _Refused(
        431, "head_too_large", f"the request's headers are larger than {limits.max_head_bytes:,} bytes: send fewer"
    )


def _not_http() -> _Refused:
    return _Refused(400, "invalid_http", "this is not a valid HTTP/1.1 request: check the client")
