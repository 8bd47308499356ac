"""Define what a caller may do, and what its requests may use, in the same form for every edge."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


# OpenAI's names are requests and tokens, which are the generated ones here.
IN_HEADERS = {
    "requests": "requests",
    "images": "images",
    "visual_tokens": "visual-tokens",
    "generated_tokens": "tokens",
}
QUOTA_HEADERS = tuple(
    f"x-ratelimit-{part}-{name}" for part in ("limit", "remaining", "reset") for name in IN_HEADERS.values()
)


class Scope(StrEnum):
    """Say what a key allows. ADMIN allows everything that the others do."""

    ASK = "ask"
    UPLOAD = "upload"
    METRICS = "metrics"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Grant:
    """Say who a caller is and what it may do."""

    tenant: str
    key: str = ""  # the key's public id; empty without keys
    scopes: frozenset[Scope] = frozenset(Scope)

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


class Authenticator(Protocol):
    """Know the keys."""

    @property
    def has_keys(self) -> bool:
        """Whether callers need a key. If not, a caller's tenant is what it says."""
        ...

    @property
    def fault(self) -> str:
        """Why no caller can be let in; empty if callers can."""
        ...

    def grant(self, key: str) -> Grant:
        """Return what this key allows. Raises Unauthenticated, Unavailable."""
        ...


@dataclass(slots=True)
class Use:
    """Count what a request uses. Reserved first with upper limits; `charged` settles the difference at its end."""

    images: int = 0
    visual_tokens: int = 0
    generated_tokens: int = 0


class Account(Protocol):
    """Charge what one HTTP request or gRPC call uses to its tenant's quota."""

    async def enter(self, *, place: bool = True) -> None:
        """Charge one request, and take one of the tenant's places for open requests until `leave`.

        A part of a request that has a place needs none. Raises QuotaExceeded.
        """
        ...

    def charged(self, most: Use) -> AbstractAsyncContextManager[Use]:
        """Charge the most that the block can use; the block writes its real use into the Use that it gets.

        At the end of the block the rest is given back. Raises QuotaExceeded.
        """
        ...

    def leave(self) -> None:
        """End the request. Does not wait."""
        ...

    def headers(self) -> Sequence[tuple[str, str]]:
        """Return `x-ratelimit-*` headers, as OpenAI names them."""
        ...


class Unlimited:
    """The account of a tenant without a quota."""

    async def enter(self, *, place: bool = True) -> None:
        """Charge nothing."""

    @asynccontextmanager
    async def charged(self, most: Use) -> AsyncIterator[Use]:
        yield most

    def leave(self) -> None:
        """Nothing is held."""

    def headers(self) -> Sequence[tuple[str, str]]:
        return ()


class Accounts(Protocol):
    """Open the account of each request."""

    def of(self, tenant: str, key: str) -> Account: ...


class NoQuotas:
    """Accounts of a service without quotas."""

    def of(self, tenant: str, key: str) -> Account:  # noqa: ARG002
        return UNLIMITED


UNLIMITED = Unlimited()
