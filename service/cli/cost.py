"""`glimpse cost`: what each tenant and variant took and cost over a time, from Prometheus and a list of prices."""

from __future__ import annotations

import csv
import io
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx
import typer

from service.cli.client import AskFailed, checked, is_loopback
from service.cli.terminal import fail

DURATION = re.compile(r"(\d+(ms|[smhdwy]))+")  # Prometheus's
TIMEOUT = httpx.Timeout(5.0, read=120.0)
# By what is counted: the metric, and the label that tells its kinds apart.
COUNTED = {
    "requests": ("glimpse_tenant_requests_total", "outcome"),
    "tokens": ("glimpse_tenant_tokens_total", "kind"),
    "cpu_s": ("glimpse_tenant_cpu_seconds_total", "part"),
    "gpu_s": ("glimpse_tenant_gpu_seconds_total", "part"),
}
COLUMNS = (
    "tenant",
    "variant",
    "answers",
    "failed",
    "visual_tokens",
    "generated_tokens",
    "cpu_s",
    "gpu_s",
    "money",
    "money_a_thousand_answers",
)


@dataclass(frozen=True, slots=True)
class Prices:
    """What an hour costs. A variant without prices of its own has the general ones."""

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0
    currency: str = ""
    variants: Mapping[str, Prices] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Prices:
        """Read a list of prices, a TOML file. Raises AskFailed."""
        try:
            values = tomllib.loads(path.read_text())
        except OSError as exc:
            raise AskFailed(f"cannot read {path}: {exc.strerror}") from exc
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
            raise AskFailed(f"{path} is not TOML: {exc}") from exc
        variants, currency = values.pop("variants", {}), values.pop("currency", "")
        if not isinstance(currency, str) or not isinstance(variants, dict):
            raise AskFailed(f'{path}: write currency = "EUR", and each variant\'s prices in a table [variants.NAME]')
        hours = {"cpu_hour": 0.0, "gpu_hour": 0.0} | cls._hours(values, path)
        for name, prices in variants.items():
            if not isinstance(prices, dict):
                raise AskFailed(f"{path}: write the prices of {name} in a table [variants.{name}]")
        of_variants = {name: hours | cls._hours(prices, path) for name, prices in variants.items()}
        found = {name: cls(own["cpu_hour"], own["gpu_hour"]) for name, own in of_variants.items()}
        return cls(hours["cpu_hour"], hours["gpu_hour"], currency, found)

    @staticmethod
    def _hours(values: Mapping[str, object], path: Path) -> dict[str, float]:
        hours: dict[str, float] = {}
        for name, value in values.items():
            if name not in ("cpu_hour", "gpu_hour"):
                raise AskFailed(f"{path}: {name} is not a price: write cpu_hour and gpu_hour, or currency")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise AskFailed(f"{path}: {name} is {value!r}: write the price of an hour as a number")
            hours[name] = float(value)
        return hours

    def of(self, variant: str, cpu_s: float, gpu_s: float) -> float:
        """Return what these seconds cost."""
        prices = self.variants.get(variant, self)
        return (cpu_s * prices.cpu_hour + gpu_s * prices.gpu_hour) / 3600


@dataclass(slots=True)
class Row:
    """What one tenant took of one variant."""

    tenant: str
    variant: str
    answers: float = 0.0
    failed: float = 0.0
    visual_tokens: float = 0.0
    generated_tokens: float = 0.0
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    money: float = 0.0

    @property
    def money_a_thousand_answers(self) -> float | None:
        return 1000 * self.money / self.answers if self.answers >= 0.5 else None

    def add(self, counted: str, kind: str, value: float) -> None:
        """Add an increase of one of COUNTED."""
        match counted, kind:
            case "requests", "ok":
                self.answers += value
            case "requests", _:
                self.failed += value
            case "tokens", "visual" | "generated":
                setattr(self, f"{kind}_tokens", getattr(self, f"{kind}_tokens") + value)
            case "cpu_s", _:
                self.cpu_s += value
            case "gpu_s", _:
                self.gpu_s += value

    def values(self) -> dict[str, Any]:
        """By column, rounded: counters that Prometheus extrapolates are no whole numbers."""
        digits = {"cpu_s": 3, "gpu_s": 3, "money": 6, "money_a_thousand_answers": 6}
        found: dict[str, Any] = {}
        for column in COLUMNS:
            value = getattr(self, column)
            found[column] = round(value, digits.get(column)) if isinstance(value, float) else value
        return found


