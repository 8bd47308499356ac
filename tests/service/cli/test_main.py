import json
import os
import pty
import re
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import typer
from PIL import Image as Pillow
from typer.main import get_command
from typer.testing import CliRunner

from service.app import build
from service.cache.keys import AS_INT8, FeatureKey
from service.cache.records import pack
from service.cache.redis_tier import record_key
from service.cli.ask import sorted_out
from service.cli.main import app
from service.cli.terminal import require
from service.core.errors import Unavailable
from service.core.request import Budget
from service.core.vision import VisionFeatures
from service.serving import bound
from service.settings import SettingsError, read_settings
from service.triton_server.installation import StartFailed
from tests.support.calibrations import calibrated
from tests.support.documents import BLUE, RED, filled, pdf, tiff
from tests.support.fakes import CARD, CLOSER, png
from tests.support.paths import PROJECT
from tests.support.servers import free_ports

SURE = replace(CLOSER, confidence=calibrated(CLOSER.vision_width))
UNKNOWN = "img_" + 32 * "0"
TWO_PAGES = pdf([filled(RED), filled(BLUE)])
SHEETS = [Pillow.new("RGB", (60, 40), RED), Pillow.new("RGB", (40, 60), BLUE)]


COMMAND = get_command(app)  # to make it takes 0.1 s


def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    with CliRunner().isolation(stdin) as (out, err, _):
        with pytest.raises(SystemExit) as ended:
            COMMAND.main(arguments, prog_name="glimpse")
        sys.stdout.flush()
        sys.stderr.flush()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out.getvalue().decode(), err.getvalue().decode()


def test_ask_prints_the_answer(server, image):
    server.house.language.say(" red or é")
    assert run("ask", image, "what colour?", "--url", server.url) == (0, "red or é\n", "")


def test_several_questions_send_the_image_once_and_see_it_once(server, image):
    status, said, _ = run("ask", image, "what colour?", "which shape?", "--url", server.url)
    assert (status, said) == (0, "what colour? red\nwhich shape? red\n")
    assert server.house.vision.calls == ["see", "attend"]


def test_json_is_a_line_for_each_question(server, image):
    status, said, _ = run("ask", image, "a?", "b?", "--json", "--url", server.url)
    answers = [json.loads(line) for line in said.splitlines()]
    assert status == 0
    assert [answer["answer"] for answer in answers] == ["red", "red"]


@pytest.mark.parametrize("server", [SURE], indirect=True)
def test_confidence_is_printed_behind_the_answer(server, image):
    server.house.language.say("red")
    question = "what colour is the star?"
    code, told, _ = run("ask", image, question, "--confidence", "--url", server.url)
    assert code == 0
    assert re.fullmatch(r"red \(confidence 0\.\d\d, found [01]\.\d\d\)\n", told)
    code, told, _ = run("ask", image, question, "--min-confidence", "1", "--url", server.url)
    assert code == 0
    assert re.fullmatch(r"red \(confidence 0\.\d\d, found [01]\.\d\d: abstained, \w+\)\n", told)


def test_confidence_of_a_model_that_has_none_is_refused(server, image):
    server.house.language.say("red")
    code, _, told = run("ask", image, "what colour?", "--confidence", "--url", server.url)
    assert code == 1
    assert "tiny does not tell how sure it is: leave --confidence out" in told


def test_explain_draws_where_it_looked_and_says_the_answer(server, image, tmp_path):
    target = tmp_path / "looked.png"
    assert run("ask", image, "what colour?", "--explain", str(target), "--url", server.url) == (0, "red\n", "")
    with Pillow.open(target) as picture:
        assert (picture.format, picture.size) == ("PNG", (1920, 732))


def test_explain_with_json_prints_the_numbers_that_are_drawn(server, image, tmp_path):
    target = tmp_path / "looked.png"
    status, said, _ = run("ask", image, "a?", "--json", "--explain", str(target), "--url", server.url)
    answer = json.loads(said)
    assert (status, answer["answer"], len(answer["relevance"][0]["map"])) == (0, "red", 16)
    assert target.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-", "a?", "--explain", "looked.svg"], "looked.svg is not a .png file: write --explain looked.png"),
        (["-", "a?", "b?", "--explain", "looked.png"], "--explain draws one question"),
        ([UNKNOWN, "a?", "--explain", "looked.png"], "name its file, not its id"),
    ],
)
def test_explain_says_what_it_cannot_draw_before_it_asks(server, arguments, told):
    status, _, error = run("ask", *arguments, "--url", server.url)
    assert status == 1
    assert told in error
    assert not server.house.vision.calls


