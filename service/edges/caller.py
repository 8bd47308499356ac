"""What every transport finds out about its caller: its tenant, the id of its request, and whether it still waits."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from service.core.errors import Cancelled, InvalidRequest

# Names of HTTP headers and of gRPC metadata.
TENANT_KEY = "x-tenant-id"
TRACE_ID_KEY = "x-request-id"

TENANT = re.compile(r"[A-Za-z0-9._:-]{1,64}")
TRACE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
READING_S = 1.0  # beyond the deadline, for a caller that reads its answer slowly


@dataclass(frozen=True, slots=True)
class Caller:
    """The sender of one request."""

    tenant: str  # empty is one of its own
    trace_id: str


def tenant_in(word: str) -> str:
    """The tenant that the caller names; empty for none. Raises InvalidRequest."""
    if word and not TENANT.fullmatch(word):
        raise InvalidRequest(
            "x-tenant-id may hold 1 to 64 letters, digits and . _ : -", param=TENANT_KEY, code="invalid_tenant"
        )
    return word


def trace_id_in(words: Iterable[str]) -> str:
    """The caller's own id of its request: the first that is a plain word, else a new one."""
    return next(filter(TRACE_ID.fullmatch, words), "") or uuid.uuid4().hex


@asynccontextmanager
async def present(gone: Callable[[], Coroutine[Any, Any, None]], timeout_s: float) -> AsyncIterator[None]:
    """Cancel the block when `gone` returns, or when it outlives the request's timeout. Raises Cancelled.

    The pipeline keeps the request's deadline itself. The timeout here is for a caller that does not take what is sent.
    """
    try:
        async with asyncio.timeout(timeout_s + READING_S) as presence:
            watching = asyncio.create_task(_end(presence, gone))
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError as exc:
        raise Cancelled("the caller went away") from exc


async def _end(presence: asyncio.Timeout, gone: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await gone()
    with suppress(RuntimeError):  # the block ended meanwhile
        presence.reschedule(asyncio.get_running_loop().time())
