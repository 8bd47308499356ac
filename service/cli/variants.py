"""`glimpse variants`: say which variants a service has, and what share of the questions each gets."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from service.cli.options import RedisUrl, redis_url_of, utf8
from service.cli.terminal import fail, finished, require

if TYPE_CHECKING:
    from service.upstreams.store import VariantsFile, VariantsInRedis
    from service.upstreams.variants import Variant, Variants

T = TypeVar("T")
FILE = "variants.json"

Place = Annotated[
    str,
    typer.Option(
        "--variants", envvar="GLIMPSE_VARIANTS", help="The file of the variants, or redis for GLIMPSE_REDIS_URL."
    ),
]
Url = Annotated[
    str | None,
    typer.Option(help="A gateway to ask in place of --variants. GLIMPSE_API_KEY is a key with the scope admin."),
]
Name = Annotated[str, typer.Argument(help="The variant's name.", callback=utf8)]

app = typer.Typer(
    help="Manage variants: named sets of models, each with its Tritons. Running gateways follow a change within a "
    "second.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_variants(url: Url = None, variants: Place = FILE, redis_url: RedisUrl = None) -> None:
    """List the variants, their shares of the questions and their Tritons."""
    if url:
        show_lines(asked(url))
        return
    store = place_of(variants, redis_url)
    show(said(store.loaded()))


@app.command()
def add(
    name: Name,
    models: Annotated[
        str, typer.Option(help="Folder of its model repository, as every gateway sees it.", callback=utf8)
    ],
    triton: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a Triton; may be repeated.", callback=utf8)
    ] = None,
    vision: Annotated[
        list[str] | None, typer.Option(help="Likewise, of the vision models only.", callback=utf8)
    ] = None,
    llm: Annotated[list[str] | None, typer.Option(help="Likewise, of the LLM only.", callback=utf8)] = None,
    weight: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="0: only callers that name it get it, unless no variant has a weight. [the one that it has, or 0]",
            show_default=False,
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision of its Tritons' computation [as the models were built].")
    ] = None,
    variants: Place = FILE,
    redis_url: RedisUrl = None,
) -> None:
    """Add a variant, or give the one of this name other models or Tritons. It keeps its weight, and drains if it did.

    \b
      glimpse variants add stable --models /models/7 --triton triton-a:8001 --triton triton-b:8001 --weight 100
      glimpse variants add next --models /models/8 --triton triton-c:8001
      glimpse variants weights stable=95 next=5
    """
    store = place_of(variants, redis_url)
    from service.upstreams.variants import Variant  # noqa: PLC0415

    told: dict[str, Any] = {"models": models, "tritons": triton or [], "precision": precision}
    told |= {pool: given for pool, given in (("vision", vision), ("llm", llm)) if given}

    def replaced(before: Variants) -> Variants:
        kept = {"weight": old.weight, "draining": old.is_draining} if (old := before.variants.get(name)) else {}
        return before.replaced(Variant.parse(name, told | kept | ({} if weight is None else {"weight": weight})))

    show(said(store.change(replaced)))


@app.command()
def weights(
    given: Annotated[
        list[str], typer.Argument(metavar="NAME=WEIGHT...", help="Weights, such as stable=95 next=5.", callback=utf8)
    ],
    url: Url = None,
    variants: Place = FILE,
    redis_url: RedisUrl = None,
) -> None:
    """Set weights. Variants that are not named keep theirs."""
    wanted = dict(weight_in(each) for each in given)
    if url:
        show_lines(asked(url, {"weights": wanted}))
        return
    show(said(place_of(variants, redis_url).change(lambda before: before.changed(wanted, {}))))


@app.command()
def drain(
    name: Name,
    undo: Annotated[bool, typer.Option("--undo", help="Let it get questions again.")] = False,
    url: Url = None,
    variants: Place = FILE,
    redis_url: RedisUrl = None,
) -> None:
    """Send a variant no new questions. Those that it answers now go on."""
    drains = {name: not undo}
    if url:
        show_lines(asked(url, {"draining": drains}))
        return
    show(said(place_of(variants, redis_url).change(lambda before: before.changed({}, drains))))


@app.command()
def remove(name: Name, variants: Place = FILE, redis_url: RedisUrl = None) -> None:
    """Remove a variant. Gateways leave its Tritons when they have answered the last question."""
    store = place_of(variants, redis_url)
    show(said(store.change(lambda before: before.without(name))))


def weight_in(text: str) -> tuple[str, float]:
    """Read NAME=WEIGHT. Ends the command if it is none."""
    name, equals, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not equals or not 0 <= weight < float("inf"):
        fail(f"{text!r} is not a weight: write NAME=WEIGHT with a number from 0, such as stable=95")
    return name, weight


def place_of(variants: str, redis_url: str | None) -> VariantsFile | VariantsInRedis:
    """End the command if the place cannot be used."""
    require("redis", "serve")
    from service.upstreams.store import IN_REDIS, VariantsFile, VariantsInRedis  # noqa: PLC0415

    if variants != IN_REDIS:
        return VariantsFile(Path(variants))
    address = redis_url_of(redis_url)
    if not address:
        fail("--variants is redis: name the Redis with --redis-url, GLIMPSE_REDIS_URL or GLIMPSE_REDIS_URL_FILE")
    try:
        return VariantsInRedis(address)
    except ValueError as exc:
        fail(f"--redis-url: {exc}")


def said(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; end the command with one line if the variants cannot be read or written."""
    from service.upstreams.variants import VariantsError  # noqa: PLC0415

    return finished(work, VariantsError)


