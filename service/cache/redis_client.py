"""The only file that knows Redis's client. Whatever goes wrong there leaves it as RedisFault.

Redis is never needed to answer, so nothing here tries twice: who asks has milliseconds, and goes on without.

A URL that begins with redis+cluster:// or rediss+cluster:// names any node of a Redis Cluster. redis-py follows moved
slots; its map of them is read anew after every fault.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal
from urllib.parse import urlsplit

import redis.exceptions as foreign
import structlog
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

log = structlog.get_logger()

Kind = Literal["timeout", "unreachable", "denied", "full", "refused", "fault"]
Command = tuple[str | bytes | int, ...]
Reply = Any  # bytes, int, True, None, or a dict of INFO's; RedisFault where Redis refused that one command

CLUSTER = "+cluster"  # the end of a URL's scheme
MOST_TOGETHER = 4  # asks in one pipeline; 16 records of 180 KB in one take twice the time of four by four
CONNECT_TIMEOUT_S = 1.0  # for the socket alone; who asks gives up earlier

# The first row that fits.
KINDS: tuple[tuple[type[BaseException], Kind], ...] = (
    (foreign.AuthenticationError, "denied"),
    (foreign.AuthorizationError, "denied"),
    (foreign.NoPermissionError, "denied"),
    (foreign.OutOfMemoryError, "full"),
    (foreign.TimeoutError, "timeout"),
    (TimeoutError, "timeout"),
    (foreign.ConnectionError, "unreachable"),
    (OSError, "unreachable"),
    (foreign.RedisError, "refused"),
)


class RedisFault(Exception):
    """`kind` is a metric's label; the message is for people and holds no password."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


def fault_of(error: BaseException) -> RedisFault:
    kind = next((kind for foreigner, kind in KINDS if isinstance(error, foreigner)), None)
    if kind is None:  # inside the client: no reason to fail a request either, but one to look into
        log.error("redis_client_fault", exc_info=error)
    return RedisFault(kind or "fault", str(error) or type(error).__name__)


def is_cluster(url: str) -> bool:
    return url.partition("://")[0].endswith(CLUSTER)


def connect(url: str) -> Redis | RedisCluster:
    """Starts nothing; connects when first asked. Raises ValueError for what is no address of a Redis."""
    options: dict[str, Any] = {
        "protocol": 2,
        "driver_info": None,
        "retry": Retry(NoBackoff(), 0),
        # Lanes keep the time. With a number here redis-py writes under asyncio.wait_for, which before Python 3.12 can
        # swallow a cancellation: a lane would then outlive its owner.
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
    }
    if not is_cluster(url):
        return Redis.from_url(url, **options)
    try:
        return RedisCluster.from_url(url.replace(CLUSTER, "", 1), **options)
    except foreign.RedisClusterException as exc:  # a database other than 0
        raise ValueError(str(exc)) from exc


async def primaries(url: str) -> list[str]:
    """The addresses of all that hold keys: the one, or every primary of a cluster. Raises RedisFault."""
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
    """One connection. What waits while it is busy goes out in one pipeline, in the order it came.

    Only `run` touches the connection: a caller who gives up or is cancelled never leaves half a reply in it.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._client = connect(url)
        self._timeout_s = timeout_s  # for one pipeline
        self._waiting: asyncio.Queue[tuple[Sequence[Command], asyncio.Future[list[Reply]]]] = asyncio.Queue()

    async def ask(self, *commands: Command) -> list[Reply]:
        """The replies, in order. Raises RedisFault where the connection fails."""
        answer: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((commands, answer))
        return await answer

    async def run(self) -> None:
        """Answers until cancelled."""
        try:
            while True:
                together = [await self._waiting.get()]
                while len(together) < MOST_TOGETHER and not self._waiting.empty():
                    together.append(self._waiting.get_nowait())
                wanted = [(commands, answer) for commands, answer in together if not answer.done()]
                if wanted:
                    await self._answer(wanted)
        finally:
            with suppress(foreign.RedisError, OSError):  # a TLS peer that is paused never says goodbye
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
        """Raises RedisFault."""
        try:
            async with asyncio.timeout(self._timeout_s):
                pipeline = self._client.pipeline(transaction=False)
                for command in commands:
                    pipeline.execute_command(*command)
                replies = await pipeline.execute(raise_on_error=False)
        except Exception as exc:  # every fault of the client's: see fault_of
            await self._forget_slots()
            raise fault_of(exc) from exc
        if any(isinstance(reply, foreign.ConnectionError) for reply in replies):  # one node's
            await self._forget_slots()
        return [fault_of(reply) if isinstance(reply, Exception) else reply for reply in replies]

    async def _forget_slots(self) -> None:
        """The next command reads a cluster's map of slots anew: a node may have been replaced."""
        if isinstance(self._client, RedisCluster):
            with suppress(foreign.RedisError, OSError):  # TimeoutError too
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._client.aclose()


def granted(reply: Reply) -> Reply:
    """The reply. Raises RedisFault where Redis refused the command."""
    if isinstance(reply, RedisFault):
        raise reply
    return reply
