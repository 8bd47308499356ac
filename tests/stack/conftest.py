"""The stack of docker-compose.yml under a real engine: `make test-stack` starts it and tells where.

Nothing here is collected by `make test`: the marker `stack` keeps it out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.ports import free_ports
from tests.stack import changes
from tests.support.paths import PROJECT
from tests.support.servers import eventually

UP_S = 300
HEALTHY_S = 240
EVERY_S = 0.5  # for conditions that take a program's start to know: the containers need the cores
# The balancer's port of metrics is not published, and its image has no program that asks.
METRICS = r"""exec 3<>/dev/tcp/127.0.0.1/9902
printf "GET /metrics HTTP/1.1\r\nHost: balancer\r\nConnection: close\r\n\r\n" >&3; cat <&3"""

FIGURES = pytest.StashKey[dict[str, str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.stack)
            item.add_marker(pytest.mark.slow)


@dataclass
class Docker:
    """The engine that scripts/test_stack.py started."""

    program: str = "/usr/bin/docker"

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([self.program, *arguments], capture_output=True, text=True, check=False)
        if check and done.returncode:
            pytest.fail(f"docker {' '.join(arguments)}: {done.stderr}{done.stdout}")
        return done

    def said(self, *arguments: str) -> str:
        return self.run(*arguments).stdout.strip()

    def inspect(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.said("inspect", name))
        return found[0]

    def health(self, name: str) -> str:
        return str(self.inspect(name)["State"].get("Health", {}).get("Status"))

    def wait_until_healthy(self, name: str) -> None:
        eventually(lambda: self.health(name) == "healthy", HEALTHY_S, f"{name} healthy", EVERY_S)


@dataclass
class Stack:
    """What `docker compose up` started."""

    docker: Docker
    environment: dict[str, str]
    url: str
    rpc: str
    prometheus: str
    weighing: str  # the balancer with two weights
    took_s: dict[str, float] = field(default_factory=dict)

    def compose(self, *arguments: str) -> str:
        command = [".venv/bin/docker-compose", "--env-file", os.devnull, *arguments]
        done = subprocess.run(
            command, cwd=PROJECT, env=self.environment, capture_output=True, text=True, check=False, timeout=600
        )
        if done.returncode:
            pytest.fail(f"docker compose {' '.join(arguments)}: {done.stderr[-3000:]}\n{self.logs()}")
        return done.stdout

    def logs(self) -> str:
        command = [".venv/bin/docker-compose", "--env-file", os.devnull, "logs", "--tail", "15"]
        said = subprocess.run(command, cwd=PROJECT, env=self.environment, capture_output=True, text=True, check=False)
        return said.stdout[-12_000:]

    def names(self, service: str = "") -> list[str]:
        """The containers of a service, or of all."""
        project = self.environment["COMPOSE_PROJECT_NAME"]
        filters = [f"label=com.docker.compose.project={project}"]
        if service:
            filters.append(f"label=com.docker.compose.service={service}")
        options = [option for each in filters for option in ("--filter", each)]
        return sorted(self.docker.said("ps", "--all", "--format", "{{.Names}}", *options).split())

    def wait_until_whole(self) -> None:
        """Two gateways and two Tritons, all healthy, and the balancer knows both gateways."""
        for service in ("gateway", "triton"):
            for name in self.names(service):
                self.docker.wait_until_healthy(name)
        eventually(lambda: self.gateways_in_turn() == 2, HEALTHY_S, "both gateways in the balancer's turns", EVERY_S)

    def gateways_in_turn(self) -> int:
        """How many gateways the balancer takes for healthy."""
        (balancer,) = self.names("balancer")
        metrics = self.docker.said("exec", balancer, "bash", "-c", METRICS)
        found = re.search(r'cluster_membership_healthy\{envoy_cluster_name="gateways"\} (\d+)', metrics)
        assert found is not None, metrics
        return int(found[1])

    def alerts(self, name: str, job: str) -> Iterator[str]:
        """Status by status, what Alertmanager told its webhook of an alert."""
        for line in filter(None, self.docker.said("logs", *self.names("alert-webhook")).splitlines()):
            for alert in json.loads(line)["alerts"]:
                if (alert["labels"]["alertname"], alert["labels"].get("job")) == (name, job):
                    yield alert["status"]


@pytest.fixture(scope="session")
def docker() -> Docker:
    if "STACK_BASE" not in os.environ:
        pytest.fail("these tests need an engine and images: run `make test-stack`", pytrace=False)
    return Docker()


@pytest.fixture(scope="session")
def stack(docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The default services with the changes of changes.py, up and healthy; down at the end, whatever happened."""
    names = ("HTTP_PORT", "GRPC_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT", "WEIGHING_PORT")
    ports = dict(zip(names, map(str, free_ports(len(names))), strict=True))
    changed = changes.write(tmp_path_factory.mktemp("changes"), os.environ["COMPOSE_PROJECT_NAME"])
    files = {"COMPOSE_FILE": f"{PROJECT}/docker-compose.yml{os.pathsep}{changed}"}
    environment = {**os.environ, **ports, **files, "REDIS_PASSWORD": "not-a-secret-of-anybody"}
    http, rpc, prometheus, _, weighing = (f"127.0.0.1:{port}" for port in ports.values())
    stack = Stack(docker, environment, f"http://{http}", rpc, f"http://{prometheus}", f"http://{weighing}")
    began = time.monotonic()
    try:
        stack.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", str(UP_S))
        stack.took_s["up --wait"] = time.monotonic() - began
        yield stack
    finally:
        stack.compose("down", "--volumes")


@pytest.fixture
def caller(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def told(pytestconfig: pytest.Config) -> dict[str, str]:
    """Figures that tests measured, printed at the end."""
    return pytestconfig.stash.setdefault(FIGURES, {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for what, figure in config.stash.get(FIGURES, {}).items():
        terminalreporter.write_line(f"{what}: {figure}")
