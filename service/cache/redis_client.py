"""Talk to Redis: the only file that imports Redis's client. Every error of the client leaves it as RedisFault.

No answer depends on Redis, so nothing here retries: a request has milliseconds for Redis and then goes on without it.

A URL that begins with redis+cluster:// or rediss+cluster:// names any node of a Redis Cluster. redis-py follows moved
slots, and reads the map of slots again after every fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal, cast
from urllib.parse import urlsplit

import redis.exceptions as foreign
import structlog
from limits.aio.storage import RedisClusterStorage, RedisStorage
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = structlog.get_logger()

Kind = Literal["timeout", "unreachable", "denied", "full", "refused", "fault"]
Command = tuple[str | bytes | int, ...]
Reply = Any  # bytes, int, True, None, or a dict from INFO; RedisFault if this one command failed

COUNTERS = "glimpse:quota"  # begins the keys of counters
CLUSTER = "+cluster"  # ends the scheme of a URL
MOST_TOGETHER = 4  # callers in one pipeline; 16 records of 180 KB take twice as long in one pipeline as in four
PORT = 6379  # if a URL names none
BAD_PLACE = (
    "its host or port cannot be read: correct them; in a password, write all but letters and digits as %2F for /, %40 "
    "for @, and so on"
)
CONNECT_TIMEOUT_S = 1.0  # for the socket; callers have shorter timeouts

# The first row that matches counts.
KINDS: tuple[tuple[type[BaseException], Kind], ...] = (
    (foreign.AuthenticationError, "denied"),
    (foreign.AuthorizationError, "denied"),
    (foreign.NoPermissionError, "denied"),
    (foreign.OutOfMemoryError, "full"),
    (foreign.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (foreign.ConnectionError, "unreachable"),
    (OSError, "unreachable"),
    (UnicodeError, "unreachable"),  # of the resolver: a part of the host's name is empty or too long
    (foreign.RedisError, "refused"),
)


# Redis 7.0 and later ones, of a script's command. The client has no error of its own for it.
DENIED_IN_SCRIPT = ("The user executing the script can't", "ACL failure in script")


class RedisFault(Exception):
    """`kind` is a metric's label. The message is for the log and holds no password.

    `is_refusal`: the connection is in order, and Redis refuses this one command.
    """

    def __init__(self, kind: Kind, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.is_refusal = is_refusal


def was_closed(error: BaseException) -> bool:
    """Whether the connection was closed since its last use, so that nothing was sent. It is uvloop's error."""
    return isinstance(error, RuntimeError) and "handler is closed" in str(error)


def fault_of(error: BaseException) -> RedisFault:
    kind = next((kind for foreigner, kind in KINDS if isinstance(error, foreigner)), None)
    if was_closed(error):
        kind = "unreachable"
    if kind == "refused" and any(words in str(error) for words in DENIED_IN_SCRIPT):
        kind = "denied"
    if kind is None:  # a bug in the client: it must not fail a request, so it is only logged
        log.error("redis_client_fault", exc_info=error)
    is_refusal = isinstance(error, foreign.ResponseError) and not isinstance(error, foreign.ClusterDownError)
    return RedisFault(kind or "fault", str(error) or type(error).__name__, is_refusal=is_refusal)


def counters(url: str) -> RedisStorage:
    """Return the `limits` library's counters in Redis, which connect at their first command.

    `connect` must accept the URL.
    """
    options = client_options()
    url = with_port(url)
    if is_cluster(url):
        if url.startswith("rediss"):
            url, options["ssl"] = url.replace("rediss", "redis", 1), True
        return RedisClusterStorage(f"async+{url}", implementation="redispy", key_prefix=COUNTERS, **options)
    scheme = "async+redis+" if url.startswith("unix://") else "async+"
    return RedisStorage(scheme + url, implementation="redispy", key_prefix=COUNTERS, **options)


def with_port(url: str) -> str:
    """Name the port that the counters' library has no default for."""
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.port is not None or not parts.hostname:
        return url
    return parts._replace(netloc=f"{parts.netloc.removesuffix(':')}:{PORT}").geturl()


async def close_counters(storage: RedisStorage) -> None:
    """Close the counters' connections."""
    with suppress(foreign.RedisError, OSError):
        await cast(Any, storage.bridge).get_connection().aclose()


def is_cluster(url: str) -> bool:
    return url.partition("://")[0].endswith(CLUSTER)


