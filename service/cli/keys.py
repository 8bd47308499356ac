"""`glimpse keys`: make, list and revoke the API keys of a service, and limit what tenants may use."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from service.cli.options import RedisUrl, redis_url_of, utf8
from service.cli.terminal import fail, finished, require

if TYPE_CHECKING:
    from service.access.key_file import KeyFile
    from service.access.key_redis import KeysInRedis
    from service.access.keys import KeyRecord, Keyring, Limits

T = TypeVar("T")
DAY_S = 86_400.0
FILE = "keys.json"
MOST = 10**15  # of a limit, as of a setting: see service/settings.py
MOST_DAYS = 36_525  # a century
NONE = 0  # in place of a limit: the default counts again


class ScopeName(StrEnum):
    """The scopes of a key, as in service/core/access.py, which this command reads only when it runs."""

    ASK = "ask"
    UPLOAD = "upload"
    METRICS = "metrics"
    ADMIN = "admin"


Place = Annotated[
    str,
    typer.Option("--keys", envvar="GLIMPSE_KEYS", help="The file of the keys, or redis for GLIMPSE_REDIS_URL."),
]
Limit = partial(typer.Option, min=1, max=MOST)
Requests = Annotated[int | None, Limit("--requests", help="Most requests a minute.")]
Images = Annotated[int | None, Limit("--images", help="Most images a minute.")]
VisualTokens = Annotated[int | None, Limit("--visual-tokens", help="Most visual tokens a minute.")]
GeneratedTokens = Annotated[int | None, Limit("--generated-tokens", help="Most generated tokens a minute.")]
Concurrent = Annotated[int | None, Limit("--concurrent", help="Most requests at once.")]


def changed_limit(text: str) -> int:
    """Read a limit, or `none` as NONE. Raises typer.BadParameter."""
    if text.lower() == "none":
        return NONE
    if not text.isdecimal() or not 1 <= int(text[:20]) <= MOST:
        raise typer.BadParameter(f"{text!a} is no limit: write a whole number from 1 to {MOST:,}, or none")
    return int(text)


ChangedLimit = partial(typer.Option, parser=changed_limit, metavar="NUMBER|none", show_default=False)

app = typer.Typer(help="Manage the API keys of a service.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def create(
    tenant: Annotated[str, typer.Option(help="Whose key it is: 1 to 64 letters, digits and . _ : -.")],
    scope: Annotated[
        list[ScopeName] | None, typer.Option(help="What it allows; may be repeated [default: ask and upload].")
    ] = None,
    days: Annotated[
        float | None, typer.Option(min=0, max=MOST_DAYS, help="Days until it expires [default: it does not].")
    ] = None,
    note: Annotated[str, typer.Option(help="A note for you.", callback=utf8)] = "",
    requests: Requests = None,
    images: Images = None,
    visual_tokens: VisualTokens = None,
    generated_tokens: GeneratedTokens = None,
    concurrent: Concurrent = None,
    keys: Place = FILE,
    redis_url: RedisUrl = None,
) -> None:
    """Make a key and print it, once: only its hash is kept. Limits are this key's alone, besides its tenant's.

    \b
      glimpse keys create --tenant acme
      glimpse keys create --tenant ops --scope metrics --note prometheus
      glimpse keys create --tenant acme --days 30 --requests 100
    """
    require("orjson", "serve")
    from service.access.keys import KeyRecord, Keyring, new_key, parsed_tenant  # noqa: PLC0415
    from service.core.access import Scope  # noqa: PLC0415

    key, key_id, digest = new_key()
    now = time.time()
    limits = limits_of(requests, images, visual_tokens, generated_tokens, concurrent)

    def added(before: Keyring) -> Keyring:
        record = KeyRecord(
            id=key_id,
            sha256=digest,
            tenant=parsed_tenant(tenant),
            scopes=frozenset(map(Scope, scope or (Scope.ASK, Scope.UPLOAD))),
            created_at=now,
            expires_at=None if days is None else now + days * DAY_S,
            note=note,
            limits=limits,
        )
        return Keyring({**before.keys, key_id: record}, before.tenants)

    said(place_of(keys, redis_url).change(added))
    typer.echo(key)
    typer.echo(f"This is the only time that the key is shown. Its id is {key_id}.", err=True)


@app.command("list")
def list_keys(keys: Place = FILE, redis_url: RedisUrl = None) -> None:
    """List the keys, without their secrets, and the limits of tenants."""
    require("orjson", "serve")
    keyring = said(place_of(keys, redis_url).loaded())
    for record in keyring.keys.values():
        typer.echo(line_of(record, time.time()))
    for tenant, limits in keyring.tenants.items():
        typer.echo(f"tenant {tenant}: {words_of(limits)}")
    if not keyring.keys:
        typer.echo("no keys")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The id that `list` shows.")],
    keys: Place = FILE,
    redis_url: RedisUrl = None,
) -> None:
    """Revoke a key. Running gateways refuse it within a second."""
    require("orjson", "serve")
    from service.access.keys import Keyring, KeysError  # noqa: PLC0415

    def without(before: Keyring) -> Keyring:
        if key_id not in before.keys:
            raise KeysError(f"there is no key with the id {key_id[:64]!r}: `glimpse keys list` shows all")
        return Keyring({name: key for name, key in before.keys.items() if name != key_id}, before.tenants)

    said(place_of(keys, redis_url).change(without))
    typer.echo(f"{key_id} is revoked")


@app.command()
def limit(
    tenant: Annotated[str, typer.Argument(help="The tenant.")],
    requests: Annotated[int | None, ChangedLimit("--requests", help="Most requests a minute.")] = None,
    images: Annotated[int | None, ChangedLimit("--images", help="Most images a minute.")] = None,
    visual_tokens: Annotated[int | None, ChangedLimit("--visual-tokens", help="Most visual tokens a minute.")] = None,
    generated_tokens: Annotated[
        int | None, ChangedLimit("--generated-tokens", help="Most generated tokens a minute.")
    ] = None,
    concurrent: Annotated[int | None, ChangedLimit("--concurrent", help="Most requests at once.")] = None,
    keys: Place = FILE,
    redis_url: RedisUrl = None,
) -> None:
    """Set some of a tenant's limits in place of the service's defaults. The tenant's other limits stay.

    The word none takes a limit away: the default counts again. Without options, all are taken away.

    \b
      glimpse keys limit acme --requests 100
      glimpse keys limit acme --images 50 --requests none
    """
    require("orjson", "serve")
    from service.access.keys import Limits, parsed_tenant  # noqa: PLC0415

    given = limits_of(requests, images, visual_tokens, generated_tokens, concurrent)
    result = Limits()

    def changed(before: Keyring) -> Keyring:
        nonlocal result
        result = given.over(before.tenants.get(tenant, Limits())) if given else Limits()
        result = Limits(**{name: value for name, value in result.told().items() if value != NONE})
        others = {name: told for name, told in before.tenants.items() if name != tenant}
        return replace(before, tenants=others | ({parsed_tenant(tenant): result} if result else {}))

    said(place_of(keys, redis_url).change(changed))
    typer.echo(f"{tenant}: {words_of(result)}")


def limits_of(
    requests: int | None, images: int | None, visual: int | None, generated: int | None, concurrent: int | None
) -> Limits:
    from service.access.keys import Limits  # noqa: PLC0415

    return Limits(requests, images, visual, generated, concurrent)


def place_of(keys: str, redis_url: str | None) -> KeyFile | KeysInRedis:
    """End the command if the place cannot be used."""
    from service.access.key_file import KeyFile  # noqa: PLC0415

    if keys != "redis":
        return KeyFile(Path(keys))
    address = redis_url_of(redis_url)
    if not address:
        fail("--keys is redis: name the Redis with --redis-url, GLIMPSE_REDIS_URL or GLIMPSE_REDIS_URL_FILE")
    require("redis", "serve")
    from service.access.key_redis import KeysInRedis  # noqa: PLC0415

    try:
        return KeysInRedis(address)
    except ValueError as exc:
        fail(f"--redis-url: {exc}")


def said(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; end the command with one line if the keys cannot be read or written."""
    from service.access.keys import KeysError  # noqa: PLC0415

    try:
        return finished(work, KeysError)
    except Exception as exc:
        from service.cache.redis_client import RedisFault  # noqa: PLC0415

        if not isinstance(exc, RedisFault):
            raise
        fail(f"Redis: {exc.message}")


def line_of(record: KeyRecord, now: float) -> str:
    until = "no expiry" if record.expires_at is None else f"expires {day(record.expires_at)}"
    if record.has_expired(now):
        until = f"expired {day(record.expires_at or 0)}"
    parts = [record.id, record.tenant, ",".join(sorted(record.scopes)), f"made {day(record.created_at)}", until]
    return "  ".join([*parts, *([words_of(record.limits)] if record.limits else []), *filter(None, [record.note])])


def words_of(limits: Limits) -> str:
    told = limits.told()
    return ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in told.items()) or "the defaults"


def day(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):  # a file can say any number
        return "after the year 9999" if seconds > 0 else "before the year 1"
