"""Each file in examples/ runs as it stands against the real service, and docs/examples.md prints the same text."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.triton_server.supervision import EmbeddedTriton
from tests.support.paths import PROJECT
from tests.support.servers import Gateway

FILES = sorted(path for path in (PROJECT / "examples").iterdir() if path.is_file())
LONG = "a large blue ring, a large pink square with 8, a large cyan triangle with 5 and a medium blue square with x"
RINGS = {"0 yes", "1 no"}


def run(name: str, address: str) -> list[str]:
    """Lines that the example prints, started from the project's folder as its first line says."""
    command = {".py": [sys.executable], ".sh": ["sh"], ".mjs": ["node"]}[Path(name).suffix]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        [*command, f"examples/{name}", address],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_openai_client(gateway: Gateway):
    assert run("python_openai.py", gateway.url) == ["8 32", LONG, "context_length_exceeded"]


def test_httpx(gateway: Gateway):
    answer, long, *batch, estimate = run("python_httpx.py", gateway.url)
    assert (answer, long, set(batch), estimate) == ("8 133", LONG, RINGS, "True [32, 32]")


def test_a_video(gateway: Gateway):
    answer, times, *rest = run("python_video.py", gateway.url)
    assert answer.startswith("answer: ")
    assert times.startswith("0.0 s ")
    assert len(times.split(" s")) == 5
    assert rest == ["hit", "2 frames"]


def test_grpc(gateway: Gateway):
    answer, long, *batch = run("python_grpc.py", gateway.rpc)
    assert (answer, long, set(batch)) == ("8 133", LONG, RINGS)


@pytest.mark.needs("node")
def test_javascript(gateway: Gateway):
    assert run("javascript_fetch.mjs", gateway.url) == ["8 133", LONG]


@pytest.mark.needs("curl")
def test_curl(gateway: Gateway):
    answer, *events = run("curl.sh", gateway.url)
    assert '"answer":"8"' in answer
    assert "data: [DONE]" in events
    results = [
        re.findall(r'"index":(\d).*"answer":"(\w+)"|"answer":"(\w+)".*"index":(\d)', line) for line in events[-2:]
    ]
    assert sorted(word for ((*words,),) in results for word in words if word) == ["0", "1", "4", "cyan"]


def test_a_plain_client_of_kserve_on_tritons_own_port(triton: EmbeddedTriton):
    (text,) = run("kserve.py", triton.access.url)
    assert text == f" {LONG}"  # as the LLM writes it after its prompt


def test_each_example_is_tested():
    tested = set(re.findall(r'run\("([\w.]+)"', Path(__file__).read_text()))
    assert tested == {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_docs_print_each_example_as_it_is(path: Path):
    page = (PROJECT / "docs" / "examples.md").read_text()
    language = {".py": "python", ".sh": "sh", ".mjs": "js"}[path.suffix]
    assert f"(../examples/{path.name})\n\n```{language}\n{path.read_text()}```\n" in page