def test_a_picture_that_cannot_be_written_is_told(server, image, tmp_path):
    target = tmp_path / "nowhere" / "looked.png"
    status, _, error = run("ask", image, "a?", "--explain", str(target), "--url", server.url)
    assert (status, error) == (1, f"glimpse: cannot write {target}: No such file or directory\n")


def test_every_option_reaches_the_service(server, image):
    looking = "--detail high --vision-tokens 64 100 --visual-tokens 32 64"
    saying = "--max-tokens 3 --temperature 0.5 --top-k 4 --top-p 0.5 --seed 9 --stop . --stop ! --timeout-s 9"
    status, _, _ = run("ask", image, "a?", "--url", server.url, *looking.split(), *saying.split())
    sampling = server.house.language.sampling[0]
    assert status == 0
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (3, 0.5, 4, 0.5)
    assert (sampling.seed, sampling.stop) == (9, (".", "!"))
    assert server.house.vision.budgets[0] == Budget((64, 100), (32, 64))
    assert server.house.vision.calls[-1] == "attend_448"


def test_a_page_of_a_document_is_asked_about(server, tmp_path):
    document = tmp_path / "two.pdf"
    document.write_bytes(pdf([filled((255, 255, 255)), filled((0, 0, 0))]))
    for page in ("1", "2"):
        status, _, _ = run("ask", str(document), "what colour?", "--page", page, "--url", server.url)
        assert status == 0
    first, second = (prompt.visual_tokens[0, 0] for prompt in server.house.language.prompts)
    assert first > second == 0
    status, _, told = run("ask", str(document), "what colour?", "--page", "3", "--url", server.url)
    assert (status, "page is 3, and the document has 2 pages" in told) == (1, True)


@pytest.mark.parametrize(("name", "data"), [("two.pdf", TWO_PAGES), ("two.tiff", tiff(SHEETS))])
def test_the_page_that_was_asked_about_is_drawn(server, tmp_path, name, data):
    document, drawing = tmp_path / name, tmp_path / "looked.png"
    document.write_bytes(data)
    for page, colour in ((["--page", "2"], BLUE), ([], RED)):
        options = (*page, "--explain", str(drawing), "--url", server.url)
        assert run("ask", str(document), "what colour?", *options) == (0, "red\n", "")
        with Pillow.open(drawing) as picture:
            assert picture.convert("RGB").getpixel((500, 600)) == colour  # low in the first panel
        drawing.unlink()


def test_a_pdf_is_not_drawn_without_its_reader(server, tmp_path, monkeypatch):
    document = tmp_path / "two.pdf"
    document.write_bytes(TWO_PAGES)
    monkeypatch.setattr("service.cli.ask.HAS_PDFIUM", False)
    asked = ("ask", str(document), "what colour?", "--url", server.url)
    status, _, told = run(*asked, "--page", "2", "--explain", str(tmp_path / "x.png"))
    assert status == 1
    assert "needs pypdfium2, which is not installed here: run .venv/bin/pip install -c constraints.txt" in told
    assert not server.house.vision.calls
    assert run(*asked) == (0, "red\n", "")


def test_a_page_is_fitted_as_the_option_says(server, tmp_path):
    page = tmp_path / "page.png"
    page.write_bytes(png(size=(100, 300)))
    for fit, area in [("squash", [0, 0, 1, 1]), ("pad", [-1, 0, 2, 1])]:
        drawing = tmp_path / f"{fit}.png"
        options = ("--json", "--fit", fit, "--explain", str(drawing))
        status, said, _ = run("ask", str(page), "a?", *options, "--url", server.url)
        told = json.loads(said)
        assert (status, told["vision"]["fit"], told["relevance"][0]["area"]) == (0, fit, area)
        assert drawing.stat().st_size > 0


def test_an_image_may_come_from_standard_input_or_be_an_id(server):
    _, said, _ = run("ask", "-", "a?", "--json", "--url", server.url, stdin=png())
    image_id = json.loads(said)["image_ids"][0]
    assert run("ask", image_id, "a?", "--url", server.url)[:2] == (0, "red\n")


def test_a_file_that_is_not_there_is_named(server):
    status, _, error = run("ask", "nowhere.png", "a?", "--url", server.url)
    assert (status, error) == (1, "glimpse: cannot read nowhere.png: No such file or directory\n")


