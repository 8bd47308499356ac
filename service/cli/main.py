"""The command `glimpse`. Asking needs httpx and typer only; what a command needs more it runs as its own program."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import httpx
import typer

URL = "http://127.0.0.1:8080"

app = typer.Typer(
    name="glimpse",
    help="Ask questions about images: serve the models, ask them, measure them, train and build them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

cache = typer.Typer(help="The vision features that gateways share.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(cache, name="cache")

T = TypeVar("T")

Detail = Literal["low", "high", "auto"]

Url = Annotated[str, typer.Option(help="Where the service answers.")]

RedisUrl = Annotated[
    str, typer.Option(envvar="GLIMPSE_REDIS_URL", help="redis://[[user]:password@]host:port/db of the gateways.")
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif"})
SET_UP = Path(__file__).resolve().parents[2] / "scripts" / "set_up.py"
TRIES = 5  # of one image while the service is too busy


class AskFailed(Exception):
    """What to tell the person at the terminal."""


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [default: 8080].")] = None,
) -> None:
    """Serve until Ctrl-C: starts Triton with the models of model_repository/ and the gateway in front of it.

    \b
    Every other knob is a GLIMPSE_ variable (service/settings.py lists them), such as
      GLIMPSE_LOG_FORMAT=json glimpse serve --port 9000
      GLIMPSE_VISION_URL=triton:8001 GLIMPSE_LLM_URL=triton:8001 glimpse serve     # a Triton that runs elsewhere
    """
    given = {"GLIMPSE_HTTP_HOST": host, "GLIMPSE_HTTP_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    become("service", [], goal="serve", needs="uvicorn")


@app.command()
def ask(
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="A file, - for standard input, or the id img_... of one sent before.")
    ],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="One or more questions about it.")],
    url: Url = URL,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token each time.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the tokens with this much probability.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this; may be given again.")] = None,
    vision_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="How closely to look.")
    ] = None,
    visual_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="How much of it the LLM reads: 32 to 128.")
    ] = None,
    detail: Annotated[
        Detail | None, typer.Option(help="high adds a closer view of the image; auto does where the question needs it.")
    ] = None,
    explain: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw where it looked, and why; one question only.")
    ] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
) -> None:
    """Ask a running service about an image; the answer is printed as it is written.

    With several questions the image is sent once, and its features are computed once.

    \b
      glimpse ask photo.jpg "what colour is the small circle?"
      glimpse ask photo.jpg "how many circles are there?" "is there a red square?"
      glimpse ask photo.jpg "what does the label say?" --detail high
      glimpse ask photo.jpg "what is this?" --explain looked.png
      glimpse ask photo.jpg "what is this?" --explain looked.png --json | jq .relevance     # the numbers drawn
    """
    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "budget": budget(vision_tokens, visual_tokens),
        "detail": detail,
        "explain": True if explain else None,
        "timeout_s": timeout_s,
    }
    asked = {name: value for name, value in fields.items() if value is not None}
    with plain_words(url), httpx.Client(base_url=url, timeout=httpx.Timeout(5.0, read=150.0, write=60.0)) as client:
        if explain:
            require_drawable(explain, image, questions)
        data = None if image.startswith("img_") else read_image(image)
        image_id = image if data is None else upload(client, data)
        for question in questions:
            body = asked | {"image": image_id, "question": question}
            if as_json or explain:
                said = answer(client, body)
                typer.echo(json.dumps(said) if as_json else said["answer"])
                if explain and data is not None:
                    draw(data, question, said, explain)
                continue
            if len(questions) > 1:
                typer.echo(f"{question} ", nl=False)
            for text in stream(client, body):
                typer.echo(text, nl=False)
            typer.echo()


@app.command("eval")
def evaluate(
    url: Url = URL,
    scenes: Annotated[
        Path | None, typer.Option(help="Folder with questions.jsonl [default: the committed ones].")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split.")] = None,
    vision_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="The budget of every question.")
    ] = None,
    visual_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="The same of what the LLM reads.")
    ] = None,
    detail: Annotated[Detail | None, typer.Option(help="The detail of every question.")] = None,
    clients: Annotated[int, typer.Option(help="Questions asked at the same time.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Write the table as JSON here too.")] = None,
) -> None:
    """Measure the accuracy of a running service on held-out scenes, by question type, with 95 % intervals.

    \b
      glimpse eval
      glimpse eval --vision-tokens 64 112      # how well it answers when it may look less closely
      glimpse eval --detail auto               # or may look closer where the question needs it
    """
    from build_engines.evaluation import accuracy  # noqa: PLC0415

    with plain_words(url):
        accuracy.evaluate(
            url,
            scenes or accuracy.SCENES,
            split=split,
            budget=budget(vision_tokens, visual_tokens),
            detail=detail,
            clients=clients,
            out=out,
        )


def budget(
    vision_tokens: tuple[int, int] | None, visual_tokens: tuple[int, int] | None
) -> dict[str, tuple[int, int]] | None:
    given = {"vision_tokens": vision_tokens, "visual_tokens": visual_tokens}
    return {name: tokens for name, tokens in given.items() if tokens} or None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def train(context: typer.Context) -> None:
    """Train the reference model from nothing: `glimpse train --help` tells its options. Needs PyTorch."""
    become("build_engines.train", context.args, goal="build", needs="torch")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def build(context: typer.Context) -> None:
    """Build a repository that Triton serves from a BLIP-2 or InstructBLIP checkpoint: `glimpse build --help`."""
    become("build_engines.convert", context.args, goal="build", needs="torch")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure the service under load, beside other systems: `glimpse bench --help` tells its options."""
    become("benchmarks.bench", context.args, goal="bench", needs="litserve")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def verify(context: typer.Context) -> None:
    """Check a repository's files, and what it does where it is served: `glimpse verify --help` tells more."""
    become("build_engines.verify", context.args, goal="build", needs="torch")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def ablate(context: typer.Context) -> None:
    """Measure what each part of the relevance allocator is worth: `glimpse ablate --help` tells its options."""
    become("benchmarks.ablate", context.args, goal="build", needs="torch")


