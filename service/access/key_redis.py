"""Keep the keys in Redis, for several gateways.

    glimpse:{access}:keys       hash: a key's id to its record
    glimpse:{access}:tenants    hash: a tenant to its limits
    glimpse:{access}:version    a random number, another one after each change

They have no expiry. A Redis that evicts keys needs a policy that spares those: volatile-lru, not allkeys-lru.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import orjson

from service.access.keys import KeyRecord, Keyring, KeysError, Limits, parsed_tenant
from service.cache.admin import opened
from service.cache.redis_client import Command, Lane, RedisFault, granted

KEYS, TENANTS, VERSION = "glimpse:{access}:keys", "glimpse:{access}:tenants", "glimpse:{access}:version"
TIMEOUT_S = 1.0  # for one look
GONE = b""  # in place of a value
ATTEMPTS = 20  # of one change, while others change the keys
# Another command may change the keys between this one's look and its write. ARGV: the version at the look, the new
# one, and for each field its key's place, its name and its value.
CHANGE = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
for at = 3, #ARGV, 3 do
    local key = KEYS[tonumber(ARGV[at])]
    if ARGV[at + 2] == '' then
        redis.call('HDEL', key, ARGV[at + 1])
    else
        redis.call('HSET', key, ARGV[at + 1], ARGV[at + 2])
    end
end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""
NEVER = b""  # the version before the first look
VERSION_BITS = 62  # a counter would begin again in a Redis that was emptied; other releases' INCR still works
LOST = (
    "the keys are no longer in Redis (was it emptied, or does it evict keys?): the gateway goes on with the last ones. "
    "Make them again with `glimpse keys create`"
)


class KeysInRedis:
    """Read the keys when their version is another. Usable while `run` of its lane runs."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for a URL that cannot be used."""
        self.lane = Lane(url, TIMEOUT_S)
        self._url = url
        self._version: bytes | None = NEVER

    async def changed(self) -> Keyring | None:
        """Return the keys if they are others than were last read, else None. Raises KeysError."""
        try:
            (version,) = map(granted, await self.lane.ask(("GET", VERSION)))
            if version == self._version:
                return None
            if version is None and self._version != NEVER:
                raise KeysError(LOST)
            told = await self.lane.ask(("GET", VERSION), ("HGETALL", KEYS), ("HGETALL", TENANTS))
            version, keys, tenants = map(granted, told)
        except RedisFault as fault:
            raise KeysError(f"the keys in Redis cannot be read ({fault.message})") from fault
        keyring = keyring_of(keys, tenants)
        self._version = version
        return keyring

    async def run(self) -> None:
        """Own the connection until cancelled."""
        await self.lane.run()

    async def change(self, how: Callable[[Keyring], Keyring]) -> None:
        """Write what `how` changes, and nothing if another change came between: `how` is then called again.

        Raises KeysError, RedisFault.
        """
        looks: list[Command] = [("GET", VERSION), ("HGETALL", KEYS), ("HGETALL", TENANTS)]
        async with opened(self._url) as lane:
            for _ in range(ATTEMPTS):
                version, keys, tenants = map(granted, await lane.ask(*looks))  # the version first
                before = keyring_of(keys, tenants)
                versions = (version or b"", secrets.randbits(VERSION_BITS))
                script: Command = ("EVAL", CHANGE, 3, VERSION, KEYS, TENANTS, *versions, *changes(before, how(before)))
                if granted(*await lane.ask(script)):
                    return
        raise KeysError("others change the keys at the same time: try again")

    async def loaded(self) -> Keyring:
        """Read the keys once, for a command. Raises KeysError, RedisFault."""
        async with opened(self._url) as lane:
            return keyring_of(*map(granted, await lane.ask(("HGETALL", KEYS), ("HGETALL", TENANTS))))


def changes(before: Keyring, after: Keyring) -> list[str | bytes | int]:
    """Return what turns one keyring into the other: for each field the key's place in CHANGE, its name and value."""
    found: list[str | bytes | int] = []
    for place, old, new in ((2, before.keys, after.keys), (3, before.tenants, after.tenants)):
        for each, told in new.items():
            if old.get(each) != told:
                found += [place, each, orjson.dumps(told.told())]
        for each in old:
            if each not in new:
                found += [place, each, GONE]
    return found


def keyring_of(keys: dict[bytes, bytes], tenants: dict[bytes, bytes]) -> Keyring:
    """Raises KeysError."""
    return Keyring.of(
        (KeyRecord.parse(loaded(told), f"key {name.decode(errors='replace')}") for name, told in keys.items()),
        {
            parsed_tenant(name.decode(errors="replace")): Limits.parse(loaded(told), "the limits of a tenant")
            for name, told in tenants.items()
        },
    )


def loaded(told: bytes) -> Any:
    """Raises KeysError."""
    try:
        return orjson.loads(told)
    except orjson.JSONDecodeError as exc:
        raise KeysError(f"a record in Redis is not JSON ({exc})") from exc
