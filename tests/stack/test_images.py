"""The images that the committed Dockerfile makes, each run by itself under a real engine."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.stack.conftest import EVERY_S, Docker
from tests.support.paths import PROJECT
from tests.support.servers import eventually

SCENE = PROJECT / "benchmarks" / "scenes" / "new_003.webp"
QUESTION = "what character is on the pink square?"  # the README's, whose answer is 8
TARGETS = ("gateway", "triton-cpu", "all-in-one")
GATEWAY_MB = 200  # over its base
HARDENED = (
    "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "1024",
    "--env", "GLIMPSE_WITHOUT_KEYS=anyone-may-ask",
)  # fmt: skip


@contextmanager
def running(docker: Docker, image: str, *options: str) -> Iterator[str]:
    """A container's name. It is removed at the end."""
    name = f"glimpse-test-{uuid.uuid4().hex[:8]}"
    docker.run("run", "--detach", "--name", name, *options, image)
    try:
        yield name
    finally:
        docker.run("rm", "--force", "--volumes", name)


def answer(docker: Docker, name: str) -> str:
    """Ask the container's gateway the README's question."""
    address = docker.said("port", name, "8080/tcp").splitlines()[0]
    with httpx.Client(base_url=f"http://{address}", timeout=30, trust_env=False) as client:
        said = client.post("/v1/vqa", data={"question": QUESTION}, files={"image": SCENE.read_bytes()})
    assert said.status_code == 200, said.text
    return str(said.json()["answer"])


def ends_with_one_line(docker: Docker, *options: str) -> str:
    """The container ends by itself, with status 1. What it said."""
    with running(docker, "glimpse/all-in-one", *options) as name:
        eventually(lambda: docker.inspect(name)["State"]["Status"] == "exited", 120, f"{name} ended", EVERY_S)
        assert docker.inspect(name)["State"]["ExitCode"] == 1
        said = docker.run("logs", name)
    lines = [line for line in (said.stdout + said.stderr).splitlines() if line]
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def test_the_gateway_is_small_and_holds_no_weights_tests_or_engine(docker: Docker, told: dict[str, str]) -> None:
    base_mb = docker.inspect(os.environ["STACK_BASE"])["Size"] / 1e6
    over_mb = {target: docker.inspect(f"glimpse/{target}")["Size"] / 1e6 - base_mb for target in TARGETS}
    told["images over their base"] = ", ".join(f"{target} {size:.0f} MB" for target, size in over_mb.items())
    assert over_mb["gateway"] <= GATEWAY_MB
    listing = docker.said("run", "--rm", "--entrypoint", "find", "glimpse/gateway", "/opt", "/models", "/usr/bin")
    names = {Path(line).name for line in listing.splitlines()}
    assert {"service", "card.json", "tini"} <= names
    assert names.isdisjoint({"onnxruntime", "torch", "pytriton", "tests", "benchmarks", "gcc", "pip", "strip"})
    assert [name for name in names if name.endswith((".onnx", ".safetensors"))] == []


def test_an_image_says_what_it_is(docker: Docker) -> None:
    for target in TARGETS:
        config = docker.inspect(f"glimpse/{target}")["Config"]
        assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
        assert config["User"] == "10001:10001"
        assert config["Entrypoint"] == ["tini", "--"]
        assert config["Healthcheck"]["Test"][:3] == ["CMD", "glimpse", "health"]


def test_all_in_one_answers_under_any_user_without_a_right_or_a_file(docker: Docker) -> None:
    answers_without_a_right_or_a_file(docker, "glimpse/all-in-one")


def answers_without_a_right_or_a_file(docker: Docker, image: str) -> None:
    """Read-only, under an arbitrary user id, with Docker's default 64 MB of shared memory."""
    options = (*HARDENED, "--tmpfs", "/tmp", "--user", "54321:54321", "--publish", "127.0.0.1::8080")
    with running(docker, image, *options) as name:
        docker.wait_until_healthy(name)
        assert docker.inspect(name)["HostConfig"]["ShmSize"] == 64 << 20
        assert docker.said("exec", name, "id", "-u") == "54321"
        assert answer(docker, name) == "8"
        assert "answered in" in docker.said("exec", name, "glimpse", "canary")
        docker.run("stop", name)
        assert docker.inspect(name)["State"]["ExitCode"] == 0


