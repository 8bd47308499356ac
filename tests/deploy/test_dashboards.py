"""Grafana's dashboards: equal to their code, valid PromQL, and with data from a service under load."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest
import yaml

from deploy.grafana.content import CAPACITY, DASHBOARDS
from deploy.grafana.panels import DEFAULT_CPU_PRICE, Dashboard, as_json
from service.upstreams.variants import Variant, Variants
from tests.deploy.metric_names import TRITON, known_metrics, metrics_in
from tests.support.fakes import png
from tests.support.paths import PROJECT
from tests.support.prometheus import started_prometheus
from tests.support.servers import Gateway, StartGateway, StartRedis, eventually

GRAFANA = PROJECT / "deploy" / "grafana"
VARIABLES = {"$__rate_interval": "15s", "$cpu_price_an_hour": DEFAULT_CPU_PRICE}


def filled_in(expression: str) -> str:
    """With values in the place of Grafana's variables."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def expressions(dashboard: dict) -> list[tuple[str, str]]:
    """(panel and query, expression) of a dashboard as JSON."""
    return [
        (f"{panel['title']} {target['refId']}", filled_in(target["expr"]))
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]


def faults(dashboard: dict) -> list[str]:
    """Expressions that are no PromQL, unknown metrics and variables, panels without a query, equal ids."""
    found = [f"{panel['title']} has no query" for panel in dashboard["panels"] if not panel["targets"]]
    recorded = set(re.findall(r"record: (\S+)", "".join(p.read_text() for p in rule_files())))
    for where, expression in expressions(dashboard):
        try:
            unknown = metrics_in(expression) - known_metrics() - recorded
        except ValueError as error:
            found.append(f"{where}: {error}")
            continue
        found += [f"{where}: there is no {name}" for name in sorted(unknown)]
    ids = [panel["id"] for panel in dashboard["panels"]]
    return found + (["two panels have one id"] if len(set(ids)) < len(ids) else [])


def with_exemplars() -> set[str]:
    """The expressions whose panels show exemplars."""
    targets = [target for each in committed().values() for panel in each["panels"] for target in panel["targets"]]
    found = {filled_in(target["expr"]) for target in targets if target.get("exemplar")}
    assert len(found) == 4  # first token and whole answer, of all and by variant
    return found


def rule_files() -> list:
    return sorted((PROJECT / "deploy" / "prometheus" / "rules").glob("*.yml"))


def committed() -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))}


def test_the_committed_dashboards_are_what_the_code_makes():
    """`python -m deploy.grafana` writes them again."""
    made = {f"{dashboard.uid}.json": as_json(dashboard) for dashboard in DASHBOARDS}
    assert {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()} == made


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda each: each.uid)
def test_a_dashboard_has_no_fault(dashboard: Dashboard):
    assert faults(json.loads(as_json(dashboard))) == []


@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("sum(rate(", "sum(rate(rate(", "unclosed"),
        ("glimpse_cpu_seconds_total", "glimpse_cpu_minutes_total", "there is no glimpse_cpu_minutes_total"),
        ("$cpu_price_an_hour", "$price", "unexpected|invalid|error"),
    ],
)
def test_a_broken_dashboard_is_found(before, after, fault):
    text = as_json(CAPACITY)
    assert before in text
    found = faults(json.loads(text.replace(before, after)))
    assert found
    assert re.search(fault, "\n".join(found))


def test_two_equal_panels_still_have_two_ids_and_places():
    doubled = replace(CAPACITY, panels=[*CAPACITY.panels, CAPACITY.panels[0]])
    panels = json.loads(as_json(doubled))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)


