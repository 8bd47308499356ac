"""Prometheus's rules: each alert fires in one case and is silent in another, and names only what exists."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.deploy.metric_names import FOREIGN, known_metrics, metrics_in
from tests.support.paths import PROJECT
from tests.test_docs import anchors

PROMETHEUS = PROJECT / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RUNBOOKS = PROJECT / "docs" / "runbooks.md"
MINUTES_A_DAY = 1440

Labels = dict[str, str]


def rules() -> list[dict]:
    return [
        rule
        for path in RULES
        for group in yaml.load(path.read_text(), yaml.CSafeLoader)["groups"]
        for rule in group["rules"]
    ]


def alerts() -> list[dict]:
    return [rule for rule in rules() if "alert" in rule]


def run(*command: str, cwd: Path) -> str:
    """What the program says if it finds a fault, else nothing."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@dataclass(frozen=True)
class Case:
    """Series with one value a minute, in promtool's notation, and the alerts that fire at the end."""

    alert: str
    name: str
    minutes: int
    series: dict[str, str]
    fires: Sequence[Labels] = ()
    rest: dict[str, str] = field(default_factory=dict)  # series that both cases need

    def test(self) -> dict:
        severity = {rule.get("labels", {}).get("burn_rate", ""): rule["labels"]["severity"] for rule in alerts()
                    if rule["alert"] == self.alert}  # fmt: skip
        expected = [
            {"exp_labels": {"severity": severity[labels.get("burn_rate", "")], **labels}} for labels in self.fires
        ]
        series = {**self.rest, **self.series}
        return {
            "name": self.name,
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [
                {"eval_time": f"{self.minutes}m", "alertname": self.alert, "exp_alerts": expected},
            ],
        }


def burning(alert: str, name: str, factor: float, minutes: int, fires: Sequence[str], ended: int = 0) -> Case:
    """Three days, at the end of which the budget burns at `factor` for so many minutes, until `ended` minutes ago."""
    days = 3 * MINUTES_A_DAY
    before = days - minutes - ended
    if alert == "GlimpseErrorBudgetBurns":
        bad = 100 * factor  # of 100,000 a minute, with a budget of 0.1 %
        end = f" {bad * minutes:.0f}+0x{ended}" if ended else ""
        series = {
            'glimpse_requests_total{outcome="ok"}': f"0+{100_000 - bad:.0f}x{days}",
            'glimpse_requests_total{outcome="unavailable"}': f"0x{before - 1} 0+{bad:.0f}x{minutes}{end}",
            'glimpse_refusals_total{reason="saturated"}': f"0x{days}",
        }
    else:
        bad = 50 * factor  # of 1,000 a minute, with a budget of 5 %
        good = f"0+1000x{before - 1} {1000 * before:.0f}+{1000 - bad:.0f}x{minutes}"
        end = f" {1000 * before + (1000 - bad) * minutes + 1000:.0f}+1000x{ended - 1}" if ended else ""
        series = {
            'glimpse_time_to_first_token_seconds_bucket{le="0.5"}': good + end,
            "glimpse_time_to_first_token_seconds_count": f"0+1000x{days}",
        }
    expected = [{"burn_rate": burn} for burn in fires]
    return Case(alert, name, days, series, expected)


# What burns at this factor for this long exhausts the budget, in the windows of the named rates only.
BURNS = [
    burning(alert, f"{alert}: {name}", factor, minutes, fires, ended)
    for alert in ("GlimpseErrorBudgetBurns", "GlimpseFirstTokenBudgetBurns")
    for name, factor, minutes, fires, ended in [
        ("an hour at 16", 16, 60, ["14.4"], 0),
        ("six hours at 8", 8, 360, ["6"], 0),
        ("a day at 4", 4, MINUTES_A_DAY, ["3", "1"], 0),
        ("three days at 1.5", 1.5, 3 * MINUTES_A_DAY - 60, ["1"], 0),
        ("three days at half of the budget", 0.5, 3 * MINUTES_A_DAY - 60, [], 0),
        ("an hour at 16 that has ended", 16, 60, [], 10),
    ]
]
DAYS = 3 * MINUTES_A_DAY
BURNS.append(
    Case(
        "GlimpseErrorBudgetBurns",
        "GlimpseErrorBudgetBurns: deadlines that callers made short, and waits of batches",
        DAYS,
        {
            'glimpse_requests_total{outcome="ok"}': f"0+1000x{DAYS}",
            'glimpse_requests_total{outcome="short_deadline"}': f"0+500x{DAYS}",
            'glimpse_refusals_total{reason="short_deadline"}': f"0+500x{DAYS}",
            'glimpse_refusals_total{reason="batch_wait"}': f"0+500x{DAYS}",
        },
    )
)
GATEWAY = {"instance": "g:8080", "job": "glimpse"}
HOST = 'instance="g:8080", job="glimpse"'
LOOKUPS = "glimpse_feature_cache_lookups_total"


