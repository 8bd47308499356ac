"""Each file in examples/ runs as it stands against the real service, and docs/examples.md prints the same text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
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
    done = ended(name, address)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def ended(name: str, address: str) -> subprocess.CompletedProcess[str]:
    command = {".py": [sys.executable], ".sh": ["sh"], ".mjs": ["node"]}[Path(name).suffix]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return subprocess.run(
        [*command, f"examples/{name}", address],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


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


class Canned(BaseHTTPRequestHandler):
    """A service whose answers are written down: what a real one says only now and then."""

    stream = batch = ""

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["content-length"]))
        answer = {"answer": "8", "vision": {"vision_tokens": 133}, "id": "img_1", "admitted": True, "image_tokens": []}
        told = json.dumps(answer)
        if self.path == "/v1/vqa/batch":
            told = self.batch
        elif b'"stream"' in asked:
            told = self.stream
        self.send_response(200)
        self.end_headers()
        self.wfile.write(told.encode())

    def log_message(self, *_: object) -> None: ...


def events(*told: dict[str, object]) -> str:
    return "".join(f"data: {json.dumps(each, ensure_ascii=False)}\n\n" for each in told)


ODD = "red\u2028and\x85blue"
WHOLE = events({"delta": ODD}, {"finish_reason": "stop"}) + "data: [DONE]\n\n"
BROKEN = events({"delta": "red"}, {"error": {"message": "the model llm does not answer"}})
ANSWERED = [
    {"index": 0, "answer": ""},
    {"index": 1, "error": {"message": "unknown image"}},
    {"index": 2, "answer": ODD},
]
ENDED = {"error": {"message": "the batch took too long"}}


@pytest.fixture
def canned() -> Iterator[tuple[type[Canned], str]]:
    handler = type("Handler", (Canned,), {"stream": WHOLE, "batch": batch_of(*ANSWERED)})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def batch_of(*results: dict[str, object]) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in results)


def program_of_the_readme(url: str) -> str:
    (program,) = re.findall(r"```python\n(import httpx.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    return program.replace("http://127.0.0.1:8080", url)


def test_httpx_reads_answers_with_other_line_ends_empty_ones_and_failed_ones(canned):
    _, url = canned
    done = ended("python_httpx.py", url)
    assert done.returncode == 0, done.stderr
    assert f"{ODD}\n0 \n1 unknown image\n2 {ODD}\n" in done.stdout


@pytest.mark.parametrize(
    "name", ["python_httpx.py", pytest.param("javascript_fetch.mjs", marks=pytest.mark.needs("node"))]
)
def test_an_error_amid_a_stream_is_told(canned, name):
    handler, url = canned
    handler.stream = BROKEN
    done = ended(name, url)
    assert done.returncode != 0
    assert "the model llm does not answer" in done.stderr


def test_httpx_tells_that_a_batch_ended_early(canned):
    handler, url = canned
    handler.batch = batch_of(ANSWERED[0], ENDED)
    done = ended("python_httpx.py", url)
    assert (done.returncode, done.stderr) == (1, "the batch took too long\n")


@pytest.mark.parametrize(("stream", "said"), [(WHOLE, ODD), (BROKEN, "redthe model llm does not answer")])
def test_the_program_of_the_readme_tells_answers_and_errors(canned, stream, said):
    handler, url = canned
    handler.stream = stream
    done = subprocess.run(
        [sys.executable, "-c", program_of_the_readme(url)],
        cwd=PROJECT,
        env={"PATH": os.environ["PATH"], "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode() == said


def test_each_example_is_tested():
    tested = set(re.findall(r'run\("([\w.]+)"', Path(__file__).read_text()))
    assert tested == {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_docs_print_each_example_as_it_is(path: Path):
    page = (PROJECT / "docs" / "examples.md").read_text()
    language = {".py": "python", ".sh": "sh", ".mjs": "js"}[path.suffix]
    assert f"(../examples/{path.name})\n\n```{language}\n{path.read_text()}```\n" in page
