"""A real Prometheus for a test, which scrapes real servers every second."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.support.paths import PROJECT
from tests.support.servers import eventually, free_ports


class Prometheus:
    """Answers PromQL. `url` ends without a slash."""

    def __init__(self, url: str) -> None:
        self.url = url

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as response:
                return response.status == 200
        except OSError:
            return False

    def query(self, expression: str) -> list[float]:
        """The value of each series now. Raises ValueError if Prometheus refuses the expression."""
        body = urllib.parse.urlencode({"query": expression}).encode()
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query", body, timeout=10) as response:
                found = json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode()) from error
        series = [found["result"]] if found["resultType"] == "scalar" else [each["value"] for each in found["result"]]
        return [float(value) for _, value in series]

    def exemplars(self, expression: str, seconds: float) -> list[dict[str, str]]:
        """The labels of each exemplar that the expression's series had in the last seconds."""
        now = time.time()
        asked = urllib.parse.urlencode({"query": expression, "start": now - seconds, "end": now})
        with urllib.request.urlopen(f"{self.url}/api/v1/query_exemplars?{asked}", timeout=10) as response:
            found = json.load(response)["data"]
        return [each["labels"] for series in found for each in series["exemplars"]]


@contextmanager
def started_prometheus(folder: Path, jobs: Mapping[str, str]) -> Iterator[Prometheus]:
    """Scrape these jobs, name and address, and evaluate the committed rules, every second.

    It has the features that docker-compose.yml switches on.
    """
    stack = yaml.safe_load((PROJECT / "docker-compose.yml").read_text())
    features = [option for option in stack["services"]["prometheus"]["command"] if "--enable-feature" in option]
    configuration = yaml.safe_load((PROJECT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(PROJECT / "deploy" / "prometheus" / "rules" / "*.yml")]
    del configuration["alerting"]
    configuration["scrape_configs"] = [
        {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in jobs.items()
    ]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    (port,) = free_ports(1)
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
        *features,
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        prometheus = Prometheus(f"http://127.0.0.1:{port}")
        eventually(prometheus.answers, 20, f"Prometheus ready, see {folder / 'prometheus.log'}")
        yield prometheus
    finally:
        process.terminate()
        process.wait(timeout=20)
