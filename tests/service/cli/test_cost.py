"""`glimpse cost`: rows, prices, forms, and its figures against a real Prometheus and a real service's CPU time."""

from __future__ import annotations

import csv
import io
import json
import re
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import httpx
import pytest

from service.cli.client import AskFailed
from service.cli.cost import Prices, as_table, rows_of, total
from service.core.payer import HOLD_S, SERVICE
from service.system.resources import TICKS_A_SECOND, processes
from tests.service.cli.test_main import run
from tests.support.fakes import png
from tests.support.prometheus import started_prometheus
from tests.support.servers import StartGateway, eventually
from triton_models.costs import PERIOD_S

FOUND = [
    ("requests", {"tenant": "a", "variant": "default", "kind": "ok"}, 200.0),
    ("requests", {"tenant": "a", "variant": "default", "kind": "failed"}, 3.0),
    ("tokens", {"tenant": "a", "variant": "default", "kind": "visual"}, 6400.0),
    ("tokens", {"tenant": "a", "variant": "default", "kind": "prompt"}, 9.0),
    ("cpu_s", {"tenant": "a", "variant": "default", "kind": "gateway"}, 1000.0),
    ("cpu_s", {"tenant": "a", "variant": "default", "kind": "llm"}, 2600.0),
    ("gpu_s", {"tenant": "a", "variant": "large", "kind": "llm"}, 1800.0),
    ("requests", {"tenant": "b", "variant": "default", "kind": "ok"}, 0.0),
]


def prices(folder: Path, text: str) -> Path:
    path = folder / "prices.toml"
    path.write_text(text)
    return path


def test_rows_have_their_money_and_the_dearest_comes_first(tmp_path):
    listed = Prices.read(prices(tmp_path, 'currency = "EUR"\ncpu_hour = 0.04\n[variants.large]\ngpu_hour = 3\n'))
    large, default = rows_of(FOUND, listed)
    assert (large.variant, large.money, large.money_a_thousand_answers) == ("large", 1.5, None)
    assert (default.answers, default.failed, default.visual_tokens, default.cpu_s) == (200, 3, 6400, 3600)
    assert default.money == pytest.approx(0.04)
    assert default.money_a_thousand_answers == pytest.approx(0.2)
    lines = as_table([large, default, total([large, default])], listed.currency).splitlines()
    assert re.split(r"  +", lines[0]) == [
        *("tenant", "variant", "answers", "failed", "visual tokens", "generated tokens", "cpu s", "gpu s"),
        *("EUR", "EUR a thousand answers"),
    ]
    assert [re.split(r"  +", line) for line in lines[1:3]] == [
        ["a", "large", "0", "0", "0", "0", "0.0", "1,800.0", "1.5000", "-"],
        ["a", "default", "200", "3", "6,400", "0", "3,600.0", "0.0", "0.0400", "0.2000"],
    ]
    assert re.split(r"  +", lines[3])[-2:] == ["1.5400", "7.7000"]
    assert {len(line) for line in lines} == {len(lines[0])}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cpu_hour = 'dear'", "cpu_hour is 'dear': write the price of an hour as a number"),
        ("cpu_hour = -1", "cpu_hour is -1"),
        ("cpu_hour = true", "cpu_hour is True"),
        ("cpu_hour = inf", "cpu_hour is inf"),
        ("disk_hour = 1", "disk_hour is not a price"),
        ("cpu_hour", "is not TOML"),
        ("currency = 1", "write currency"),
        ("variants = 1", "in a table [variants.NAME]"),
        ("[variants]\nlarge = 1", "in a table [variants.large]"),
        ("[variants.large]\ncurrency = 'EUR'", "currency is not a price"),
    ],
)
def test_a_wrong_price_list_is_told(tmp_path, text, said):
    with pytest.raises(AskFailed, match=re.escape(said)):
        Prices.read(prices(tmp_path, text))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--range", "yesterday"), "write a number and a unit"),
        (("--prices", "/nowhere.toml"), "cannot read /nowhere.toml"),
        (("--prometheus", "http://127.0.0.1:1"), "no Prometheus answers"),
        (("--prometheus", "ftp://x"), "not an HTTP URL"),
    ],
)
def test_what_fails_is_told_in_one_line(arguments, said):
    status, shown, told = run("cost", *arguments)
    assert (status, shown, told.count("\n")) == (1, "", 1)
    assert said in told


def test_another_server_is_no_prometheus(server):
    status, _, told = run("cost", "--prometheus", server.url)
    assert status == 1
    assert "does not answer as Prometheus does" in told


OPENED_S = 3.0  # after the first request every account is there, and is told HOLD_S later
STEPS = ("prepare", "compose", "finish")