def connect(url: str) -> Redis | RedisCluster:
    """Make a client, which connects at its first command. Raises ValueError for a URL that cannot be used."""
    options = client_options()
    try:
        _ = urlsplit(url).port
    except ValueError:  # its message may show a part of the password
        raise ValueError(BAD_PLACE) from None
    try:
        if is_cluster(url):
            return RedisCluster.from_url(url.replace(CLUSTER, "", 1), **options)
        client = Redis.from_url(url, **options)
        pool = cast(Any, client.connection_pool)
        pool.make_connection()  # else its first command tells an option that it does not know
    except TypeError as exc:
        raise ValueError(f"it has an option that Redis's client does not know ({exc})") from exc
    except (ValueError, foreign.RedisError, foreign.RedisClusterException) as exc:
        raise ValueError(str(exc).partition("\n")[0]) from exc
    return client


def client_options() -> dict[str, Any]:
    return {
        "protocol": 2,
        "driver_info": None,
        "retry": Retry(NoBackoff(), 0),
        # Callers have their own timeouts. With a number here, redis-py writes under asyncio.wait_for, which before
        # Python 3.12 can swallow a cancellation: a lane would then outlive its owner.
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
    }


async def primaries(url: str) -> list[str]:
    """Return the URLs of all nodes that hold keys: the one Redis, or each primary of a cluster. Raises RedisFault."""
    if not is_cluster(url):
        return [url]
    client = connect(url)
    assert isinstance(client, RedisCluster)
    try:
        async with asyncio.timeout(2 * CONNECT_TIMEOUT_S):
            await client.initialize()
        parts = urlsplit(url.replace(CLUSTER, "", 1))
        secret = parts.netloc.rpartition("@")[0]
        return [
            parts._replace(netloc=f"{secret}@{node.name}" if secret else node.name).geturl()
            for node in client.get_primaries()
        ]
    except Exception as exc:  # every fault of the client's: see fault_of
        raise fault_of(exc) from exc
    finally:
        await client.aclose()


class Lane:
    """One connection. Commands that arrive while it is busy go out in one pipeline, in order of arrival.

    Only `run` uses the connection, so a caller that gives up or is cancelled never leaves half a reply in it.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._client = connect(url)
        self._timeout_s = timeout_s  # for one pipeline
        self._waiting: asyncio.Queue[tuple[Sequence[Command], asyncio.Future[list[Reply]]]] = asyncio.Queue()

    async def ask(self, *commands: Command) -> list[Reply]:
        """Send commands and return their replies, in order. Raises RedisFault if the connection fails."""
        answer: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((commands, answer))
        return await answer

    async def run(self) -> None:
        """Serve callers until cancelled."""
        try:
            while True:
                together = [await self._waiting.get()]
                while len(together) < MOST_TOGETHER and not self._waiting.empty():
                    together.append(self._waiting.get_nowait())
                wanted = [(commands, answer) for commands, answer in together if not answer.done()]
                if wanted:
                    await self._answer(wanted)
        finally:
            with suppress(foreign.RedisError, OSError):  # a TLS peer that is paused does not close its side
                await self._client.aclose()

    async def _answer(self, wanted: Sequence[tuple[Sequence[Command], asyncio.Future[list[Reply]]]]) -> None:
        try:
            replies = iter(await self._pipeline([command for commands, _ in wanted for command in commands]))
        except RedisFault as fault:
            for _, answer in wanted:
                if not answer.done():
                    answer.set_exception(RedisFault(fault.kind, fault.message))
            return
        for commands, answer in wanted:
            own = [next(replies) for _ in commands]
            if not answer.done():
                answer.set_result(own)

    async def _pipeline(self, commands: Sequence[Command]) -> list[Reply]:
        """Send commands in one pipeline -> their replies. Raises RedisFault."""
        try:
            async with asyncio.timeout(self._timeout_s):
                try:
                    replies = await self._sent(commands)
                except RuntimeError as exc:
                    if not was_closed(exc):
                        raise
                    replies = await self._sent(commands)
        except Exception as exc:  # every fault of the client's: see fault_of
            await self._forget_slots()
            raise fault_of(exc) from exc
        if any(isinstance(reply, foreign.ConnectionError) for reply in replies):  # of one node
            await self._forget_slots()
        return [fault_of(reply) if isinstance(reply, Exception) else reply for reply in replies]

    async def _sent(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    async def _forget_slots(self) -> None:
        """Make the next command read a cluster's map of slots again, as a node may have been replaced."""
        if isinstance(self._client, RedisCluster):
            with suppress(foreign.RedisError, OSError):  # TimeoutError too
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._client.aclose()


def granted(reply: Reply) -> Reply:
    """Return the reply. Raises RedisFault if it is one."""
    if isinstance(reply, RedisFault):
        raise reply
    return reply
