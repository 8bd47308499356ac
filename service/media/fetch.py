"""Fetch images, videos and documents from URLs that callers name, and from nowhere that the operator did not allow.

A URL is a caller's way to make this server open a connection. So each hop is checked by itself: scheme, host, port and
every address of the host. The connection then goes to an address that was checked, and no second look-up happens. The
TLS certificate is still verified for the name. The bytes are counted as they arrive and go the way of uploaded ones.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import httpcore
import httpx

from service.core.errors import GlimpseError, InvalidImage, InvalidRequest, Overloaded, TooLarge
from service.media.addresses import Network, is_allowed
from service.media.clip_header import CLIP_NAMES, clip_format
from service.media.foreign import Wanted, found_in
from service.media.formats import PDF_MARK_WITHIN_BYTES, SENT, format_of, reads_as_pdf
from service.telemetry.metrics import Metrics

MAX_URL_CHARS = 4096
MAX_REDIRECTS = 3
MAX_ADDRESSES = 4  # tried of one host
CONNECT_S = 2.0  # for one address
# Of an answer before its body, with all interim answers (1xx), of which HTTP allows any number. They are read in small
# pieces, because a piece of nothing but interim answers takes long to parse.
MAX_HEAD_BYTES = 32 * 1024
HEAD_PIECE_BYTES = 4 * 1024
FIRST_BYTES = PDF_MARK_WITHIN_BYTES  # enough to see that the file is nothing that is read
# Parsing a piece of a body takes the same time however small it is. So a body may have this many pieces, and one more
# for each PIECE_BYTES.
FREE_PIECES = 1_000
PIECE_BYTES = 1_024
PIECES_PER_TURN = 32  # of the event loop
REDIRECTS = (301, 302, 303, 307, 308)
HEADERS = (
    (b"user-agent", b"Glimpse"),
    (b"accept", b"image/*, video/*, application/pdf"),
    (b"accept-encoding", b"identity"),
    (b"connection", b"close"),
)
LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
HOST = re.compile(rf"(?:{LABEL}\.)*{LABEL}")
# Resolvers read a host as an IPv4 address if its last label is a number: 127.1, 2130706433, 0x7f.1, 017700000001.
ENDS_IN_A_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
REFUSED, UNREACHABLE = "image_url_refused", "image_url_unreachable"
INSTEAD = "or send the file's bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRules:
    """What may be fetched, and at which cost."""

    hosts: tuple[str, ...]  # lower case: a name, *.example.org for all names below it, or * for all
    max_bytes: int  # of one image
    ports: frozenset[int] = frozenset({443})
    allows_http: bool = False
    private_networks: tuple[Network, ...] = ()
    timeout_s: float = 5.0  # for one image: turn, look-ups, redirects and bytes
    at_once: int = 16
    at_once_of_a_tenant: int = 4  # a tenant that gives its name

    def allows_host(self, host: str) -> bool:
        return any(
            pattern in ("*", host) or (pattern.startswith("*.") and host.endswith(pattern[1:]))
            for pattern in self.hosts
        )


@dataclass(frozen=True, slots=True)
class Target:
    """One hop's address in parts. They are checked and then used as they are, so nothing reads the URL twice."""

    scheme: Literal["https", "http"]
    host: str
    port: int
    path: bytes  # with the query
    url: httpx.URL  # to resolve a redirect against


class Resolve(Protocol):
    """Return all addresses of a host. Raises OSError."""

    async def __call__(self, host: str, port: int) -> Sequence[str]: ...


