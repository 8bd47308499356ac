"""Make, keep and look up API keys. Pure: no clock, no I/O.

A key is `glk_ID_SECRET`: 8 hexadecimal digits that name it, and 256 random bits. Its record holds the SHA-256 of the
whole key. A slow hash as for passwords would add nothing: nobody can try 2^256 secrets.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

import orjson

from service.core.access import Grant, Scope
from service.core.errors import Unauthenticated

VERSION = 1  # of the document
PREFIX = "glk"
SECRET_BYTES = 32
TENANT = re.compile(r"[A-Za-z0-9._:-]{1,64}")
ID = re.compile(r"[0-9a-f]{8}")
DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_KEY_CHARS = 200
NOBODYS = "0" * 64  # compared if no record has the key's id, so that both take the same time

WRONG_KEY = "the API key is not valid: check it, or ask the operator for a new one (`glimpse keys create`)"
EXPIRED_KEY = "the API key has expired: ask the operator for a new one (`glimpse keys create`)"
NO_KEY = "an API key is needed: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"


class KeysError(ValueError):
    """The document of keys cannot be used; the message says where it is wrong."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limit what a tenant, or a key, may use. None: no limit."""

    requests_per_minute: int | None = None
    images_per_minute: int | None = None
    visual_tokens_per_minute: int | None = None
    generated_tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    @classmethod
    def parse(cls, told: object, where: str) -> Self:
        """Read an object of positive integers. Raises KeysError."""
        names = [each.name for each in fields(cls)]
        if not isinstance(told, dict):
            raise KeysError(f"{where} must be an object with some of {', '.join(names)}")
        for name, value in told.items():
            if name not in names:
                raise KeysError(f"{where} has no limit {name!r}: the limits are {', '.join(names)}")
            if value is not None and (type(value) is not int or value < 1):
                raise KeysError(f"{where}.{name} is {value!r}: write a whole number of at least 1, or null for none")
        return cls(**told)

    def over(self, defaults: Limits) -> Limits:
        """Return these limits, with the defaults in place of those that are None."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return Limits(**{name: getattr(defaults, name) if value is None else value for name, value in given.items()})

    def told(self) -> dict[str, int]:
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) is not None for each in fields(self))


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """Everything about a key but the key."""

    id: str
    sha256: str  # of the whole key, 64 hexadecimal digits
    tenant: str
    scopes: frozenset[Scope]
    created_at: float  # seconds since the epoch, as is expires_at
    expires_at: float | None = None
    note: str = ""
    limits: Limits = Limits()

    @classmethod
    def parse(cls, told: object, where: str) -> Self:
        """Read a record of a document. Raises KeysError."""
        if not isinstance(told, dict):
            raise KeysError(f"{where} must be an object")
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(told) - known):
            raise KeysError(f"{where} has no field {unknown[0]!r}: the fields are {', '.join(sorted(known))}")
        for name, pattern in (("id", ID), ("sha256", DIGEST), ("tenant", TENANT)):
            if not isinstance(told.get(name), str) or not pattern.fullmatch(told[name]):
                raise KeysError(f"{where}.{name} is {told.get(name)!r}: it must match {pattern.pattern}")
        scopes = told.get("scopes")
        if not isinstance(scopes, list) or not scopes or not all(scope in [*Scope] for scope in scopes):
            raise KeysError(f"{where}.scopes is {scopes!r}: write a list of {', '.join(Scope)}")
        times = {"created_at": told.get("created_at", 0), "expires_at": told.get("expires_at")}
        for name, value in times.items():
            if value is None and name == "expires_at":
                continue
            if type(value) not in (int, float):
                raise KeysError(f"{where}.{name} is {value!r}: write seconds since the epoch")
        if not isinstance(told.get("note", ""), str):
            raise KeysError(f"{where}.note must be a text")
        return cls(
            id=told["id"],
            sha256=told["sha256"],
            tenant=told["tenant"],
            scopes=frozenset(map(Scope, scopes)),
            created_at=float(times["created_at"] or 0),
            expires_at=None if times["expires_at"] is None else float(times["expires_at"]),
            note=told.get("note", ""),
            limits=Limits.parse(told.get("limits") or {}, f"{where}.limits"),
        )

    def told(self) -> dict[str, Any]:
        told: dict[str, Any] = {
            "id": self.id,
            "sha256": self.sha256,
            "tenant": self.tenant,
            "scopes": sorted(self.scopes),
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "note": self.note,
        }
        return told | ({"limits": limits} if (limits := self.limits.told()) else {})

    def has_expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


@dataclass(frozen=True, slots=True)
class Keyring:
    """All keys, and the limits of tenants that have their own."""

    keys: Mapping[str, KeyRecord] = field(default_factory=dict)  # by id
    tenants: Mapping[str, Limits] = field(default_factory=dict)

    @classmethod
    def of(cls, keys: Iterable[KeyRecord], tenants: Mapping[str, Limits]) -> Self:
        by_id: dict[str, KeyRecord] = {}
        for key in keys:
            if key.id in by_id:
                raise KeysError(f"two keys have the id {key.id}: remove one")
            by_id[key.id] = key
        return cls(by_id, dict(tenants))

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Read a document. Raises KeysError."""
        try:
            told = orjson.loads(text)
        except orjson.JSONDecodeError as exc:
            raise KeysError(f"it is not JSON ({exc})") from exc
        if not isinstance(told, dict) or told.get("version") != VERSION or set(told) - {"version", "keys", "tenants"}:
            raise KeysError(f'it must be an object with "version": {VERSION}, "keys" and "tenants"')
        keys, tenants = told.get("keys", []), told.get("tenants", {})
        if not isinstance(keys, list) or not isinstance(tenants, dict):
            raise KeysError("keys must be a list, and tenants an object")
        return cls.of(
            (KeyRecord.parse(key, f"keys.{number}") for number, key in enumerate(keys)),
            {parsed_tenant(name): Limits.parse(told, f"tenants.{name}") for name, told in tenants.items()},
        )

    def to_json(self) -> bytes:
        told = {
            "version": VERSION,
            "keys": [key.told() for key in self.keys.values()],
            "tenants": {name: limits.told() for name, limits in self.tenants.items()},
        }
        return orjson.dumps(told, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    def grant(self, key: str, now: float) -> Grant:
        """Return what the key allows. A wrong key takes the same time whether its id exists or not.

        Raises Unauthenticated.
        """
        record = self.keys.get(id_of(key))
        wanted = NOBODYS if record is None else record.sha256
        is_right = hmac.compare_digest(digest_of(key), wanted)
        if record is None or not is_right:
            raise Unauthenticated(WRONG_KEY) if key else Unauthenticated(NO_KEY, code="missing_api_key")
        if record.has_expired(now):
            raise Unauthenticated(EXPIRED_KEY, code="expired_api_key")
        return Grant(record.tenant, record.id, record.scopes)

    def limits(self, tenant: str, key: str, defaults: Limits) -> tuple[Limits, Limits]:
        """Return the limits of the tenant, and those of the key alone."""
        record = self.keys.get(key)
        return self.tenants.get(tenant, Limits()).over(defaults), record.limits if record else Limits()


def parsed_tenant(name: str) -> str:
    """Raises KeysError."""
    if not TENANT.fullmatch(name):
        raise KeysError(f"the tenant {name!r} must have 1 to 64 letters, digits and . _ : -")
    return name


def new_key() -> tuple[str, str, str]:
    """Make a key -> it, its id, and its SHA-256."""
    key_id = secrets.token_hex(4)
    key = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(SECRET_BYTES)}"
    return key, key_id, digest_of(key)


def id_of(key: str) -> str:
    """Return the id that a well-formed key names, else the empty text."""
    prefix, _, rest = key[:MAX_KEY_CHARS].partition("_")
    return rest.partition("_")[0] if prefix == PREFIX else ""


def digest_of(key: str) -> str:
    return hashlib.sha256(key[:MAX_KEY_CHARS].encode(errors="replace")).hexdigest()
