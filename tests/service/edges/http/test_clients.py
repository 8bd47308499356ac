"""Client programs as they are: each asks a uvicorn with the gateway's protocol and event loop, and gets its answer.

Programs that the set-up installs must be there in CI. A JDK (116 MB to fetch, 266 MB on disk) and Go (81 and 464 MB)
are too large for every run. Java's client is asked if there is a JDK; `test_protocol.py` sends what it sends in any
case. Go's client offers no upgrade and sends what curl sends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.edges.http.test_protocol import QUESTION, SHORT, Served, served
from tests.support.fakes import png

pytestmark = pytest.mark.slow  # together: every test starts a program

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
SURROUNDINGS = {name: value for name, value in os.environ.items() if name.lower() not in map(str.lower, PROXIES)}


@pytest.fixture(scope="module")
def service() -> Iterator[Served]:
    with served(SHORT) as each:
        yield each


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "question.json").write_bytes(QUESTION)
    (tmp_path / "stream.json").write_bytes(json.dumps(json.loads(QUESTION) | {"stream": True}).encode())
    (tmp_path / "x.png").write_bytes(png())
    return tmp_path


def url_of(service: Served) -> str:
    return "http://{}:{}".format(*service.address)


def said(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=SURROUNDINGS | environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CURL = {
    "JSON": (["-H", "content-type: application/json", "--data-binary", "@question.json"], "/v1/vqa"),
    "form": (["-F", "image=@x.png", "-F", "question=what colour?"], "/v1/vqa"),
    "chunked": (
        ["-H", "transfer-encoding: chunked", "-H", "content-type: application/json", "-d", "@question.json"],
        "/v1/vqa",
    ),
    "upload": (["--data-binary", "@x.png"], "/v1/images"),
}
HTTP = {
    "as it comes": [],
    "h2c upgrade": ["--http2"],
    "HTTP/1.0": ["--http1.0"],
    "expect": ["-H", "expect: 100-continue"],
    "compressed": ["--compressed"],
}


@pytest.mark.needs("curl")
@pytest.mark.parametrize(
    ("way", "body"), [(way, body) for way in HTTP for body in CURL if (way, body) != ("HTTP/1.0", "chunked")]
)
def test_curl(service, folder, way, body):
    sent, path = CURL[body]
    answer = json.loads(said("curl", "-sS", *HTTP[way], *sent, url_of(service) + path, cwd=folder))
    assert answer.get("answer") == "red" or answer["id"].startswith("img_")


@pytest.mark.needs("curl")
@pytest.mark.parametrize("way", HTTP)
def test_curl_reads_a_stream(service, folder, way):
    sent = ["-H", "content-type: application/json", "--data-binary", "@stream.json"]
    lines = said("curl", "-sSN", *HTTP[way], *sent, f"{url_of(service)}/v1/vqa", cwd=folder).split("\n\n")
    assert json.loads(lines[0].removeprefix("data: "))["delta"] == "red"
    assert lines[-2:] == ["data: [DONE]", ""]


@pytest.mark.needs("curl")
@pytest.mark.parametrize("name", ["http_proxy", "all_proxy", "ALL_PROXY"])
def test_curl_through_a_proxy_that_passes_the_whole_url_on(service, folder, name):
    """A proxy gets `POST http://HOST/v1/vqa`, and may send the same line to the server."""
    sent = ["-H", "content-type: application/json", "--data-binary", "@question.json"]
    proxy = {name: url_of(service)}
    answer = said("curl", "-sS", *sent, "http://localhost/v1/vqa", cwd=folder, no_proxy="", **proxy)
    assert json.loads(answer)["answer"] == "red"


NODE = """
const [url, kind] = process.argv.slice(2);
const { readFileSync } = require("node:fs");
(async () => {
  const form = new FormData();
  form.append("image", new Blob([readFileSync("x.png")], { type: "image/png" }), "x.png");
  form.append("question", "what colour?");
  const json = { "content-type": "application/json" };
  const asked = {
    json: () => fetch(url + "/v1/vqa", { method: "POST", headers: json, body: readFileSync("question.json") }),
    text: () => fetch(url + "/v1/vqa", { method: "POST", headers: json, body: readFileSync("question.json", "utf8") }),
    form: () => fetch(url + "/v1/vqa", { method: "POST", body: form }),
    upload: () => fetch(url + "/v1/images", { method: "POST", body: new Blob([readFileSync("x.png")]) }),
    stream: () => fetch(url + "/v1/vqa", { method: "POST", headers: json, body: readFileSync("stream.json") }),
    chunked: () => fetch(url + "/v1/vqa", { method: "POST", headers: json, duplex: "half",
                                            body: new Blob([readFileSync("question.json")]).stream() }),
  }[kind];
  for (let i = 0; i < 2; i++) {  // the second one on the same connection
    const response = await asked();
    if (response.status !== 200) throw new Error(response.status + " " + await response.text());
    if (kind === "stream") {
      let text = "";
      for await (const piece of response.body) text += Buffer.from(piece).toString();
      const events = text.split("\\n\\n");
      if (events.at(-2) !== "data: [DONE]") throw new Error(text);
      console.log(JSON.parse(events[0].slice(6)).delta);
    } else {
      const answer = await response.json();
      console.log(answer.answer ?? answer.id.slice(0, 4));
    }
  }
})();
"""


@pytest.mark.needs("node")
@pytest.mark.parametrize("kind", ["json", "text", "form", "upload", "stream", "chunked"])
def test_node_with_fetch(service, folder, kind):
    expected = "img_" if kind == "upload" else "red"
    (folder / "ask.cjs").write_text(NODE)
    assert said("node", "ask.cjs", url_of(service), kind, cwd=folder).split() == [expected] * 2


JAVA = """
import java.net.URI;
import java.net.http.*;
import java.nio.file.*;
class Ask {
    public static void main(String[] args) throws Exception {
        var client = HttpClient.newHttpClient();
        for (int i = 1; i < args.length; i++) {
            var body = HttpRequest.BodyPublishers.ofFile(Path.of(args[i]));
            var json = args[i].endsWith(".json");
            var request = HttpRequest.newBuilder(URI.create(args[0] + (json ? "/v1/vqa" : "/v1/images")))
                .header("content-type", json ? "application/json" : "image/png").POST(body).build();
            System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
        }
    }
}
"""


# Not one of the programs that a test run must have: see above.
@pytest.mark.skipif(shutil.which("javac") is None, reason="no JDK (Debian, Ubuntu: default-jdk-headless)")
def test_java_with_its_default_client(service, folder):
    """It offers h2c with its first request."""
    (folder / "Ask.java").write_text(JAVA)
    files = ("question.json", "question.json", "x.png", "question.json")
    answers = [json.loads(line) for line in said("java", "Ask.java", url_of(service), *files, cwd=folder).splitlines()]
    assert [answer.get("answer", "")[:4] or answer["id"][:4] for answer in answers] == ["red", "red", "img_", "red"]