PLATFORM = ("--cap-drop", "ALL", "--env", "GLIMPSE_WITHOUT_KEYS=anyone-may-ask")  # which has a file system to write to


def called(docker: Docker, name: str, port: int) -> httpx.Client:
    """A client of the container's port, as soon as the container's own health check is content."""
    docker.wait_until_healthy(name)
    address = docker.said("port", name, f"{port}/tcp").splitlines()[0]
    return httpx.Client(base_url=f"http://{address}", timeout=60, trust_env=False)


def test_vertex_ai_calls_the_container_at_its_port_and_its_routes(docker: Docker) -> None:
    route = "/v1/endpoints/17/deployedModels/4"
    told = ("AIP_HTTP_PORT=8085", f"AIP_HEALTH_ROUTE={route}", f"AIP_PREDICT_ROUTE={route}:predict")
    variables = [option for each in told for option in ("--env", each)]
    with (
        running(docker, "glimpse/all-in-one", *PLATFORM, *variables, "--publish", "127.0.0.1::8085") as name,
        called(docker, name, 8085) as client,
    ):
        assert client.get(route).status_code == 200
        asked = json.loads((PROJECT / "deploy" / "vertex" / "request.json").read_text())
        said = client.post(f"{route}:predict", json=asked)
        assert said.status_code == 200, said.text
        count, description = said.json()["predictions"]
        assert count["answer"].isdecimal()
        assert description["answer"]


def test_a_space_runs_the_container_under_its_own_user_at_its_own_port(docker: Docker) -> None:
    docker.run("build", "--quiet", "--tag", "glimpse/space", str(PROJECT / "deploy" / "huggingface"))
    with (
        running(docker, "glimpse/space", "--user", "1000:1000", "--publish", "127.0.0.1::7860") as name,
        called(docker, name, 7860) as client,
    ):
        assert client.get("/").headers["content-type"].startswith("text/html")
        said = client.post("/v1/vqa", data={"question": QUESTION}, files={"image": SCENE.read_bytes()})
        assert said.json()["answer"] == "8"


def test_a_platform_that_names_only_a_port_gets_its_answers_there(docker: Docker) -> None:
    options = (*PLATFORM, "--env", "PORT=9123", "--publish", "127.0.0.1::9123")
    with running(docker, "glimpse/all-in-one", *options) as name, called(docker, name, 9123) as client:
        said = client.post("/v1/vqa", data={"question": QUESTION}, files={"image": SCENE.read_bytes()})
        assert said.json()["answer"] == "8"


def test_nothing_to_write_is_one_line(docker: Docker) -> None:
    assert "no temporary folder can be made in /tmp" in ends_with_one_line(docker, *HARDENED)
    without_shared_memory = ends_with_one_line(docker, *HARDENED, "--tmpfs", "/tmp", "--ipc", "none")
    assert "nothing can be written in /dev/shm" in without_shared_memory


def test_a_command_that_an_image_lacks_names_no_script_of_ours(docker: Docker) -> None:
    for command in ("build", "train", "eval"):
        done = docker.run("run", "--rm", "glimpse/gateway", "glimpse", command, check=False)
        assert done.returncode == 1
        assert "run it in Glimpse's folder" in done.stderr
        assert "set_up.py" not in done.stderr


@pytest.mark.parametrize("target", TARGETS)
def test_every_image_has_a_bill_of_materials(docker: Docker, target: str, tmp_path: Path) -> None:
    bill = tmp_path / "bill.json"
    command = [
        ".venv/bin/trivy", "image", "--quiet", "--offline-scan", "--disable-telemetry",
        "--format", "cyclonedx", "--image-src", "docker",
        "--cache-dir", str(tmp_path / "cache"), "--output", str(bill), f"glimpse/{target}:latest",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = {part["name"] for part in json.loads(bill.read_text())["components"]}
    assert {"glimpse", "tritonclient", "tini"} <= parts
    assert ("onnxruntime" in parts) == (target != "gateway")