def test_grafana_finds_the_data_source_and_the_dashboards():
    provisioning = GRAFANA / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "glimpse.yml").read_text())["datasources"]
    source, traces = sources
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "glimpse.yml").read_text())["providers"]
    assert (source["type"], source["access"], provider["type"]) == ("prometheus", "proxy", "file")
    every = yaml.safe_load((PROJECT / "deploy" / "prometheus" / "prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == every["scrape_interval"]
    (link,) = source["jsonData"]["exemplarTraceIdDestinations"]
    assert (link["name"], link["datasourceUid"]) == ("trace_id", traces["uid"])
    services = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    for each in sources:
        assert httpx.URL(each["url"]).host in services
    for dashboard in committed().values():
        assert "datasource" in {variable["name"] for variable in dashboard["templating"]["list"]}


def test_the_runbook_names_dashboards_and_panels_that_exist():
    page = re.sub(r"\s+", " ", (PROJECT / "docs" / "runbooks.md").read_text())
    dashboards, panels = set(re.findall(r"(?<!\*)\*([\w:' ]+)\*(?!\*)", page)), set(re.findall(r'"([^"]+)"', page))
    assert min(len(dashboards), len(panels)) > 4
    assert dashboards <= {dashboard.title for dashboard in DASHBOARDS}
    assert panels <= {panel.title for dashboard in DASHBOARDS for panel in dashboard.panels}


@contextmanager
def load(gateway: Gateway) -> Iterator[Callable[[], int]]:
    """New images and follow-ups, streamed or not, some closer; yields how many questions were answered."""
    answered = 0
    ended = threading.Event()

    def ask() -> None:
        nonlocal answered
        with httpx.Client(base_url=gateway.url, timeout=30) as http:
            for number in itertools.count():
                if ended.is_set():
                    return
                form = {
                    "question": "what colour is the circle?",
                    "stream": str(number % 2 == 0).lower(),
                    "detail": "high" if number % 4 == 3 else "low",
                }
                picture = png((number // 3 % 256, 90, 90))  # each is asked about three times
                answered += http.post("/v1/vqa", files={"image": picture}, data=form).status_code == 200

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield lambda: answered
    finally:
        ended.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.needs("prometheus")
def test_every_query_of_every_panel_has_data_from_a_service_under_load(
    tmp_path, triton, repository, start_gateway: StartGateway, start_redis: StartRedis
):
    url, metrics = triton.access.url, f"127.0.0.1:{triton.access.ports.metrics}"
    redis = start_redis("--maxmemory", "64mb", "--maxmemory-policy", "allkeys-lru")
    variants = tmp_path / "variants.json"
    variants.write_bytes(Variants({"stable": Variant("stable", str(repository), (url,), (url,), 1.0)}).to_json())
    traces = "http://127.0.0.1:9"  # nobody takes the spans: exemplars name the traces anyway
    settings = {"GLIMPSE_VARIANTS": str(variants), "GLIMPSE_REDIS_URL": redis.url, "GLIMPSE_OTLP_ENDPOINT": traces}
    with start_gateway(settings) as gateway:
        jobs = {"glimpse": gateway.url.removeprefix("http://"), "triton": metrics}
        with load(gateway) as answered, started_prometheus(tmp_path, jobs) as prometheus:
            missing = dict.fromkeys(
                (f"{uid}: {where}", expression)
                for uid, dashboard in committed().items()
                for where, expression in expressions(dashboard)
            )
            assert len(missing) > 50

            def all_answer() -> bool:
                for where, expression in tuple(missing):
                    if any(math.isfinite(value) for value in prometheus.query(expression)):
                        del missing[where, expression]
                return not missing

            try:
                eventually(all_answer, 120, "data for every query")
            finally:
                assert [where for where, _ in missing] == []
            assert answered() > 10
            for expression in with_exemplars():
                assert all(
                    re.fullmatch("[0-9a-f]{32}", each["trace_id"]) for each in prometheus.exemplars(expression, 60)
                )
                assert prometheus.exemplars(expression, 60)
            with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=5) as response:
                assert set(re.findall(r"^# TYPE (nv_\w+)", response.read().decode(), re.MULTILINE)) >= TRITON
            with urllib.request.urlopen(f"{prometheus.url}/api/v1/rules", timeout=5) as response:
                groups = json.load(response)["data"]["groups"]
            assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}