@cache.command()
def stats(redis_url: RedisUrl) -> None:
    """What Redis holds, by vision encoder.

    \b
      glimpse cache stats --redis-url redis://127.0.0.1:6379
    """
    require("redis", "serve")
    from service.cache import admin as cache_admin  # noqa: PLC0415

    found = in_redis(cache_admin.stats(redis_url))
    bound = f"of {megabytes(found.max_bytes)}, {found.policy}" if found.max_bytes else "without a bound (maxmemory 0)"
    typer.echo(f"Redis {found.version} uses {megabytes(found.used_bytes)} {bound}; {found.evicted_keys} keys evicted")
    for fingerprint, kept in sorted(found.kept.items()):
        typer.echo(f"{fingerprint}: {kept.records} views of images, {megabytes(kept.nbytes)}")
    if not found.kept:
        typer.echo("no vision features")


@cache.command()
def purge(
    redis_url: RedisUrl,
    fingerprint: Annotated[
        str | None, typer.Option(help="Only what this vision encoder found; GET /v1/models and `stats` tell it.")
    ] = None,
) -> None:
    """Delete vision features from Redis. What running gateways hold in their own memory stays there.

    \b
      glimpse cache purge
      glimpse cache purge --fingerprint 3f9a...     # a model that is served no more
    """
    require("redis", "serve")
    from service.cache import admin as cache_admin  # noqa: PLC0415

    typer.echo(f"{in_redis(cache_admin.purge(redis_url, fingerprint))} views of images deleted")


