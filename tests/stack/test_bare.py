"""`make serve` in a container with nothing but Debian, make and Python, under a real engine."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from tests.stack.conftest import Docker
from tests.support.paths import PROJECT
from tests.support.servers import eventually

BARE = os.environ.get("STACK_BARE", "").split()  # images, made by scripts/test_stack.py
SERVING_S = 240  # 6 times what two busy cores took; twice for each image, CI still ends within 45 minutes
SCENE, QUESTION = "benchmarks/scenes/new_003.webp", "what character is on the pink square?"


@pytest.mark.parametrize("image", BARE)
def test_make_serve_answers_with_no_other_command_before_it(docker: Docker, told: dict[str, str], image: str) -> None:
    name = f"glimpse-bare-{image.rpartition(':')[2]}"
    docker.said("create", "--name", name, "--workdir", "/glimpse", image, "make", "serve")
    try:
        committed = subprocess.run(
            ["git", "archive", "--prefix=glimpse/", "HEAD"], cwd=PROJECT, stdout=subprocess.PIPE, check=True
        ).stdout
        subprocess.run([docker.program, "cp", "-", f"{name}:/"], input=committed, check=True)
        began = time.monotonic()
        docker.said("start", name)

        def ready() -> bool:
            if not docker.inspect(name)["State"]["Running"]:
                pytest.fail(f"make serve ended: {docker.run('logs', name).stdout[-3000:]}", pytrace=False)
            return "Glimpse is ready" in docker.run("logs", name).stdout

        eventually(ready, SERVING_S, f"{name} serves", 0.5)
        took_s = time.monotonic() - began
        answer = docker.said("exec", name, ".venv/bin/glimpse", "ask", SCENE, QUESTION)
        assert answer.splitlines()[0] == "8"
        told[f"make serve on {image}"] = f"{took_s:.0f} s until it is ready"
    finally:
        docker.run("rm", "--force", "--volumes", name)