def pair(
    alert: str,
    minutes: int,
    fire: dict[str, str],
    silent: dict[str, str],
    labels: Labels,
    rest: dict[str, str] | None = None,
) -> list[Case]:
    rest = rest or {}
    return [
        Case(alert, f"{alert} fires", minutes, fire, [labels], rest=rest),
        Case(alert, f"{alert} is silent", minutes, silent, rest=rest),
    ]


def hit_rate(hits_before: int, hits: int) -> dict[str, str]:
    """A day with so many hits of 100 lookups a minute, then an hour with others."""
    day = MINUTES_A_DAY
    return {
        f'{LOOKUPS}{{tier="memory", result="hit"}}': f"0+{hits_before}x{day} {hits_before * day + hits}+{hits}x60",
        f'{LOOKUPS}{{tier="memory", result="miss"}}': f"0+{100 - hits_before}x{day} "
        f"{(100 - hits_before) * day + 100 - hits}+{100 - hits}x60",
    }


CAUSES = [
    *pair("GlimpseDown", 10, {f"up{{{HOST}}}": "1x4 0x10"}, {f"up{{{HOST}}}": "1x10"}, {}),
    *pair("GlimpseGatewayDown", 10, {f"up{{{HOST}}}": "1x4 0x10"}, {f"up{{{HOST}}}": "1x8 0x10"}, GATEWAY),
    *pair(
        "GlimpseTritonDown",
        10,
        {'up{instance="t:8002", job="triton"}': "1x4 0x10"},
        {'up{instance="t:8002", job="triton"}': "0x10"},  # its models are loaded
        {"instance": "t:8002", "job": "triton"},
    ),
    *pair(
        "GlimpseReplicaMissing",
        20,
        {'up{instance="two:8002", job="triton"}': "1x14 stale"},
        {'up{instance="two:8002", job="triton"}': "1x14 stale 1x10"},
        {"job": "triton"},
        rest={'up{instance="one:8002", job="triton"}': "1x30"},
    ),
    *pair(
        "GlimpsePodNotReady",
        40,
        {'kube_deployment_status_replicas_unavailable{deployment="glimpse-llm"}': "0x5 1x40"},
        {'kube_deployment_status_replicas_unavailable{deployment="glimpse-llm"}': "0x5 1x15 0x20"},
        {"deployment": "glimpse-llm", "pods_of": "glimpse-llm"},
    ),
    *pair(
        "GlimpsePodNotReady",
        40,
        {
            'kube_statefulset_replicas{statefulset="glimpse-llm-0"}': "2x50",
            'kube_statefulset_status_replicas_ready{statefulset="glimpse-llm-0"}': "2x5 1x40",
        },
        {
            'kube_statefulset_replicas{statefulset="glimpse-llm-0"}': "2x50",
            'kube_statefulset_status_replicas_ready{statefulset="glimpse-llm-0"}': "2x5 1x15 2x20",
        },
        {"statefulset": "glimpse-llm-0", "pods_of": "glimpse-llm-0"},
    ),
    *pair(
        "GlimpseModelDead",
        10,
        {f'glimpse_model_ready{{model="llm", {HOST}}}': "1x4 0x10"},
        {f'glimpse_model_ready{{model="llm", {HOST}}}': "1x4 0 1x10"},
        {"model": "llm", **GATEWAY},
        rest={f'glimpse_model_ready{{model="see", {HOST}}}': "1x20"},
    ),
    *pair(
        "GlimpseUpstreamOut",
        10,
        {f'glimpse_upstream_ready{{variant="next", upstream="t:8001", {HOST}}}': "1x4 0x10"},
        {f'glimpse_upstream_ready{{variant="next", upstream="t:8001", {HOST}}}': "1x8 0x1 1x10"},
        {"variant": "next", "upstream": "t:8001", **GATEWAY},
    ),
    *pair(
        "GlimpseFallbackInUse",
        20,
        {'glimpse_fallbacks_total{variant="next", reason="late"}': "0+5x30"},
        {'glimpse_fallbacks_total{variant="next", reason="late"}': "0+1x30"},
        {"variant": "next"},
        rest={'glimpse_requests_total{outcome="ok", variant="next"}': "0+100x30"},
    ),
    *pair(
        "GlimpseCanaryFailing",
        30,
        {'kube_cronjob_status_last_successful_time{cronjob="glimpse-canary"}': "600x30"},
        {'kube_cronjob_status_last_successful_time{cronjob="glimpse-canary"}': "1500x30"},
        {"cronjob": "glimpse-canary"},
    ),
    *pair(  # one that has had no answer yet
        "GlimpseCanaryFailing",
        30,
        {'kube_cronjob_created{cronjob="glimpse-canary", namespace="glimpse"}': "600x30"},
        {'kube_cronjob_created{cronjob="glimpse-canary", namespace="glimpse"}': "1500x30"},
        {"cronjob": "glimpse-canary", "namespace": "glimpse"},
    ),
    Case(
        "GlimpseCanaryFailing",
        "GlimpseCanaryFailing is silent after an answer, however old the job is",
        30,
        {
            'kube_cronjob_created{cronjob="glimpse-canary", namespace="glimpse"}': "0x30",
            'kube_cronjob_status_last_successful_time{cronjob="glimpse-canary", namespace="glimpse"}': "1500x30",
        },
    ),
    *pair(
        "GlimpseKeysNotRead",
        10,
        {f"glimpse_keys_readable{{{HOST}}}": "1x4 0x10"},
        {f"glimpse_keys_readable{{{HOST}}}": "1x8 0x1 1x10"},
        GATEWAY,
    ),
    *pair(
        "GlimpseVariantsNotRead",
        20,
        {f"glimpse_variants_readable{{{HOST}}}": "1x4 0x20"},
        {f"glimpse_variants_readable{{{HOST}}}": "0x4 1x20"},
        GATEWAY,
    ),
    *pair(
        "GlimpseQuotaIsLocal",
        20,
        {f"glimpse_quota_is_local{{{HOST}}}": "0x4 1x20"},
        {f"glimpse_quota_is_local{{{HOST}}}": "0x4 1x4 0x20"},
        GATEWAY,
    ),
    *pair(
        "GlimpseRedisDown",
        10,
        {f"glimpse_redis_breaker_open{{{HOST}}}": "0x4 1x10"},
        {f"glimpse_redis_breaker_open{{{HOST}}}": "0x8 1x1 0x10"},
        GATEWAY,
    ),
    *pair("GlimpseHitRateCollapsed", MINUTES_A_DAY + 60, hit_rate(80, 10), hit_rate(80, 60), {}),
    *pair(
        "GlimpseFidelityLowered",
        60,
        {f"glimpse_fidelity_level{{{HOST}}}": "0x10 2x60"},
        {f"glimpse_fidelity_level{{{HOST}}}": "0x10 2x30 0x5 2x20"},
        GATEWAY,
    ),
    *pair(
        "GlimpseQueueGrowing",
        40,
        {f'glimpse_requests_waiting{{kind="single_image", {HOST}}}': "0x10 30x60"},  # a plateau
        {f'glimpse_requests_waiting{{kind="single_image", {HOST}}}': "0x10 15x60"},
        {},
        rest={f"up{{{HOST}}}": "1x60"},
    ),
    Case(
        "GlimpseQueueGrowing",
        "GlimpseQueueGrowing is silent if as many wait for two gateways",
        40,
        {f'glimpse_requests_waiting{{kind="single_image", {HOST}}}': "0x10 30x60"},
        rest={f"up{{{HOST}}}": "1x60", 'up{instance="h:8080", job="glimpse"}': "1x60"},
    ),
    Case(
        "GlimpseQueueGrowing",
        "GlimpseQueueGrowing is silent after a burst",
        40,
        {f'glimpse_requests_waiting{{kind="single_image", {HOST}}}': "0x33 90x4 0x20"},
        rest={f"up{{{HOST}}}": "1x60"},
    ),
    *pair(
        "GlimpseRefusing",
        20,
        {'glimpse_refusals_total{reason="saturated"}': "0+10x30"},
        {
            'glimpse_refusals_total{reason="saturated"}': "0+2x30",
            'glimpse_refusals_total{reason="tenant_share"}': "0+50x30",
            'glimpse_refusals_total{reason="short_deadline"}': "0+50x30",
            'glimpse_refusals_total{reason="batch_wait"}': "0+50x30",
        },
        {},
        rest={'glimpse_requests_total{outcome="ok"}': "0+100x30"},
    ),
    *pair(
        "GlimpseEdgeFailing",
        20,
        {'glimpse_http_requests_total{method="POST", route="none", status="503"}': "0+10x30"},
        {
            'glimpse_http_requests_total{method="GET", route="/health/ready", status="503"}': "0+90x30",
            'glimpse_http_requests_total{method="POST", route="/v1/vqa", status="504"}': "0+90x30",
            'glimpse_grpc_requests_total{method="Watch", status="UNAVAILABLE"}': "0+90x30",
            'glimpse_grpc_requests_total{method="Answer", status="INTERNAL"}': "0+2x30",
        },
        {},
        rest={'glimpse_http_requests_total{method="POST", route="/v1/vqa", status="200"}': "0+100x30"},
    ),
    Case(
        "GlimpseEdgeFailing",
        "GlimpseEdgeFailing fires if all calls of gRPC fail",
        20,
        {'glimpse_grpc_requests_total{method="Answer", status="UNAVAILABLE"}': "0+10x30"},
        [{}],
    ),
    *pair(
        "GlimpseDrainStuck",
        20,
        {'kube_pod_deletion_timestamp{pod="glimpse-gateway-1"}': "600x20"},
        {'kube_pod_deletion_timestamp{pod="glimpse-gateway-1"}': "1150x20"},
        {"pod": "glimpse-gateway-1"},
    ),
    *pair(
        "GlimpseMemoryNearLimit",
        20,
        {f"glimpse_memory_bytes{{{HOST}}}": "95x20"},
        {f"glimpse_memory_bytes{{{HOST}}}": "80x20"},
        GATEWAY,
        rest={f"glimpse_memory_limit_bytes{{{HOST}}}": "100x20"},
    ),
    *pair(
        "GlimpseContainerMemoryNearLimit",
        20,
        {'container_memory_working_set_bytes{pod="glimpse-llm-1", container="triton"}': "95x20"},
        {'container_memory_working_set_bytes{pod="glimpse-llm-1", container="triton"}': "80x20"},
        {"pod": "glimpse-llm-1", "container": "triton"},
        rest={'container_spec_memory_limit_bytes{pod="glimpse-llm-1", container="triton"}': "100x20"},
    ),
    *pair(
        "GlimpseEventLoopLate",
        20,
        {f'glimpse_event_loop_lag_seconds_bucket{{le="0.12", {HOST}}}': "0+590x30"},
        {f'glimpse_event_loop_lag_seconds_bucket{{le="0.12", {HOST}}}': "0+600x30"},
        {"instance": "g:8080"},
        rest={
            f'glimpse_event_loop_lag_seconds_bucket{{le="0.04", {HOST}}}': "0+590x30",
            f'glimpse_event_loop_lag_seconds_bucket{{le="1.0", {HOST}}}': "0+600x30",
            f'glimpse_event_loop_lag_seconds_bucket{{le="+Inf", {HOST}}}': "0+600x30",
        },
    ),
]


