"""Keys for tests: a file of them, made as `glimpse keys create` makes it."""

from __future__ import annotations

from pathlib import Path

from service.access.key_file import KeyFile, replace_file
from service.access.keys import KeyRecord, Keyring, Limits, new_key
from service.core.access import Scope

ASKING = frozenset({Scope.ASK, Scope.UPLOAD})


class Keys:
    """A file of keys."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys.json"
        self.write(Keyring())

    @property
    def ring(self) -> Keyring:
        return KeyFile(self.path).read()

    def write(self, ring: Keyring) -> None:
        replace_file(self.path, ring.to_json())

    def make(
        self,
        tenant: str,
        scopes: frozenset[Scope] = ASKING,
        expires_at: float | None = None,
        limits: Limits = Limits(),  # noqa: B008
    ) -> str:
        """Make a key of the tenant."""
        key, key_id, digest = new_key()
        record = KeyRecord(key_id, digest, tenant, scopes, 0.0, expires_at, limits=limits)
        self.write(Keyring({**self.ring.keys, key_id: record}, self.ring.tenants))
        return key

    def limit(self, tenant: str, limits: Limits) -> None:
        self.write(Keyring(self.ring.keys, {**self.ring.tenants, tenant: limits}))

    def revoke(self, key: str) -> None:
        key_id = key.split("_")[1]
        self.write(Keyring({name: each for name, each in self.ring.keys.items() if name != key_id}, self.ring.tenants))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
