"""`glimpse cache`: show or delete the vision features in Redis, or compute them before the first question."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypeVar

import httpx
import typer

from service.cli.client import IMAGE_SUFFIXES, AskFailed, connected, plain_words, read_image, successful
from service.cli.options import RedisUrl, Url, redis_url_of, url_of
from service.cli.terminal import fail, require

T = TypeVar("T")

TRIES = 5  # for one image, if the service answers 429

app = typer.Typer(help="Manage the vision features that gateways share.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def stats(redis_url: RedisUrl = None) -> None:
    """Show the features in Redis, by vision encoder.

    \b
      glimpse cache stats --redis-url redis://127.0.0.1:6379
    """
    require("redis", "serve")
    from service.cache import admin as cache_admin  # noqa: PLC0415

    found = in_redis(cache_admin.stats(named(redis_url)))
    bound = f"of {megabytes(found.max_bytes)}, {found.policy}" if found.max_bytes else "without a bound (maxmemory 0)"
    typer.echo(f"Redis {found.version} uses {megabytes(found.used_bytes)} {bound}; {found.evicted_keys} keys evicted")
    for fingerprint, kept in sorted(found.kept.items()):
        typer.echo(f"{fingerprint}: {kept.records} views of images, {megabytes(kept.nbytes)}")
    if not found.kept:
        typer.echo("no vision features")


@app.command()
def purge(
    redis_url: RedisUrl = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="Only this vision encoder's features; `stats` and GET /v1/models show its name.")
    ] = None,
) -> None:
    """Delete vision features from Redis. Running gateways keep the features in their own memory.

    \b
      glimpse cache purge
      glimpse cache purge --fingerprint 3f9a...     # a model that is no longer served
    """
    require("redis", "serve")
    from service.cache import admin as cache_admin  # noqa: PLC0415

    typer.echo(f"{in_redis(cache_admin.purge(named(redis_url), fingerprint))} views of images deleted")


@app.command()
def warm(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with images; subfolders are included.")],
    url: Url = None,
    clients: Annotated[int, typer.Option(min=1, help="Images sent at the same time.")] = 2,
) -> None:
    """Send a folder's images to a running service, which encodes them before the first real question.

    Each image is sent with a short question and a one-token answer, because only a question makes the service encode.
    With Redis, all gateways find the features; without it, only the gateway that got the image.

    \b
      glimpse cache warm photos/
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        fail(f"no images in {folder}: it looks for {', '.join(sorted(IMAGE_SUFFIXES))}")
    address = url_of(url)
    begun, counts = time.monotonic(), {"miss": 0, "hit": 0, "refused": 0}
    with (
        plain_words(address),
        connected(address) as client,
        ThreadPoolExecutor(clients) as sending,
    ):
        for path, result in zip(paths, sending.map(lambda path: encode(client, path), paths), strict=True):
            counts[result if result in counts else "refused"] += 1
            if result not in counts:
                typer.echo(f"{path}: {result}", err=True)
    typer.echo(
        f"{len(paths)} images in {time.monotonic() - begun:.1f} s: {counts['miss']} encoded, {counts['hit']} known "
        f"already, {counts['refused']} refused"
    )
    if counts["refused"]:
        raise typer.Exit(1)


def encode(client: httpx.Client, path: Path) -> str:
    """Send one image -> `miss` if it was encoded, `hit` if it was known, or the error message."""
    try:
        data = read_image(str(path))
        for _ in range(TRIES):
            form = {"question": "how many circles are there?", "max_tokens": "1"}
            response = client.post("/v1/vqa", files={"image": data}, data=form)
            if response.status_code != 429:
                break
            time.sleep(float(response.headers.get("retry-after", "1")))
        return str(successful(response).json()["vision"]["cache"])
    except AskFailed as exc:
        return str(exc)


def named(redis_url: str | None) -> str:
    """End the command if no Redis is named."""
    return redis_url_of(redis_url) or fail(
        "name the Redis with --redis-url, GLIMPSE_REDIS_URL or GLIMPSE_REDIS_URL_FILE"
    )


def in_redis(asked: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; end the command with one line if Redis fails."""
    from service.cache.redis_client import RedisFault  # noqa: PLC0415

    try:
        return asyncio.run(asked)
    except RedisFault as fault:
        fail(f"Redis: {fault.message}")
    except ValueError as exc:
        fail(f"--redis-url: {exc}")


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