OF_CAUSES = (("recording.yml", "causes.yml"), "1m")
OF_BURNS = (("objectives.yml", "burn_rates.yml"), "12h")  # a window of days over values of each minute takes long


def failures(
    folder: Path, cases: Sequence[Case], names: Sequence[str], every: str, change: tuple[str, str] | None = None
) -> str:
    """What `promtool test rules` says of the rules in these files, evaluated so often.

    Annotations stay out: their texts are for people, and promtool compares them.
    """
    order = []
    for path in (PROMETHEUS / "rules" / name for name in names):
        text = path.read_text()
        if change is not None:
            text = text.replace(*change)
        groups = yaml.safe_load(text)
        for group in groups["groups"]:
            order.append(group["name"])
            for rule in group["rules"]:
                rule.pop("annotations", None)
        (folder / path.name).write_text(yaml.safe_dump(groups))
    document = {
        "rule_files": list(names),
        "evaluation_interval": every,
        "group_eval_order": order,
        "tests": [case.test() for case in cases],
    }
    (folder / "tests.yml").write_text(yaml.safe_dump(document))
    return run("promtool", "test", "rules", "tests.yml", cwd=folder)


@pytest.mark.needs("promtool")
def test_promtool_accepts_configuration_and_rules():
    assert run("promtool", "check", "config", "prometheus.yml", cwd=PROMETHEUS) == ""


