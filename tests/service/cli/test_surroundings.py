"""The command in the surroundings that a user may have: each ends in one line, never in a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from service.cli.ask import is_id, require_sendable
from service.cli.client import AskFailed, connected, is_loopback, stream
from service.cli.options import url_of

pytestmark = pytest.mark.slow  # together: almost every test starts a command of its own

CODE = "from service.cli.main import main; main()"
COMMANDS = [["ask", "-", "a?"], ["eval"], ["cache", "warm", "."]]
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
HELP = [["eval"], ["train"], ["build"], ["bench"], ["verify"], ["ablate"]]


class Talker(BaseHTTPRequestHandler):
    """Keeps every image under one id, and answers every question with one delta and a short pause."""

    asked: list[str]
    reached: threading.Event

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()
        if self.path == "/v1/images":
            self.wfile.write(b'{"id": "img_0"}')
            return
        self.reached.set()
        if b"wait" in body:
            threading.Event().wait(20)  # the command is stopped meanwhile
        self.wfile.write('data: {"delta": "r\u00e9d"}\n\ndata: [DONE]\n\n'.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def talker() -> Iterator[ThreadingHTTPServer]:
    Talker.asked, Talker.reached = [], threading.Event()
    with ThreadingHTTPServer(("127.0.0.1", 0), Talker) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def glimpse(*arguments: str | bytes, shell: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command with these words and this environment only; `shell` stands behind it on its line."""
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", CODE, *arguments]
    return subprocess.run(
        command, env=environment, input="pixels", capture_output=True, text=True, check=False, timeout=60
    )