class SystemResolver:
    """Ask the system, in threads of its own: a slow name server holds up no other work of the process."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="resolve")

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self._look_up, host, port)
        return list(dict.fromkeys(found))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _look_up(self, host: str, port: int) -> list[str]:
        """An address with a scope keeps it, as in `fe80::1%2`."""
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [
            f"{address[0]}%{address[3]}"
            if len(address) == 4 and address[3] and "%" not in str(address[0])
            else str(address[0])
            for *_, address in answers
        ]


class Head:
    """Count what a server sends before the body of its answer."""

    def __init__(self) -> None:
        self.is_read = False  # whether the body has begun
        self._left = MAX_HEAD_BYTES

    def take(self, nbytes: int) -> None:
        """Raises RemoteProtocolError for a head that is too large."""
        self._left -= nbytes
        if self._left < 0:
            raise httpcore.RemoteProtocolError(f"the answer's head has more than {MAX_HEAD_BYTES:,} bytes")


class HeadLimit(httpcore.AsyncNetworkStream):
    """A connection that bounds the head of the answer."""

    def __init__(self, stream: httpcore.AsyncNetworkStream, head: Head) -> None:
        self._stream = stream
        self._head = head

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        if self._head.is_read:
            return await self._stream.read(max_bytes, timeout)
        data = await self._stream.read(min(max_bytes, HEAD_PIECE_BYTES), timeout)
        self._head.take(len(data))
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> httpcore.AsyncNetworkStream:
        return HeadLimit(await self._stream.start_tls(ssl_context, server_hostname, timeout), self._head)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connect to addresses that were checked, whatever host the client names."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.head = Head()
        self._addresses = addresses
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 (the name was resolved before)
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's interface)
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        last: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                stream = await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
                return HeadLimit(stream, self.head)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                last = exc
        raise last


class ImageFetcher:
    """Fetch images. Used from one event loop."""

    def __init__(
        self,
        rules: FetchRules,
        metrics: Metrics,
        *,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: by default the system's certificate authorities, or those of SSL_CERT_FILE."""
        self.rules = rules
        self._metrics = metrics
        self._system = None if resolve else SystemResolver(rules.at_once)
        self._resolve: Resolve = resolve or self._system  # type: ignore[assignment]
        self._tls = tls or ssl.create_default_context()
        self._turns = asyncio.Semaphore(rules.at_once)
        self._tenants: dict[str, tuple[asyncio.Semaphore, int]] = {}  # with how many fetches use it

    def close(self) -> None:
        if self._system is not None:
            self._system.close()

    async def fetch(self, url: str, tenant: str, reserve: Callable[[int], None], wanted: Wanted = "image") -> bytes:
        """Return the file's bytes, which begin like an image or a document that can be decoded, or like a video.

        `reserve` is called with a number of bytes before they are kept, and may raise. Raises InvalidRequest for a URL
        that is not allowed or does not answer, InvalidImage, TooLarge, Overloaded.
        """
        try:
            data = await self._fetch(url, tenant, reserve, wanted)
        except GlimpseError as error:
            self._metrics.image_fetches.labels(error.code).inc()
            raise
        self._metrics.image_fetches.labels("ok").inc()
        return data

    async def _fetch(self, url: str, tenant: str, reserve: Callable[[int], None], wanted: Wanted) -> bytes:
        target = target_of(url, self.rules)
        has_turn = False
        try:
            async with asyncio.timeout(self.rules.timeout_s), self._turn(tenant):
                has_turn = True
                return await self._follow(target, reserve, wanted)
        except TimeoutError as exc:
            if not has_turn:
                raise Overloaded(
                    "the server already fetches as many images from URLs as it may at once: try again in a few "
                    "seconds, or send the image's bytes",
                    code="saturated",
                ) from exc
            raise _unreachable(
                f"{target.host} did not send the image within {self.rules.timeout_s:g} s: check the URL, {INSTEAD}"
            ) from exc

    async def _follow(self, target: Target, reserve: Callable[[int], None], wanted: Wanted) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            addresses = await self._addresses(target)
            async with self._response(target, addresses) as response:
                if response.status not in REDIRECTS:
                    return await self._body(target.host, response, reserve, wanted)
                location = _header(response, b"location")
            target = redirected(target, location, self.rules)
        raise _refused(
            f"it is redirected more than {MAX_REDIRECTS} times: send the address where the redirects end, {INSTEAD}"
        )

    async def _addresses(self, target: Target) -> Sequence[str]:
        """Resolve the host. All of its addresses must be allowed, else none is used. Raises InvalidRequest."""
        try:
            addresses = await self._resolve(target.host, target.port)
        except (OSError, UnicodeError) as exc:
            raise _nowhere(target.host, f"{target.host}: {exc}") from exc
        forbidden = [each for each in addresses if not is_allowed(each, self.rules.private_networks)]
        if forbidden or not addresses:
            raise _nowhere(target.host, f"{target.host} has the addresses {list(addresses)}, forbidden: {forbidden}")
        return addresses[:MAX_ADDRESSES]

    @asynccontextmanager
    async def _response(self, target: Target, addresses: Sequence[str]) -> AsyncIterator[httpcore.Response]:
        """Send the request on a connection of its own. Raises InvalidRequest, also for a body that breaks off."""
        url = httpcore.URL(
            scheme=target.scheme.encode(), host=target.host.encode(), port=target.port, target=target.path
        )
        backend = PinnedBackend(addresses)
        waits = dict.fromkeys(("read", "write", "pool"), self.rules.timeout_s) | {"connect": CONNECT_S}
        try:
            async with (
                httpcore.AsyncConnectionPool(self._tls, network_backend=backend) as pool,
                pool.stream("GET", url, headers=list(HEADERS), extensions={"timeout": waits}) as response,
            ):
                backend.head.is_read = True
                yield response
        # httpcore translates an SSLError of the handshake only. In TLS 1.3 a server may refuse the client after it.
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, ssl.SSLError) as exc:
            raise _broken(target.host, exc) from exc

    async def _body(
        self, host: str, response: httpcore.Response, reserve: Callable[[int], None], wanted: Wanted
    ) -> bytes:
        """Read the body up to the limits. Raises InvalidRequest, InvalidImage, TooLarge, and what `reserve` raises."""
        if response.status != 200:
            raise _unreachable(f"{host} answered with status {response.status}: check the URL, {INSTEAD}")
        if _header(response, b"content-encoding").lower() not in (b"", b"identity"):
            raise _refused(f"{host} sent it compressed: serve the file as it is, {INSTEAD}")
        length = _header(response, b"content-length")
        if length.isdigit() and int(length[:20]) > self.rules.max_bytes:
            raise self._too_large(host)
        body, pieces, is_known = bytearray(), 0, False
        async for piece in response.aiter_stream():
            pieces += 1
            if len(body) + len(piece) > self.rules.max_bytes:
                raise self._too_large(host)
            if pieces > FREE_PIECES + len(body) // PIECE_BYTES:
                raise _refused(f"{host} sent it in pieces of a few bytes: serve it in larger ones, {INSTEAD}")
            reserve(len(piece))
            body += piece
            if not is_known and len(body) >= FIRST_BYTES:
                require_wanted(host, body, wanted)
                is_known = True
            if pieces % PIECES_PER_TURN == 0:
                await asyncio.sleep(0)
        if not is_known:
            require_wanted(host, body, wanted)
        return bytes(body)

    def _too_large(self, host: str) -> TooLarge:
        return TooLarge(
            f"the image at {host} has more than {self.rules.max_bytes:,} bytes: send a smaller one", param="image"
        )

    @asynccontextmanager
    async def _turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait until the tenant, and the service, may fetch one more."""
        async with AsyncExitStack() as turns:
            if tenant:
                own, users = self._tenants.get(tenant, (asyncio.Semaphore(self.rules.at_once_of_a_tenant), 0))
                self._tenants[tenant] = own, users + 1
                turns.callback(self._leave, tenant)
                await turns.enter_async_context(own)
            await turns.enter_async_context(self._turns)
            yield

    def _leave(self, tenant: str) -> None:
        own, users = self._tenants.pop(tenant)
        if users > 1:
            self._tenants[tenant] = own, users - 1


def target_of(url: str, rules: FetchRules) -> Target:
    """Read a caller's URL and check all that it says. Raises InvalidRequest."""
    if len(url) > MAX_URL_CHARS:
        raise _refused(f"it has more than {MAX_URL_CHARS:,} characters: send a shorter one, {INSTEAD}")
    if "\\" in url or any(character.isspace() or not character.isprintable() for character in url):
        raise _refused("it has a character that no URL has: percent-encode it")
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as exc:
        raise _refused(f"it is not a valid URL: check it, {INSTEAD}") from exc
    return _checked(parsed, rules)