@pytest.mark.needs("promtool")
def test_promtool_refuses_broken_rules(tmp_path):
    broken = (
        (PROMETHEUS / "rules" / "causes.yml").read_text().replace("glimpse_model_ready == 0", "glimpse_model_ready ==")
    )
    (tmp_path / "causes.yml").write_text(broken)
    assert "parse error" in run("promtool", "check", "rules", "causes.yml", cwd=tmp_path)


@pytest.mark.needs("amtool")
def test_amtool_accepts_the_alertmanager_and_refuses_a_broken_copy(tmp_path):
    path = PROJECT / "deploy" / "alertmanager" / "alertmanager.yml"
    assert run("amtool", "check-config", str(path), cwd=tmp_path) == ""
    (tmp_path / "broken.yml").write_text(path.read_text().replace("receiver: pages", "receiver: nobody"))
    assert "undefined receiver" in run("amtool", "check-config", "broken.yml", cwd=tmp_path)


def inhibitors_of(alert: str) -> dict[str, list[str]]:
    """{the alert that keeps this one quiet: the labels that both must have alike}."""
    rules = yaml.safe_load((PROJECT / "deploy" / "alertmanager" / "alertmanager.yml").read_text())["inhibit_rules"]
    return {
        source: rule.get("equal", [])
        for rule in rules
        if any(re.fullmatch(rf'alertname=~?"(.*\|)?{alert}(\|.*)?"', target) for target in rule["target_matchers"])
        for source in re.findall(r'alertname="(\w+)"', " ".join(rule["source_matchers"]))
    }