def cpu_seconds(gateway: int) -> dict[int, float]:
    """By process of a gateway with its own Triton, without the steps of `vqa`: their start is in no account."""
    found = list(processes(Path("/proc")))
    family = {gateway}
    for _ in range(4):
        family |= {each.pid for each in found if each.parent in family}
    return {
        each.pid: each.cpu_ticks / TICKS_A_SECOND
        for each in found
        if each.pid in family and not any(f"/{step}/1/model.py" in arguments(each.pid) for step in STEPS)
    }


def arguments(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:  # it has ended
        return ""


def charged(*addresses: str) -> dict[str, float]:
    """CPU seconds by tenant, as the gateway and Triton tell them."""
    sums: defaultdict[str, float] = defaultdict(float)
    for address in addresses:
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as response:
            text = response.read().decode()
        for labels, value in re.findall(r"^glimpse_tenant_cpu_seconds_total\{(.*)\} (\S+)$", text, re.MULTILINE):
            sums[re.findall(r'tenant="([^"]*)"', labels)[0]] += float(value)
    return dict(sums)


@pytest.mark.slow
@pytest.mark.needs("prometheus")
def test_the_sum_over_tenants_is_the_processes_cpu_time_and_glimpse_cost_shows_it(
    start_gateway: StartGateway, tmp_path: Path
):
    """Within 15 %: the rest is not told yet."""
    with start_gateway({"GLIMPSE_TRITON_START_TIMEOUT_S": "180"}) as gateway:
        environment = Path(f"/proc/{gateway.process.pid}/environ").read_text().split("\0")
        (port,) = (each.partition("=")[2] for each in environment if each.startswith("GLIMPSE_TRITON_METRICS_PORT="))
        triton = f"http://127.0.0.1:{port}"
        jobs = {"glimpse": gateway.url.removeprefix("http://"), "triton": triton.removeprefix("http://")}
        with started_prometheus(tmp_path, jobs) as prometheus, httpx.Client(base_url=gateway.url, timeout=60) as http:
            charged(gateway.url, triton)  # so that the start is told, and to nobody
            began, before_s = time.monotonic(), sum(cpu_seconds(gateway.process.pid).values())
            for number in range(90):
                tenant = "large" if number % 3 else "small"
                form = {"question": "describe the image.", "stream": "true", "max_tokens": "24"}
                picture = png((number // 2 % 256, 90, 90))
                sent = http.post("/v1/vqa", files={"image": picture}, data=form, headers={"x-tenant-id": tenant})
                assert sent.status_code == 200

            took_s, asked_s = time.monotonic() - began, sum(cpu_seconds(gateway.process.pid).values())
            # Probes, health checks and Prometheus go on. Every account is opened by the first requests.
            time.sleep(max(OPENED_S + HOLD_S - took_s, 0) + 3 * PERIOD_S)
            rest_s = time.monotonic() - began - took_s
            whole_s = sum(cpu_seconds(gateway.process.pid).values())
            of = charged(gateway.url, triton)
            assert sum(of.values()) == pytest.approx(whole_s, rel=0.15), (of, whole_s)
            assert set(of) == {"large", "small", SERVICE}
            # What goes on beside their requests may be charged to them meanwhile, and nothing else.
            most_s = asked_s - before_s
            least_s = most_s - (whole_s - asked_s) / rest_s * took_s
            assert 0.8 * least_s < of["large"] + of["small"] < 1.03 * most_s, (of, whole_s, asked_s, before_s)
            assert of["large"] / of["small"] == pytest.approx(2, rel=0.35)

            list_of_prices = prices(tmp_path, 'currency = "EUR"\ncpu_hour = 36\n')
            asked = ("cost", "--prometheus", prometheus.url, "--range", "10m", "--prices", str(list_of_prices))
            rows: dict[str, dict[str, str]] = {}

            def seen() -> bool:
                rows.update(
                    {row["tenant"]: row for row in csv.DictReader(io.StringIO(run(*asked, "--format", "csv")[1]))}
                )
                return {"large", "small"} <= {t for t, row in rows.items() if float(row["cpu_s"]) > 0.8 * of[t]}

            eventually(seen, 60, "Prometheus has every series")
            assert int(rows["large"]["answers"]) == pytest.approx(60, rel=0.1)
            # More was told meanwhile, and Prometheus extrapolates what began within the range.
            assert of["large"] * 0.8 < float(rows["large"]["cpu_s"]) < 1.5 * charged(gateway.url, triton)["large"]
            assert float(rows["large"]["money"]) == pytest.approx(float(rows["large"]["cpu_s"]) / 100, rel=0.01)
            found = json.loads(run(*asked, "--format", "json")[1])
            assert (found["currency"], {row["tenant"] for row in found["rows"]}) == ("EUR", set(rows))
            assert "EUR a thousand answers" in run(*asked)[1].splitlines()[0]