def redirected(target: Target, location: bytes, rules: FetchRules) -> Target:
    """Read where a redirect leads, and check that as the first URL was. Raises InvalidRequest."""
    if not location:
        raise _unreachable(f"{target.host} redirects to nowhere: check the URL, {INSTEAD}")
    try:
        joined = str(target.url.join(location.decode()))
    except (httpx.InvalidURL, ValueError) as exc:
        raise _refused(
            f"{target.host} redirects to something that is not a URL: {INSTEAD.removeprefix('or ')}"
        ) from exc
    return target_of(joined, rules)


def require_wanted(host: str, start: bytes | bytearray, wanted: Wanted) -> None:
    """Look at the bytes, not at what the server calls them. Raises InvalidImage."""
    head = bytes(start)
    if not head:
        raise InvalidImage(f"the file at {host} is empty: check the URL, {INSTEAD}", param="image")
    if wanted == "video":
        if clip_format(head) is None:
            raise InvalidImage(f"the file at {host} is {found_in(head, wanted)}; send {CLIP_NAMES}", param="image")
    elif format_of(head) is None and not reads_as_pdf(head):
        raise InvalidImage(f"the file at {host} is {found_in(head)}; {SENT}", param="image")


def _checked(url: httpx.URL, rules: FetchRules) -> Target:
    scheme, host = url.scheme, url.raw_host.decode("ascii").lower().removesuffix(".")
    if scheme != "https" and not (scheme == "http" and rules.allows_http):
        also = " or http" if rules.allows_http else ""
        raise _refused(f"its scheme is {scheme[:20] or 'missing'}: send an https{also} URL, {INSTEAD}")
    if url.userinfo:
        raise _refused(f"it has a user name or a password: leave them out, {INSTEAD}")
    if not HOST.fullmatch(host) or len(host) > 253 or ENDS_IN_A_NUMBER.fullmatch(host):
        raise _refused(f"its host is an address or no valid name: send a URL with the server's name, {INSTEAD}")
    if not rules.allows_host(host):
        raise _refused(f"this server does not fetch from {host}: ask its operator to allow that host, {INSTEAD}")
    port = {"https": 443, "http": 80}[scheme] if url.port is None else url.port
    if port not in rules.ports:
        raise _refused(f"this server does not fetch from port {port}: serve the image at another port, {INSTEAD}")
    return Target("http" if scheme == "http" else "https", host, port, url.raw_path, url)