def test_an_alert_of_one_glimpse_keeps_none_of_another_quiet():
    assert inhibitors_of("GlimpseModelDead") == {"GlimpseTritonDown": ["namespace"]}
    assert inhibitors_of("GlimpseQuotaIsLocal") == {"GlimpseRedisDown": ["namespace", "instance"]}


@pytest.mark.slow
@pytest.mark.needs("promtool")
def test_each_cause_fires_and_is_silent(tmp_path):
    assert failures(tmp_path, [case for case in CAUSES if case.minutes < MINUTES_A_DAY], *OF_CAUSES) == ""


@pytest.mark.needs("promtool")
def test_a_cause_that_compares_with_yesterday_fires_and_is_silent(tmp_path):
    files, _ = OF_CAUSES
    assert failures(tmp_path, [case for case in CAUSES if case.minutes > MINUTES_A_DAY], files, "15m") == ""


@pytest.mark.slow
@pytest.mark.needs("promtool")
def test_each_burn_rate_fires_and_is_silent(tmp_path):
    assert failures(tmp_path, BURNS, *OF_BURNS) == ""


@pytest.mark.needs("promtool")
@pytest.mark.parametrize(
    ("alert", "change"),
    [
        ("GlimpseModelDead", ("glimpse_model_ready == 0", "glimpse_model_ready == 2")),
        ("GlimpseMemoryNearLimit", ("_limit_bytes > 0.9", "_limit_bytes > 0.5")),
        ("GlimpseRefusing", ("saturated|deadline", "saturated|tenant_share")),
    ],
)
def test_a_broken_rule_fails_its_cases(tmp_path, alert, change):
    assert "FAILED" in failures(tmp_path, [case for case in CAUSES if case.alert == alert], *OF_CAUSES, change)


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent():
    expected = {(rule["alert"], rule["labels"].get("burn_rate", "")) for rule in alerts()}
    cases = [*BURNS, *CAUSES]
    assert {(case.alert, labels.get("burn_rate", "")) for case in cases for labels in case.fires} == expected
    assert {case.alert for case in cases if not case.fires} == {name for name, _ in expected}


def test_every_alert_has_a_severity_that_is_routed_and_its_page_of_the_runbook():
    routes = (PROJECT / "deploy" / "alertmanager" / "alertmanager.yml").read_text()
    for rule in alerts():
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert PROJECT / file == RUNBOOKS
        assert anchor == rule["alert"].lower()
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert f"{rule['labels']['severity']}s" in routes
    assert {rule["alert"].lower() for rule in alerts()} <= anchors(RUNBOOKS)


def test_each_page_of_the_runbook_says_what_to_look_at_and_what_to_do():
    pages = re.split(r"^## ", RUNBOOKS.read_text(), flags=re.MULTILINE)[1:]
    named = {page.partition("\n")[0]: page for page in pages if page.startswith("Glimpse")}
    assert named.keys() == {rule["alert"] for rule in alerts()}
    for name, page in named.items():
        assert "**Look at**" in page, name
        assert "**Do**" in page, name


def test_every_metric_of_a_rule_exists():
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    named = {metric for rule in rules() for metric in metrics_in(rule["expr"])}
    assert named - recorded - known_metrics() - FOREIGN == set()
    assert FOREIGN - named == set(), "an allowance that no rule needs"


def test_every_recorded_series_is_used():
    used = "\n".join(rule["expr"] for rule in rules())
    for dashboard in (PROJECT / "deploy" / "grafana" / "dashboards").glob("*.json"):
        used += dashboard.read_text()
    assert [rule["record"] for rule in rules() if "record" in rule and rule["record"] not in used] == []