@cache.command()
def warm(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Its images, and those in the folders below it.")],
    url: Url = URL,
    clients: Annotated[int, typer.Option(help="Images sent at the same time.")] = 2,
) -> None:
    """Have a running service encode a folder's images, so that the first question about each finds it done.

    Each image is sent with a short question and a one-token answer, as only a question makes the service encode. With
    Redis every gateway finds the features; without, only the one that was asked.

    \b
      glimpse cache warm photos/
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        fail(f"no images in {folder}: it looks for {', '.join(sorted(IMAGE_SUFFIXES))}")
    begun, counts = time.monotonic(), {"miss": 0, "hit": 0, "refused": 0}
    timeout = httpx.Timeout(5.0, read=150.0, write=60.0)
    with (
        plain_words(url),
        httpx.Client(base_url=url, timeout=timeout) as client,
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
    """`miss` where the image was encoded, `hit` where it was known, or what is wrong with it."""
    try:
        data = read_image(str(path))
        for _ in range(TRIES):
            form = {"question": "what is this?", "max_tokens": "1"}
            response = client.post("/v1/vqa", files={"image": data}, data=form)
            if response.status_code != 429:
                break
            time.sleep(float(response.headers.get("retry-after", "1")))
        return str(successful(response).json()["vision"]["cache"])
    except AskFailed as exc:
        return str(exc)


def in_redis(asked: Coroutine[Any, Any, T]) -> T:
    """What comes of it; ends the command with one line where Redis fails."""
    from service.cache.redis_client import RedisFault  # noqa: PLC0415

    try:
        return asyncio.run(asked)
    except RedisFault as fault:
        fail(f"Redis: {fault.message}")
    except ValueError as exc:
        fail(f"--redis-url: {exc}")


def megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"


def become(module: str, arguments: list[str], *, goal: str, needs: str) -> None:
    """Goes on as `python -m module`: signals and the exit status are that program's own."""
    require(needs, goal)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def require(module: str, goal: str) -> None:
    """Ends the command where a library is missing that it needs: one that scripts/set_up.py installs for that goal."""
    if importlib.util.find_spec(module) is None:
        fail(f"this needs {module}, which is not installed: run `python3 {SET_UP} {goal}`")


def require_drawable(target: Path, image: str, questions: list[str]) -> None:
    """What a picture needs, before anything is asked. Raises AskFailed."""
    require("matplotlib", "serve")
    if target.suffix.lower() != ".png":
        raise AskFailed(f"the picture is a PNG: write --explain {target.with_suffix('.png')}")
    if len(questions) > 1:
        raise AskFailed("--explain draws one question: ask the others by themselves")
    if image.startswith("img_"):
        raise AskFailed("--explain draws over the image: name its file, not its id")


def draw(image: bytes, question: str, said: dict[str, Any], target: Path) -> None:
    """Raises AskFailed."""
    from service.cli import drawing  # noqa: PLC0415  (0.3 s that no other path should wait for)

    try:
        target.write_bytes(drawing.png(drawing.explain(image, question, said)))
    except OSError as exc:
        raise AskFailed(f"cannot write {target}: {exc.strerror}") from exc


def read_image(source: str) -> bytes:
    """Raises AskFailed."""
    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as exc:
        raise AskFailed(f"cannot read {source}: {exc.strerror}") from exc


def upload(client: httpx.Client, data: bytes) -> str:
    """The image's id. Raises AskFailed."""
    return str(successful(client.post("/v1/images", content=data)).json()["id"])


def answer(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """Raises AskFailed."""
    said: dict[str, Any] = successful(client.post("/v1/vqa", json=body)).json()
    return said


def stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    """The answer's text piece by piece. Raises AskFailed."""
    with client.stream("POST", "/v1/vqa", json=body | {"stream": True}) as response:
        if not response.is_success:
            response.read()
        for line in successful(response).iter_lines():
            data = line.removeprefix("data: ")
            if data in ("", "[DONE]"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise AskFailed(event["error"]["message"])
            if "delta" in event:
                yield event["delta"]


def successful(response: httpx.Response) -> httpx.Response:
    """Raises AskFailed with what the service says is wrong."""
    if not response.is_success:
        raise AskFailed(message_of(response))
    return response


def message_of(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return (
            f"{response.url} answered {response.status_code}, which is not how Glimpse answers: is it another service?"
        )


@contextmanager
def plain_words(url: str) -> Iterator[None]:
    """Ends the command with one line where the service, or the way to it, fails."""
    try:
        yield
    except AskFailed as exc:
        fail(str(exc))
    except httpx.ConnectError:
        fail(f"nothing answers at {url}: start the service with `make serve` (or `glimpse serve`), or say --url")
    except httpx.TimeoutException:
        fail(f"{url} did not answer in time")
    except httpx.TransportError as exc:
        fail(f"the connection to {url} broke: {exc}")
    except (json.JSONDecodeError, UnicodeDecodeError):
        fail(f"{url} answered, but not with JSON, which is not how Glimpse answers: is it another service?")
    except httpx.HTTPStatusError as exc:
        fail(f"{url} answered {exc.response.status_code}: {message_of(exc.response)}")


def fail(message: str) -> NoReturn:
    """Ends the command with status 1."""
    typer.echo(f"glimpse: {message}", err=True)
    raise typer.Exit(1)


def main() -> None:
    app()
