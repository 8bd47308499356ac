"""What the tests change in the stack: seconds instead of minutes, a receiver of alerts, a balancer with two weights.

Everything is made from the committed files, so what is wrong with them is wrong here too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import PROJECT

DEPLOY = PROJECT / "deploy"
EVERY = "2s"  # Prometheus asks and decides
WEIGHTS = re.compile(r"```yaml\n(      lb_policy: ROUND_ROBIN.*?)```", re.DOTALL)


def write(folder: Path, project: str) -> Path:
    """Write changed copies into the folder -> the file that Compose merges into docker-compose.yml."""
    write_prometheus(folder / "prometheus")
    write_alertmanager(folder / "alertmanager")
    write_weights(folder / "weights", project)
    compose = folder / "changes.yml"
    compose.write_text(
        f"""
services:
  gateway: # a slow machine may need more than 10 s to end what it began
    environment: {{ GLIMPSE_STOP_GRACE_S: 60 }}
    stop_grace_period: 90s
  prometheus: {{ volumes: ["{folder}/prometheus:/etc/prometheus:ro"] }}
  alertmanager: {{ volumes: ["{folder}/alertmanager:/etc/alertmanager:ro"] }}
  alert-webhook: # where the committed configuration of Alertmanager sends to
    image: ${{STACK_BASE}}
    stop_signal: SIGKILL # it has nothing to end
    command: [python3, /receiver.py]
    user: "10001:10001"
    read_only: true
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
    pids_limit: 512
    mem_limit: 128m
    networks: [back]
    volumes: ["{PROJECT}/tests/stack/receiver.py:/receiver.py:ro"]
  weighing-balancer:
    extends: {{ file: "{PROJECT}/docker-compose.yml", service: balancer }}
    volumes: ["{folder}/weights:/etc/envoy:ro"]
    ports: !override ["127.0.0.1:${{WEIGHING_PORT}}:8080"]
"""
    )
    return compose


def write_prometheus(folder: Path) -> None:
    """Every 2 s instead of 15 and 30, and alerts that fire after 4 s."""
    configuration = read(DEPLOY / "prometheus" / "prometheus.yml")
    configuration["global"] |= {"scrape_interval": EVERY, "scrape_timeout": EVERY, "evaluation_interval": EVERY}
    for job in configuration["scrape_configs"]:
        for names in job.get("dns_sd_configs", []):
            names["refresh_interval"] = EVERY
    dump(folder / "prometheus.yml", configuration)
    for path in (DEPLOY / "prometheus" / "rules").glob("*.yml"):
        groups = read(path)
        for rule in (rule for group in groups["groups"] for rule in group["rules"] if "alert" in rule):
            rule["for"] = "4s"
        dump(folder / "rules" / path.name, groups)


def write_alertmanager(folder: Path) -> None:
    configuration = read(DEPLOY / "alertmanager" / "alertmanager.yml")
    configuration["route"] |= {"group_wait": "1s", "group_interval": EVERY}
    dump(folder / "alertmanager.yml", configuration)


def write_weights(folder: Path, project: str) -> None:
    """The load balancer with the weights of docs/deployment.md: one gateway has each."""
    found = WEIGHTS.search((PROJECT / "docs" / "deployment.md").read_text())
    assert found is not None
    weights = yaml.safe_load(found[1])
    names = [
        end["endpoint"]["address"]["socket_address"]
        for end in weights["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ]
    assert [each["address"] for each in names] == ["gateway", "gateway-b"]
    for number, each in enumerate(names, start=1):
        each["address"] = f"{project}-gateway-{number}"
    configuration = read(DEPLOY / "envoy" / "envoy.yaml")
    (cluster,) = (each for each in configuration["static_resources"]["clusters"] if each["name"] == "gateways")
    cluster |= weights
    dump(folder / "envoy.yaml", configuration)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))