def asked(url: str, change: Mapping[str, Any] | None = None) -> list[str]:
    """Ask a gateway for the variants, after a change if there is one -> a line for each.

    Ends the command with one line if it refuses, or does not answer as Glimpse does.
    """
    require("httpx", "serve")
    from service.cli.client import AskFailed, connected, plain_words, successful  # noqa: PLC0415

    with plain_words(url), connected(url) as client:
        path = "/v1/variants"
        response = client.get(path) if change is None else client.patch(path, json=change)
        said = successful(response).json()
        try:
            return [line_of_state(each) for each in said["data"]]
        except (LookupError, TypeError, ValueError) as exc:
            raise AskFailed(
                f"{url} does not answer as this version of Glimpse does: check --url, or use the gateway's version"
            ) from exc


def line_of_state(told: Mapping[str, Any]) -> str:
    """Raises LookupError, TypeError or ValueError if a gateway of this version does not tell so."""
    out = f" ({told['tritons_out']} out)" if told["tritons_out"] else ""
    here = [f"{told['tritons']} Tritons{out}", f"{told['in_flight']} in flight here"]
    model = [f"model {told['model']}"] if told.get("model") else []
    return "  ".join([told["name"], split_of(told["weight"], told["share"], told["draining"]), *here, *model])


def show(found: Variants) -> None:
    show_lines([line_of(each, found.shares[each.name]) for each in found.variants.values()])


def show_lines(lines: Sequence[str]) -> None:
    typer.echo("\n".join(lines) or "no variants")


def split_of(weight: float, share: float, is_draining: bool) -> str:
    return "drains" if is_draining else f"weight {weight:g} ({f'{100 * share:.1f}' if share else '0'} %)"


def line_of(variant: Variant, share: float) -> str:
    pools = (
        {"Tritons": variant.vision} if variant.vision == variant.llm else {"vision": variant.vision, "LLM": variant.llm}
    )
    told = (f"{pool} {' '.join(addresses)}" for pool, addresses in pools.items())
    state = split_of(variant.weight, share, variant.is_draining)
    precision = [variant.precision] if variant.precision else []
    return "  ".join([variant.name, state, *told, f"models {variant.models}", *precision])
