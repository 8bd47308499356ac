"""The files that containers are made of, by their own validators; a broken copy of each fails its check."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import PREFIX, Settings, read_settings
from tests.deploy.triton_options import faults_of_options
from tests.support.paths import PROJECT

BIN = PROJECT / ".venv" / "bin"
DOCKERFILE = PROJECT / "Dockerfile"
COMPOSE = PROJECT / "docker-compose.yml"


def faults_of_dockerfile(path: Path) -> str:
    done = subprocess.run([BIN / "hadolint", path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def faults_of_compose(path: Path, environment: Mapping[str, str]) -> str:
    command = [
        BIN / "docker-compose", "--project-directory", PROJECT, "--file", path, "--env-file", os.devnull,
        "--profile", "full", "--profile", "gpu", "--profile", "simple", "config", "--quiet",
    ]  # fmt: skip
    told = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=told)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("file", ["Dockerfile", "deploy/kubernetes/overlays/gpu-multinode/Dockerfile"])
def test_a_dockerfile_is_clean(file: str) -> None:
    assert faults_of_dockerfile(PROJECT / file) == ""


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("tini=0.19.*", "tini", "DL3008"),
        ("ARG BASE=python:3.13-slim-trixie", "ARG BASE=python:3.13-slim-trixie\nFROM python:latest", "DL3007"),
        ("USER 10001:10001", "USER root", "DL3002"),
        ("WORKDIR /src", "RUN cd /src", "DL3003"),
        ("COPY pyproject.toml", "COPPY pyproject.toml", "unexpected"),
    ],
)
def test_a_broken_dockerfile_is_found(good: str, bad: str, rule: str, tmp_path: Path) -> None:
    text = DOCKERFILE.read_text()
    assert good in text
    broken = tmp_path / "Dockerfile"
    broken.write_text(text.replace(good, bad, 1))
    assert rule in faults_of_dockerfile(broken)


def test_the_stack_is_valid_with_every_profile() -> None:
    assert faults_of_compose(COMPOSE, {"REDIS_PASSWORD": "x"}) == ""


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ("condition: service_healthy }", "condition: service_happy }", "depends_on"),
        ("networks: [front, back]", "networks: [front, beck]", "undefined network"),
        ("  cap_drop: [ALL]", "  cap_dropp: [ALL]", "cap_dropp"),
        ("mem_limit: 6g", "mem_limit: much", "mem_limit"),
        ('"prometheus:/prometheus"', '"promotheus:/prometheus"', "undefined volume"),
    ],
)
def test_a_broken_stack_is_found(good: str, bad: str, said: str, tmp_path: Path) -> None:
    text = COMPOSE.read_text()
    assert good in text
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(text.replace(good, bad, 1))
    assert said in faults_of_compose(broken, {"REDIS_PASSWORD": "x"})


def test_the_stack_has_no_secret_and_asks_for_one() -> None:
    assert "REDIS_PASSWORD is missing a value: run make up" in faults_of_compose(COMPOSE, {})
    for line in (PROJECT / ".env.example").read_text().splitlines():
        assert not re.fullmatch(r"\w*PASSWORD=.+", line)


def test_the_stack_believes_no_network_to_be_of_proxies_before_somebody_names_it() -> None:
    environment = yaml.safe_load(COMPOSE.read_text())["services"]["gateway"]["environment"]
    assert environment["GLIMPSE_TRUSTED_PROXIES"] == "${TRUSTED_PROXIES:-}"


def test_every_setting_in_the_files_is_one() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for file in (DOCKERFILE, COMPOSE):
        assert set(re.findall(rf"{PREFIX}[A-Z_]+[A-Z]", file.read_text())) <= known


def test_the_tritons_of_gpus_have_options_that_exist() -> None:
    commands = [
        " ".join(service["command"])
        for service in yaml.safe_load(COMPOSE.read_text())["services"].values()
        if "tritonserver" in service.get("command", [])
    ]
    assert len(commands) == 2
    assert [fault for command in commands for fault in faults_of_options(command)] == []


def test_with_what_the_page_sets_gateways_and_tritons_of_gpus_serve_the_same_models() -> None:
    page = (PROJECT / "docs" / "deployment.md").read_text()
    (told,) = re.findall(r"^- The profile `gpu`: .*?(?=^- |\Z)", page, re.MULTILINE | re.DOTALL)
    variables = dict(re.findall(r"`([A-Z_]+)=(\S+)`", told))
    services = services_of_gpus(variables)
    assert services["triton"]["deploy"]["replicas"] == 0
    gateway = services["gateway"]["environment"]
    for setting, pool in (("GLIMPSE_VISION_URL", "triton-vision"), ("GLIMPSE_LLM_URL", "triton-llm")):
        assert gateway[setting] == f"{pool}:8001"
        assert mounted(services["gateway"], gateway["GLIMPSE_MODEL_REPOSITORY"]) == "/srv/engines"
        assert mounted(services[pool], "/models") == "/srv/engines"


@pytest.mark.parametrize(
    ("variables", "gateways_source"),
    [({}, "engines"), ({"MODELS": "/engines"}, str(PROJECT / "engines"))],  # a volume, a folder
    ids=["nothing set", "models"],
)
def test_without_engines_set_tritons_of_gpus_read_the_folder_of_the_build(
    variables: dict[str, str], gateways_source: str
) -> None:
    services = services_of_gpus(variables)
    for pool in ("triton-vision", "triton-llm"):
        (mount,) = services[pool]["volumes"]
        assert (mount["type"], mount["source"], mount["target"]) == ("bind", str(PROJECT / "engines"), "/models")
        assert mount["bind"] == {"create_host_path": False}
    assert mounted(services["gateway"], "/engines") == gateways_source


def test_prometheus_finds_every_triton_by_a_name_that_no_gateway_calls() -> None:
    services = services_of_gpus({})
    configuration = yaml.safe_load((PROJECT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (job,) = [each for each in configuration["scrape_configs"] if each["job_name"] == "triton"]
    (found_by,) = job["dns_sd_configs"]
    for service in ("triton", "triton-vision", "triton-llm"):
        assert services[service]["networks"]["back"]["aliases"] == found_by["names"]
    called = {services["gateway"]["environment"][f"GLIMPSE_{pool}_URL"] for pool in ("VISION", "LLM")}
    assert called == {"triton:8001"}
    assert "triton" not in found_by["names"]


def services_of_gpus(variables: Mapping[str, str]) -> dict[str, Any]:
    """The services as Compose reads them with the profile gpu and these variables."""
    command = [
        BIN / "docker-compose", "--project-directory", PROJECT, "--file", COMPOSE, "--env-file", os.devnull,
        "--profile", "gpu", "--profile", "simple", "config", "--format", "json",
    ]  # fmt: skip
    environment = {"PATH": os.environ["PATH"], "REDIS_PASSWORD": "x", "TRITON_KEY": "y", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


def mounted(service: dict[str, Any], target: str) -> str:
    """What of the machine the container sees there."""
    (source,) = [each["source"] for each in service["volumes"] if each["target"] == target]
    return str(source)


def test_with_the_page_s_commands_the_stack_asks_for_keys(tmp_path: Path) -> None:
    page = (PROJECT / "docs" / "deployment.md").read_text()
    (commands,) = [block for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) if "keys create" in block]
    told = f'glimpse() {{ echo "$*"; touch "${{@: -1}}"; }}\n{commands}'
    said = subprocess.run(["bash", "-euc", told], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["keys", "create", "--tenant", "acme", "--keys", "keys/keys.json"]
    variables = dict(line.split("=", 1) for line in (tmp_path / ".env").read_text().splitlines())
    for name in ("gateway", "all-in-one"):
        service = services_of_gpus(variables)[name]
        settings = settings_of(service)
        assert (settings.keys, settings.without_keys, settings.metrics_without_key) == ("/keys/keys.json", None, True)
        assert mounted(service, "/keys") == str(PROJECT / "keys")
        assert service["user"] == f"{os.getuid()}:{os.getgid()}"


def test_the_stack_takes_quotas_and_a_model_repository_for_gateways_and_tritons() -> None:
    services = services_of_gpus({"QUOTA_REQUESTS_PER_MINUTE": "60", "MODELS": "/engines", "ENGINES": "/srv/mine"})
    for name in ("gateway", "all-in-one", "triton"):
        assert settings_of(services[name]).model_repository == Path("/engines")
        assert mounted(services[name], "/engines") == "/srv/mine"
    assert settings_of(services["gateway"]).quota_requests_per_minute == 60


def test_with_nothing_set_the_stack_asks_for_no_key_and_sets_no_quota() -> None:
    services = services_of_gpus({})
    settings = settings_of(services["gateway"])
    assert (settings.keys, settings.without_keys) == (None, "anyone-may-ask")
    quotas = [name for name in Settings.model_fields if name.startswith("quota_") and name != "quota_gateways"]
    assert [getattr(settings, name) for name in quotas] == [getattr(Settings(), name) for name in quotas]
    assert mounted(services["gateway"], "/keys") == "keys"  # a volume
    assert services["gateway"]["user"] == "10001:10001"
    assert settings_of(services["triton"]).model_repository == Path("/models")


def settings_of(service: dict[str, Any]) -> Settings:
    return read_settings({name: str(value) for name, value in service["environment"].items()})


def test_grafana_does_not_start_without_a_password() -> None:
    shell, option, command = yaml.safe_load(COMPOSE.read_text())["services"]["grafana"]["entrypoint"]
    done = subprocess.run(
        [shell, option, command.replace("$$", "$")], capture_output=True, text=True, check=False, env={}
    )
    assert (done.returncode, done.stderr) == (1, "set GRAFANA_PASSWORD in .env\n")


def test_images_read_models_of_a_checkout_that_only_its_owner_reads() -> None:
    text = DOCKERFILE.read_text()
    assert re.findall(r"^COPY model_repository .*\n(.*)", text, re.MULTILINE) == ["RUN chmod -R a+rX /models"]


def test_make_names_what_containers_could_not_read(tmp_path: Path) -> None:
    shutil.copy(PROJECT / "Makefile", tmp_path)
    shutil.copytree(PROJECT / "deploy", tmp_path / "deploy")
    command = ["make", "--no-print-directory", "readable-mounts"]

    def said() -> tuple[int, str]:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    subprocess.run(["chmod", "-R", "a+rX", "deploy"], cwd=tmp_path, check=True)
    assert said() == (0, "")
    for name, mode in (("deploy/envoy/envoy.yaml", 0o600), ("deploy/grafana/dashboards", 0o700)):
        path = tmp_path / name
        before = path.stat().st_mode
        path.chmod(mode)
        status, text = said()
        assert status != 0
        assert f"cannot read {name}: run chmod -R a+rX" in text
        path.chmod(before)


def test_make_looks_at_every_folder_that_the_stack_mounts() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"].values()
    mounts = [str(mount) for service in services for mount in service.get("volumes", ())]
    folders = {mount.split(":")[0].removeprefix("./deploy/") for mount in mounts if mount.startswith("./deploy/")}
    (looked,) = re.findall(
        r"^MOUNTED := \$\(addprefix deploy/,(.*)\)$", (PROJECT / "Makefile").read_text(), re.MULTILINE
    )
    assert {*looked.split()} == folders


def faults_of_collector(text: str) -> list[str]:
    """What a pipeline names and nothing defines, and hosts that are no service of the stack. No collector runs here."""
    configuration = yaml.safe_load(text)
    hosts = {*yaml.safe_load(COMPOSE.read_text())["services"], "0.0.0.0"}
    used = [
        f"{kind}: {name}"
        for pipeline in configuration["service"]["pipelines"].values()
        for kind, names in pipeline.items()
        for name in names
        if name not in configuration[kind]
    ]
    named = re.findall(r'endpoint: "?([^:"]+):', text)
    return used + [host for host in named if host not in hosts]


@pytest.mark.parametrize(
    ("good", "bad", "found"),
    [
        ("", "", []),
        ("receivers: [otlp]", "receivers: [oltp]", ["receivers: oltp"]),
        ('"traces:4317"', '"trace:4317"', ["trace"]),
    ],
    ids=["committed", "receiver", "host"],
)
def test_the_collector_fits_together_and_a_broken_copy_does_not(good: str, bad: str, found: list[str]) -> None:
    text = (PROJECT / "deploy" / "traces" / "collector.yaml").read_text()
    assert good in text
    assert faults_of_collector(text.replace(good, bad)) == found


def test_every_variable_of_the_example_is_read() -> None:
    names = re.findall(r"^(\w+)=", (PROJECT / ".env.example").read_text(), re.MULTILINE)
    assert [name for name in names if f"${{{name}:" not in COMPOSE.read_text()] == []


def test_every_image_is_pinned_and_every_container_of_the_stack_bounded() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for name, service in services.items():
        image = re.sub(r"\$\{\w+:-(.*)\}", r"\1", service["image"])
        assert image.startswith("glimpse/") or re.search(r":v?\d", image), name
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["pids_limit"] >= 512, name
        assert service["mem_limit"], name
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", [])), name