def _header(response: httpcore.Response, name: bytes) -> bytes:
    return next((value for each, value in response.headers if each.lower() == name), b"").strip()


def _refused(why: str, cause: str = "") -> InvalidRequest:
    return InvalidRequest(f"the image's URL is not fetched: {why}", param="image", code=REFUSED, cause=cause)


def _unreachable(why: str, cause: str = "") -> InvalidRequest:
    return InvalidRequest(f"the image's URL does not lead to it: {why}", param="image", code=UNREACHABLE, cause=cause)


def _nowhere(host: str, cause: str) -> InvalidRequest:
    """One answer for a name that does not exist and for one of a private network: the caller learns nothing of it."""
    return _refused(f"{host} has no public address: check the URL, {INSTEAD}", cause)


def _broken(host: str, exc: Exception) -> InvalidRequest:
    cause = f"{type(exc).__name__}: {exc}"
    if any(isinstance(each, ssl.SSLCertVerificationError) for each in _causes(exc)):
        return _unreachable(f"{host} has no certificate that can be verified: mend it, {INSTEAD}", cause)
    if isinstance(exc, httpcore.ConnectError | httpcore.ConnectTimeout):
        return _unreachable(f"no connection to {host} could be opened: check the URL, {INSTEAD}", cause)
    return _unreachable(f"{host} broke off or did not answer in HTTP: check the URL, {INSTEAD}", cause)


def _causes(exc: BaseException | None) -> Iterator[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__