def told(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed command says."""
    assert done.returncode not in (0, 120), done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("glimpse: ")
    return line


def test_no_proxy_and_no_certificates_are_asked_for_this_machine(talker):
    environment = dict.fromkeys(PROXIES, "http://127.0.0.1:1") | {"SSL_CERT_FILE": "/nowhere.pem"}
    done = glimpse("ask", "-", "a?", "--url", address(talker), **environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "r\u00e9d\n", "")
    assert Talker.asked == ["/v1/images", "/v1/vqa"]


@pytest.mark.parametrize("variable", PROXIES)
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1", "no:\u2003such//proxy", "ftp://x"])
def test_the_proxy_of_this_machine_need_not_even_be_one(talker, monkeypatch, variable, proxy):
    monkeypatch.setenv(variable, proxy)
    with connected(address(talker)) as client:
        assert client.post("/v1/images", content=b"pixels").json() == {"id": "img_0"}


@pytest.mark.parametrize(
    "environment",
    [
        {"all_proxy": "socks5://127.0.0.1:1"},
        {"HTTPS_PROXY": "ftp://127.0.0.1:1"},
        {"http_proxy": "no:\u2003such//proxy"},
        {"SSL_CERT_FILE": "/nowhere.pem"},
    ],
)
def test_surroundings_that_do_not_work_are_named(monkeypatch, environment):
    for inherited in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(inherited, raising=False)
    ((name, value),) = environment.items()
    monkeypatch.setenv(name, value)
    with pytest.raises(AskFailed, match=f"cannot connect with .*{name} of the environment"):
        connected("https://glimpse.invalid")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_tells_such_surroundings_in_a_line(command, tmp_path):
    (tmp_path / "a.png").write_bytes(b"pixels")
    command = [str(tmp_path) if word == "." else word for word in command]
    done = glimpse(*command, "--url", "https://glimpse.invalid", all_proxy="socks5://127.0.0.1:1")
    assert "all_proxy" in told(done)


@pytest.mark.parametrize(
    ("host", "local"),
    [
        *((host, True) for host in ("localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "127.1", "::1")),
        ("::ffff:127.0.0.1", True),
        *((host, False) for host in ("10.0.0.1", "128.0.0.1", "::2", "localhost.example.com", "x127.0.0.1")),
    ],
)
def test_this_machine_has_many_names(host, local):
    assert is_loopback(host) is local


@pytest.mark.parametrize(
    "url",
    [
        *(f"http://127.0.0.1:{port}" for port in ("abc", "99999", "0", "-1")),
        *("http://[::1", "127.0.0.1:8080", "ftp://x", "http://", "?", "localhost"),
    ],
)
def test_an_address_that_is_none_is_told(url):
    with pytest.raises(AskFailed, match="http://HOST:PORT") as caught:
        connected(url)
    assert repr(url) in str(caught.value)


def test_an_address_that_is_none_is_one_line():
    assert "'http://127.0.0.1:abc'" in told(glimpse("ask", "-", "a?", "--url", "http://127.0.0.1:abc"))


@pytest.mark.parametrize("name", ["temperature", "top_p", "timeout_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_json_does_not_have_is_named(name, value):
    with pytest.raises(AskFailed, match=f"--{name.replace('_', '-')} is {value}: give a finite number"):
        require_sendable({"top_k": 1, name: value}, ["a?"])


def test_a_number_that_json_does_not_have_is_one_line(talker):
    assert "--temperature is nan" in told(glimpse("ask", "-", "a?", "--temperature", "nan", "--url", address(talker)))


@pytest.mark.parametrize("words", [[b"a\xff?"], [b"a?", "--stop", b"\xc3"]])
def test_words_that_are_not_utf8_are_told(talker, words):
    assert "is not UTF-8 text" in told(glimpse("ask", "-", *words, "--url", address(talker)))


def test_a_closed_input_is_told(talker):
    assert "standard input is closed" in told(glimpse("ask", "-", "a?", "--url", address(talker), shell="<&-"))


@pytest.mark.parametrize("words", [["ask", "-", "a?"], ["verify", "--help"]])
@pytest.mark.parametrize(
    ("shell", "why"), [(">/dev/full", "No space left on device"), (">&-", "standard output is closed")]
)
def test_output_that_takes_nothing_is_told(talker, words, shell, why):
    done = glimpse(*words, shell=shell, GLIMPSE_URL=address(talker))
    assert told(done) == f"glimpse: {why}"


@pytest.mark.parametrize("words", [["ask", "-", "a?"], ["--help"]])
def test_a_reader_that_has_gone_is_told(talker, words):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words],
        env={"GLIMPSE_URL": address(talker)},
        input=b"pixels",
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"glimpse: the program that reads the output has ended\n")


def test_nothing_is_left_to_say_it_to(talker):
    done = glimpse("ask", "-", "a?", "--temperature", "nan", "--url", address(talker), shell="2>/dev/full")
    assert (done.returncode, done.stdout) == (1, "")


def test_control_c_ends_it(talker):
    command = [sys.executable, "-c", CODE, "ask", "-", "wait", "--url", address(talker)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env={}) as asking:
        assert asking.stdin
        asking.stdin.write(b"pixels")
        asking.stdin.close()
        assert Talker.reached.wait(20)
        asking.send_signal(signal.SIGINT)
        assert asking.stderr
        assert asking.stderr.read() == b"glimpse: interrupted\n"
    assert asking.returncode == 130


def test_an_answer_that_the_terminal_cannot_show_is_shown_in_part(talker):
    done = glimpse("ask", "-", "a?", "--url", address(talker), PYTHONIOENCODING="koi8-r")
    assert (done.returncode, done.stdout) == (0, "r\\xe9d\n")


def test_what_nobody_foresaw_is_one_line_and_a_traceback_if_asked_for(tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"no": "row"}\n')
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        words = ["eval", "--scenes", str(tmp_path), "--url", address(server)]
        line = told(glimpse(*words))
        shown = glimpse(*words, GLIMPSE_DEBUG="1")
        server.shutdown()
        thread.join()
    assert "TypeError" in line
    assert "GLIMPSE_DEBUG=1" in line
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1] == line


class Models(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"id": "a model"}]}')

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("where", ["nowhere", "a.png"])
def test_files_that_cannot_be_read_are_named(tmp_path, where):
    (tmp_path / "a.png").write_bytes(b"pixels")
    with ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        line = told(glimpse("eval", "--scenes", str(tmp_path / where), "--url", address(server)))
        server.shutdown()
        thread.join()
    assert str(tmp_path / where) in line


@pytest.mark.parametrize("name", ["img_1234.jpg", "img_" + 32 * "a"])
def test_a_file_may_be_named_like_an_id(talker, tmp_path, name):
    (tmp_path / name).write_bytes(b"pixels")
    done = subprocess.run(
        [sys.executable, "-c", CODE, "ask", name, "a?", "--url", address(talker)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert Talker.asked == ["/v1/images", "/v1/vqa"]


@pytest.mark.parametrize("name", ["img_1234.jpg", "img_" + 31 * "a", "img_" + 32 * "G", "img_"])
def test_what_is_neither_a_file_nor_an_id_is_a_path(name):
    assert not is_id(name)


def test_a_path_that_is_missing_is_told(talker):
    line = told(glimpse("ask", "img_1234.jpg", "a?", "--url", address(talker)))
    assert line == "glimpse: cannot read img_1234.jpg: No such file or directory"


def test_an_id_is_asked_by_its_name(talker):
    assert glimpse("ask", "img_" + 32 * "a", "a?", "--url", address(talker)).returncode == 0
    assert Talker.asked == ["/v1/vqa"]


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "http://127.0.0.1:8080"),
        ({"GLIMPSE_HTTP_PORT": "9000"}, "http://127.0.0.1:9000"),
        ({"GLIMPSE_HTTP_HOST": "0.0.0.0", "GLIMPSE_HTTP_PORT": "9000"}, "http://127.0.0.1:9000"),
        ({"GLIMPSE_HTTP_HOST": "::1"}, "http://[::1]:8080"),
        ({"GLIMPSE_HTTP_HOST": "10.0.0.7", "GLIMPSE_HTTP_PORT": ""}, "http://10.0.0.7:8080"),
    ],
)
def test_the_settings_of_serve_say_where_it_is(monkeypatch, environment, url):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert url_of(None) == url
    assert url_of("http://elsewhere") == "http://elsewhere"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "environment",
    [{"GLIMPSE_URL": "http://127.0.0.1:1", "GLIMPSE_HTTP_PORT": "2"}, {"GLIMPSE_HTTP_PORT": "1"}],
)
def test_every_command_that_asks_follows_the_environment(command, environment, tmp_path):
    (tmp_path / "a.png").write_bytes(b"pixels")
    command = [str(tmp_path) if word == "." else word for word in command]
    done = glimpse(*command, **environment)
    assert "nothing answers at http://127.0.0.1:1:" in told(done)


def test_the_version_is_told():
    done = glimpse("--version")
    assert (done.returncode, done.stdout) == (0, "glimpse 0.1.0\n")


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_needs_no_pytorch(command):
    """Nor anything else that only training and measuring need."""
    absent = ("torch", "transformers", "onnx", "onnxscript", "peft", "safetensors", "litserve")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); {CODE}"
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"],
        env={},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "--help" in done.stdout


def test_an_answer_may_have_what_some_take_for_a_line_break():
    text = "a\u2028b\u0085c\x0bd"
    event = "data: " + json.dumps({"delta": text}, ensure_ascii=False) + "\n\n"
    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, content=iter([event.encode()[:9], event.encode()[9:]]))
    )
    with httpx.Client(transport=transport, base_url="http://a") as client:
        assert list(stream(client, {})) == [text]