def cost(
    prometheus: Annotated[
        str, typer.Option(envvar="PROMETHEUS_URL", help="Address of the Prometheus that scrapes the service.")
    ] = "http://127.0.0.1:9090",
    last: Annotated[
        str, typer.Option("--range", metavar="TIME", help="How far to look back, such as 90m, 24h or 30d.")
    ] = "24h",
    prices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prices as TOML: currency, cpu_hour, gpu_hour.")
    ] = None,
    form: Annotated[Literal["table", "json", "csv"], typer.Option("--format", help="How to print it.")] = "table",
) -> None:
    """Show what each tenant and variant took and cost.

    It has answers, tokens, CPU and GPU seconds, and money.

    \b
    The row (service) is start, probes and idle time, which no tenant caused; (others) are tenants without metrics of
    their own (GLIMPSE_TENANT_LABELS).
      glimpse cost --range 24h --prices prices.toml
      glimpse cost --prometheus http://prometheus:9090 --range 30d --format csv
    """
    if not DURATION.fullmatch(last):
        fail(f"--range is {last!r}: write a number and a unit, such as 90m, 24h or 30d")
    try:
        listed = Prices.read(prices) if prices else Prices()
        rows = rows_of(increases(prometheus, last), listed)
    except AskFailed as exc:
        fail(str(exc))
    if not rows:
        fail(
            f"{prometheus} has no glimpse_tenant metrics of the last {last}: check that it asks the gateways and their "
            "Tritons, or raise --range"
        )
    if form == "json":
        typer.echo(json.dumps({"range": last, "currency": listed.currency, "rows": [row.values() for row in rows]}))
    elif form == "csv":
        typer.echo(as_csv(rows), nl=False)
    else:
        typer.echo(as_table([*rows, total(rows)], listed.currency))


def increases(address: str, last: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """Ask Prometheus -> what was counted, labels, and its increase. Raises AskFailed."""
    url = checked(address)
    # A key of the service is not for Prometheus, so the client has no headers; this machine needs no proxy.
    transport = httpx.HTTPTransport(verify=url.scheme == "https") if is_loopback(url.host) else None
    with httpx.Client(base_url=url, timeout=TIMEOUT, transport=transport) as client:
        for counted, (metric, label) in COUNTED.items():
            query = f"sum by (tenant, variant, {label}) (increase({metric}[{last}]))"
            for series in asked(client, query):
                yield counted, {**series["metric"], "kind": series["metric"].get(label, "")}, float(series["value"][1])


def asked(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    """Raises AskFailed."""
    address = client.base_url
    try:
        response = client.post("/api/v1/query", data={"query": query})
        said = response.json()
        if said["status"] != "success":
            raise AskFailed(f"Prometheus at {address} refuses the query: {said.get('error', 'it does not say why')}")
        return list(said["data"]["result"])
    except httpx.RequestError as exc:
        raise AskFailed(f"no Prometheus answers at {address} ({exc}): start it, or set --prometheus") from exc
    except (ValueError, LookupError, TypeError) as exc:
        raise AskFailed(f"{address} does not answer as Prometheus does: check --prometheus") from exc


def rows_of(found: Iterable[tuple[str, Mapping[str, str], float]], prices: Prices) -> list[Row]:
    """Return a row for each tenant and variant that took anything, the dearest first."""
    rows: dict[tuple[str, str], Row] = {}
    for counted, labels, value in found:
        tenant, variant = labels.get("tenant", ""), labels.get("variant", "")
        row = rows.setdefault((tenant, variant), Row(tenant, variant))
        row.add(counted, labels["kind"], value)
    for row in rows.values():
        row.money = prices.of(row.variant, row.cpu_s, row.gpu_s)
    taken = [row for row in rows.values() if row.answers or row.failed or row.cpu_s or row.gpu_s]
    return sorted(taken, key=lambda row: (-row.money, -row.cpu_s, row.tenant, row.variant))


def total(rows: Iterable[Row]) -> Row:
    whole = Row("all", "")
    for row in rows:
        for name in ("answers", "failed", "visual_tokens", "generated_tokens", "cpu_s", "gpu_s", "money"):
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
    return whole


def as_csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.values() for row in rows)
    return text.getvalue()


def as_table(rows: Iterable[Row], currency: str) -> str:
    """Lines of columns, words to the left and numbers to the right."""
    heads = [column.replace("_", " ").replace("money", currency or "money") for column in COLUMNS]
    lines = [heads, *([cell(name, value) for name, value in row.values().items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = (0, 1)
    return "\n".join(
        "  ".join(
            text.ljust(width) if index in words else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if column in ("cpu_s", "gpu_s"):
        return f"{value:,.1f}"
    return f"{value:,.4f}" if column.startswith("money") else f"{value:,.0f}"
