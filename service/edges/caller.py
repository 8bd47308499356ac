"""Find out about the caller of any transport: its tenant, its request's id, and whether it is still there."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from service.core.access import Authenticator, Grant, Scope
from service.core.errors import Cancelled, Forbidden, InvalidRequest, Unauthenticated, no_complete_answer
from service.core.variant import ANY, Route

# Names of HTTP headers and of gRPC metadata.
TENANT_KEY = "x-tenant-id"
TRACE_ID_KEY = "x-request-id"
AUTHORIZATION_KEY = "authorization"
API_KEY_KEY = "x-api-key"
KEY_HEADERS = (AUTHORIZATION_KEY, API_KEY_KEY)
BEARER = "bearer"
TRACEPARENT_KEY = "traceparent"
VARIANT_KEY = "x-glimpse-variant"  # of a request: the variant that must answer; of an answer: the one that did
SESSION_KEY = "x-session-id"  # questions of one session stay with one variant

TENANT = re.compile(r"[A-Za-z0-9._:-]{1,64}")
TRACE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
READING_S = 1.0  # time after the deadline for a caller that reads its answer slowly


@dataclass(frozen=True, slots=True)
class Caller:
    """Name the sender of one request."""

    tenant: str  # callers without a name have the empty name: one tenant
    trace_id: str
    traceparent: str = ""  # the caller's span, as W3C Trace Context writes it; the tracer checks it
    key: str = ""  # the public id of its key
    route: Route = ANY  # which variant may answer


NOBODY = Caller("", "")


def tenant_in(word: str) -> str:
    """Check and return the tenant's name; it is empty if the caller gives none. Raises InvalidRequest."""
    if word and not TENANT.fullmatch(word):
        raise InvalidRequest(
            "x-tenant-id is too long or has other characters: send 1 to 64 letters, digits and . _ : -",
            param=TENANT_KEY,
            code="invalid_tenant",
        )
    return word


def key_in(authorizations: Sequence[str], api_keys: Sequence[str]) -> str:
    """Return the one key of `authorization` and `x-api-key`, empty if there is none. Raises Unauthenticated."""
    found = {key.strip() for key in api_keys}
    for word in authorizations:
        scheme, _, key = word.strip().partition(" ")
        if scheme.lower() != BEARER:
            raise Unauthenticated(
                "the authorization header has another scheme than Bearer: send `Authorization: Bearer KEY`",
                code="invalid_authorization",
            )
        found.add(key.strip())
    found.discard("")
    if len(found) > 1:
        raise Unauthenticated(
            "the request has several different API keys: send one, in authorization or in x-api-key",
            code="invalid_authorization",
        )
    return found.pop() if found else ""


def admitted(access: Authenticator, key: Callable[[], str], scope: Scope | None, tenant: str) -> Grant:
    """Return what the caller may do. `key` reads its key; `scope` is what it asks for; `tenant` is its own word.

    Without keys the word is believed. With keys the key has the tenant, and another word is refused. Raises
    Unauthenticated, Forbidden, Unavailable, InvalidRequest.
    """
    if not access.has_keys:
        return Grant(tenant_in(tenant))
    grant = access.grant(key())
    require_scope(grant, scope)
    if tenant and tenant != grant.tenant:
        raise Forbidden(
            "x-tenant-id names another tenant than the API key's: leave it out", param=TENANT_KEY, code="wrong_tenant"
        )
    return grant


def require_scope(grant: Grant, scope: Scope | None) -> None:
    """Raises Forbidden."""
    if scope is not None and not grant.allows(scope):
        raise Forbidden(f"the API key has no scope {scope}: ask the operator for a key that has it")


def route_in(variants: Sequence[str], sessions: Sequence[str]) -> Route:
    """Return the variant and the session that the caller names, if any. Raises InvalidRequest."""
    session = next(filter(None, sessions), "")
    if session and not TRACE_ID.fullmatch(session):
        raise InvalidRequest(
            "x-session-id is too long or has other characters: send 1 to 128 letters, digits and . _ : -",
            param=SESSION_KEY,
            code="invalid_session",
        )
    return Route(variant=next(filter(None, variants), ""), session=session)


def trace_id_in(words: Iterable[str]) -> str:
    """Return the caller's own id of its request: the first well-formed one, else a new one."""
    return next(filter(TRACE_ID.fullmatch, words), "") or uuid.uuid4().hex


@asynccontextmanager
async def present(gone: Callable[[], Coroutine[Any, Any, None]], timeout_s: float) -> AsyncIterator[None]:
    """Cancel the block when `gone` returns, or when it outlives the request's timeout.

    The pipeline enforces the request's deadline itself. The timeout here is for a caller that does not read its answer,
    and for a loop that stood still past the deadline. Raises Cancelled if the caller is gone, else DeadlineExceeded.
    """
    is_gone = False

    async def watch(presence: asyncio.Timeout) -> None:
        nonlocal is_gone
        await gone()
        is_gone = True
        if not presence.expired():
            presence.reschedule(asyncio.get_running_loop().time())

    try:
        async with asyncio.timeout(timeout_s + READING_S) as presence:
            watching = asyncio.create_task(watch(presence))
            try:
                yield
            finally:
                watching.cancel()
    except TimeoutError as exc:
        if not presence.expired():
            raise
        if is_gone:
            raise Cancelled("the caller went away") from exc
        raise no_complete_answer(timeout_s) from exc