def test_what_the_service_refuses_is_told_in_its_words(server, tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("no image")
    status, _, error = run("ask", str(path), "a?", "--url", server.url)
    assert status == 1
    assert "send PNG, JPEG, WebP, GIF, AVIF, TIFF or BMP" in error


def test_an_error_half_way_is_told(server, image):
    server.house.language.say(" red red")
    server.house.language.wait_at = 1
    server.house.language.fault = Unavailable("triton is gone")
    status, said, error = run("ask", image, "a?", "--url", server.url)
    assert (status, said, error) == (1, "red", "glimpse: triton is gone\n")


def test_a_question_refused_before_the_first_token_is_told(server, image):
    status, _, error = run("ask", image, " ", "--url", server.url)
    assert status == 1
    assert "say what you want to know" in error


@pytest.mark.parametrize("command", [["ask", "-", "a?"], ["eval"]])
def test_without_a_server_it_says_how_to_start_one(command):
    (port,) = free_ports(1)
    status, _, error = run(*command, "--url", f"http://127.0.0.1:{port}")
    assert status == 1
    assert f"nothing answers at http://127.0.0.1:{port}: start the service with `glimpse serve`" in error


@pytest.mark.parametrize("command", [["ask", "-", "a?"], ["ask", UNKNOWN, "a?"], ["eval"]])
def test_another_service_that_is_content_is_told_in_a_line(command):
    class Page(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<!doctype html>\nWelcome")

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as pages:
        thread = threading.Thread(target=pages.serve_forever)
        thread.start()
        status, _, error = run(*command, "--url", f"http://127.0.0.1:{pages.server_port}")
        pages.shutdown()
        thread.join()
    assert status == 1
    assert "check that --url names a Glimpse service" in error.splitlines()[-1]


def test_a_port_that_two_bind_at_once_is_told_to_the_second():
    (port,) = free_ports(1)
    where = ("127.0.0.1", port, "GLIMPSE_GRPC_PORT")
    with bound(*where), pytest.raises(StartFailed, match=rf"cannot listen on 127\.0\.0\.1:{port} .*GLIMPSE_GRPC_PORT"):
        bound(*where)


@pytest.mark.parametrize("host", ["203.0.113.7", "2001:db8::7", "192.0.2.1"])
def test_a_host_that_is_another_machine_is_told(host):
    with pytest.raises(StartFailed, match=f"GLIMPSE_HTTP_HOST {host} is not an address of this machine"):
        bound(host, 0, "GLIMPSE_HTTP_PORT")


def test_warm_has_every_image_encoded_once(server, tmp_path):
    (tmp_path / "below").mkdir()
    for number, name in enumerate(["a.png", "below/b.PNG", "below/c.png"]):
        (tmp_path / name).write_bytes(png((number, 0, 0)))
    (tmp_path / "notes.txt").write_text("no image")
    status, said, _ = run("cache", "warm", str(tmp_path), "--url", server.url)
    assert status == 0
    assert said.startswith("3 images in ")
    assert said.endswith("3 encoded, 0 known already, 0 refused\n")
    assert run("cache", "warm", str(tmp_path), "--url", server.url)[1].endswith(
        "0 encoded, 3 known already, 0 refused\n"
    )


def test_warm_tells_what_it_could_not_send(server, tmp_path):
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(b"no image")
    status, said, error = run("cache", "warm", str(tmp_path), "--url", server.url)
    assert status == 1
    assert said.endswith("1 encoded, 0 known already, 1 refused\n")
    assert error.startswith(f"{tmp_path / 'bad.png'}: ")
    assert run("cache", "warm", str(tmp_path / "good.png"), "--url", server.url)[0] == 1


def test_stats_and_purge_by_encoder(redis_server):
    client = redis_server.client
    vision = VisionFeatures(*(np.zeros(shape, np.float32) for shape in CARD.feature_shapes[224].values()))
    for number in range(1200):
        key = FeatureKey("old" if number % 3 else "new", 224, str(number))
        client.set(record_key(key), pack(key, vision))
    rounded = FeatureKey("old" + AS_INT8, 224, "0")
    client.set(record_key(rounded), pack(rounded, vision))
    client.set("somebody:else", "kept")
    client.config_set("maxmemory", 10**9)
    status, said, _ = run("cache", "stats", "--redis-url", redis_server.url)
    first, *models = said.splitlines()
    nbytes = len(pack(FeatureKey("old", 224, "100"), vision))
    assert status == 0
    assert "MB of 1000.0 MB, noeviction; 0 keys evicted" in first
    assert models == [
        f"new: 400 views of images, {400 * nbytes / 1e6:.1f} MB",
        f"old: 800 views of images, {800 * nbytes / 1e6:.1f} MB",
        "old.int8: 1 views of images, 0.0 MB",
    ]
    purge = ["cache", "purge", "--redis-url", redis_server.url]
    assert run(*purge, "--fingerprint", "old")[:2] == (0, "801 views of images deleted\n")
    assert run(*purge)[:2] == (0, "400 views of images deleted\n")
    assert run("cache", "stats", "--redis-url", redis_server.url)[1].endswith("no vision features\n")
    assert client.keys() == [b"somebody:else"]


@pytest.mark.parametrize("command", ["stats", "purge"])
def test_a_redis_that_is_not_there_or_no_redis_is_told_in_a_line(command):
    (port,) = free_ports(1)
    status, _, error = run("cache", command, "--redis-url", f"redis://:secret@127.0.0.1:{port}")
    assert status == 1
    assert f"Redis: Error 111 connecting to 127.0.0.1:{port}" in error
    assert "secret" not in error
    status, _, error = run("cache", command, "--redis-url", "http://127.0.0.1")
    assert (status, error.startswith("glimpse: --redis-url: ")) == (1, True)


@pytest.mark.parametrize(
    "command", [("serve",), ("ask",), ("eval",), ("cache", "stats"), ("cache", "purge"), ("cache", "warm")]
)
def test_help_has_an_example(command):
    status, said, _ = run(*command, "--help")
    assert status == 0
    assert f"glimpse {' '.join(command)}" in said.split("Usage:")[1].split("\n", 1)[1]


def test_the_command_needs_nothing_but_httpx_and_typer_to_be_read():
    heavy = ("numpy", "fastapi", "torch", "tritonclient", "pydantic", "PIL", "matplotlib", "redis")
    code = f"import service.cli.main, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def glimpse(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from service.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.slow
def test_serve_refuses_wrong_settings_with_status_2():
    """Before everything that only a service needs is imported, which takes seconds."""
    done = glimpse("serve", GLIMPSE_HTTP_PROT="1", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 2
    assert "did you mean GLIMPSE_HTTP_PORT" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "service.settings" in imported
    assert imported.isdisjoint({"service.serving", "service.pipeline", "fastapi", "grpc"})


@pytest.mark.slow
def test_serve_tells_that_its_port_is_taken(server, repository):
    port = server.url.rpartition(":")[2]
    done = glimpse("serve", "--port", port, GLIMPSE_MODEL_REPOSITORY=str(repository))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "set GLIMPSE_HTTP_PORT" in done.stderr


def refusal(**environment: str) -> str:
    """What a service with these settings would tell, with status 2, before it starts anything."""
    with pytest.raises(SettingsError) as refused:
        build(read_settings(environment))
    return str(refused.value)


@pytest.mark.slow
def test_serve_tells_where_a_model_repository_is_missing(tmp_path):
    done = glimpse("serve", GLIMPSE_MODEL_REPOSITORY=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"glimpse: {refusal(GLIMPSE_MODEL_REPOSITORY=str(tmp_path))}\n"
    assert "GLIMPSE_MODEL_REPOSITORY" in done.stderr


def test_serve_refuses_to_listen_to_others_without_keys(repository, tmp_path):
    told = {"GLIMPSE_MODEL_REPOSITORY": str(repository), "GLIMPSE_HTTP_HOST": "0.0.0.0"}
    why = refusal(**told)
    assert "`glimpse keys create`" in why
    assert "GLIMPSE_WITHOUT_KEYS=anyone-may-ask" in why
    why = refusal(**told, GLIMPSE_KEYS=str(tmp_path / "none.json"))
    assert f"GLIMPSE_KEYS: {tmp_path / 'none.json'} cannot be read" in why


def test_a_library_that_is_not_there_is_told_with_the_command_that_installs_it(capsys):
    with pytest.raises(typer.Exit):
        require("no_such_library", "build")
    told = capsys.readouterr().err
    assert "needs no_such_library" in told
    assert f"python3 {PROJECT / 'scripts' / 'set_up.py'} build" in told


@pytest.mark.slow
def test_train_passes_its_arguments_on():
    done = glimpse("train", "--help")
    assert done.returncode == 0
    assert "--resume" in done.stdout


@pytest.mark.slow
def test_ablate_passes_its_arguments_on():
    done = glimpse("ablate", "--help")
    assert done.returncode == 0
    assert "--small-print" in done.stdout


@pytest.mark.slow
def test_build_passes_its_arguments_on():
    done = glimpse("build", "--help")
    assert done.returncode == 0
    assert "--dry-run" in done.stdout


@pytest.mark.slow
def test_bench_passes_its_arguments_on():
    done = glimpse("bench", "--help")
    assert done.returncode == 0
    assert "--scenario" in done.stdout


def test_several_images_are_asked_one_question(server, image, tmp_path):
    other = tmp_path / "other.png"
    other.write_bytes(png((1, 2, 3)))
    status, said, _ = run("ask", image, str(other), "what colour?", "--url", server.url)
    assert (status, said) == (0, f"{image}: red\n{other}: red\n")
    status, said, _ = run("ask", str(tmp_path / "*.png"), "what colour?", "which shape?", "--url", server.url)
    both = [f"{name}: {asked} red" for name in (image, other) for asked in ("what colour?", "which shape?")]
    assert said.splitlines() == both
    status, said, _ = run("ask", str(tmp_path / "*.png"), "a?", "--json", "--url", server.url)
    assert [json.loads(line)["file"] for line in said.splitlines()] == [image, str(other)]


def test_an_image_that_fails_is_told_and_the_others_are_answered(server, image, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    status, said, told = run("ask", str(bad), image, str(tmp_path / "none.png"), "a?", "--url", server.url)
    assert (status, said) == (1, f"{image}: red\n")
    assert told.startswith(f"glimpse: {bad}: ")
    assert f"glimpse: {tmp_path}/none.png: cannot read" in told


@pytest.mark.parametrize(
    ("words", "images", "questions"),
    [
        (["a.png", "b?"], ["a.png"], ["b?"]),
        (["a.png", "b?", "c?"], ["a.png"], ["b?", "c?"]),
        (["a.png", "b.JPG", "c?"], ["a.png", "b.JPG"], ["c?"]),
        (["a.png", "b.jpg"], ["a.png"], ["b.jpg"]),
        (["-", UNKNOWN, "c?", "is it a.png"], ["-", UNKNOWN], ["c?", "is it a.png"]),
        (["a.png", "x" * 5_000, "what about a\0b?"], ["a.png"], ["x" * 5_000, "what about a\0b?"]),
    ],
)
def test_words_are_images_and_then_questions(words, images, questions):
    assert sorted_out(words) == (images, questions)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name an image and a question"),
        (["a.png"], "name an image and a question"),
        (["nowhere/*.png", "?"], "no file matches nowhere/*.png"),
        (["-", "-", "?"], "name - once"),
        (["a.png", "b.png", "?", "--explain", "x.png"], "--explain draws over one image, not 2"),
    ],
)
def test_words_that_cannot_be_asked_are_told(words, told):
    status, _, error = run("ask", *words)
    assert (status, told in error) == (1, True)


def test_a_pipe_gets_no_colours(server, image):
    done = glimpse("ask", image, "what colour?", "--url", server.url, TERM="xterm-256color")
    assert (done.returncode, done.stdout, done.stderr) == (0, "red\n", "")
    done = glimpse("ask", "--nothing", TERM="xterm-256color")
    assert (done.returncode, "\x1b" in done.stderr) == (2, False)


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1", "TERM": "xterm-256color"}, {"TERM": "dumb"}])
def test_a_terminal_gets_none_either_if_it_wants_none(environment):
    try:
        ours, theirs = pty.openpty()
    except OSError as exc:
        pytest.skip(f"no terminal can be opened, as in a chroot without /dev/pts: {exc}")
    command = [sys.executable, "-c", "from service.cli.main import main; main()", "ask", "--help"]
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as shown:
        os.close(theirs)
        said = b""
        with suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 65_536):
                said += piece
    os.close(ours)
    assert (shown.returncode, b"--batch" in said, b"\x1b" in said) == (0, True, False)


def test_bash_completes_commands_and_options():
    script = glimpse("completion", "bash").stdout
    ask = f'glimpse() {{ {sys.executable} -c "from service.cli.main import main; main()" "$@"; }}; export -f glimpse'
    words = 'COMP_WORDS=(glimpse {}); COMP_CWORD={}; _glimpse_completion glimpse; echo "${{COMPREPLY[@]}}"'
    for typed, place, found in (("ev", 1, "eval"), ("ask --ba", 2, "--batch"), ("cache wa", 2, "warm")):
        command = "\n".join([ask, script, words.format(typed, place)])
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.split() == [found], done.stderr


@pytest.mark.parametrize(("shell", "sign"), [("zsh", "#compdef glimpse"), ("fish", "complete --command glimpse")])
def test_other_shells_have_scripts_too(shell, sign):
    done = glimpse("completion", shell)
    assert (done.returncode, sign in done.stdout) == (0, True)
    asked = {"_GLIMPSE_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "glimpse ev"}
    asked |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"} if shell == "fish" else {}
    assert "eval" in glimpse(**asked).stdout
