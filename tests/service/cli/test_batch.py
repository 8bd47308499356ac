"""`glimpse ask --batch`: every question is answered once, however often the command is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import typer

from service.cli.answers_file import AnswersFile
from service.cli.batch import ask_batch, how_far
from service.cli.client import AskFailed
from service.cli.pace import Pace, Stopped
from service.core.errors import Unavailable
from service.settings import IMAGE_ENTRY_BYTES
from tests.service.cli.conftest import serving
from tests.service.cli.test_main import UNKNOWN, run
from tests.support import films
from tests.support.fakes import House, png
from tests.support.paths import SCENES
from tests.support.servers import Gateway, eventually

ONE_MOMENT_S = 0.05


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines_of(*questions: object) -> str:
    return "".join(json.dumps(each) + "\n" for each in questions)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six questions about two images that lie beside them."""
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.png").write_bytes(png((number, 0, 0)))
    path = tmp_path / "questions.jsonl"
    path.write_text(
        lines_of(*[{"image": f"{name}.png", "question": f"{number}?"} for number in range(3) for name in "ab"])
    )
    return path


def batch(source: Path, out: Path, url: str, *more: str) -> tuple[int, str, str]:
    return run("ask", "--batch", str(source), "--out", str(out), "--url", url, *more)


def test_every_question_is_answered_and_every_image_is_sent_and_seen_once(server, source, tmp_path):
    out = tmp_path / "answers.jsonl"
    status, said, told = batch(source, out, server.url)
    assert (status, said, told) == (0, "", "6 of 6 answered\n")
    answers = written(out)
    assert sorted(each["line"] for each in answers) == [1, 2, 3, 4, 5, 6]
    assert {(each["answer"], each["image"][1:]) for each in answers} == {("red", ".png")}
    assert Counter(server.house.vision.calls) == {"see": 2, "attend": 4}
    sent = server.house.counted("glimpse_http_requests_total", method="POST", route="/v1/images", status="200")
    assert sent == 2


def test_answers_that_are_there_are_not_asked_again(server, source, tmp_path):
    out = tmp_path / "answers.jsonl"
    batch(source, out, server.url)
    whole = out.read_text()
    lines = whole.splitlines(keepends=True)
    torn = "".join(lines[:4]) + lines[4][:20]
    out.write_text(torn)
    asked = len(server.house.language.request_ids)
    status, _, told = batch(source, out, server.url)
    assert (status, told) == (0, "6 of 6 answered, 4 of them before\n")
    assert len(server.house.language.request_ids) - asked == 2
    assert out.read_text().startswith("".join(lines[:4]))
    assert sorted(each["line"] for each in written(out)) == [1, 2, 3, 4, 5, 6]
    assert batch(source, out, "http://127.0.0.1:9")[0] == 0  # nothing is left to ask, so nobody need be there


def test_questions_may_be_added_but_not_changed(server, source, tmp_path):
    out = tmp_path / "answers.jsonl"
    batch(source, out, server.url)
    source.write_text(source.read_text() + lines_of({"image": "a.png", "question": "more?"}))
    assert batch(source, out, server.url)[2] == "7 of 7 answered, 6 of them before\n"
    status, _, told = batch(source, out, server.url, "--max-tokens", "3")
    assert (status, "answer to another question or with other options for line 1" in told) == (1, True)
    source.write_text("".join(source.read_text().splitlines(keepends=True)[:3]))
    status, _, told = batch(source, out, server.url)
    assert (status, "an answer for line 4, which is not a question" in told) == (1, True)


def test_failures_are_told_by_reason_and_asked_again(server, source, tmp_path):
    out = tmp_path / "answers.jsonl"
    with source.open("a") as questions:
        questions.write(lines_of({"image": "c.png", "question": "?"}, {"image": UNKNOWN, "question": "?"}))
        questions.write("no JSON\n[]\n\n" + lines_of({"image": "a.png", "question": "?", "colour": 1}))
        questions.write(
            lines_of({"image": "a.png", "question": "?", "stream": True}, {"image": "c.png", "question": "!"})
        )
    status, _, told = batch(source, out, server.url)
    first, second, *reasons = told.splitlines()
    assert (status, first) == (1, "6 of 13 answered")
    assert second == "7 failed; the same command asks them again:"
    assert reasons[0] == f"  lines 7, 14: cannot read {tmp_path}/c.png: No such file or directory"
    assert [reason.partition(":")[0] for reason in reasons] == [
        *("  lines 7, 14", "  line 8", "  line 9", "  line 10", "  line 12", "  line 13")
    ]
    assert len(written(out)) == 6
    (tmp_path / "c.png").write_bytes(png((9, 9, 9)))
    assert batch(source, out, server.url)[2].startswith("8 of 13 answered, 6 of them before\n5 failed")


def test_images_are_sent_again_if_their_ids_are_forgotten(source, tmp_path):
    with serving(House(max_image_bytes=1_000, image_store_bytes=1_000 + IMAGE_ENTRY_BYTES)) as server:  # room for one
        assert batch(source, tmp_path / "out", server.url, "--clients", "1")[0] == 0
        assert server.house.vision.calls.count("see") == 2
        sent = server.house.counted("glimpse_http_requests_total", method="POST", route="/v1/images", status="200")
        assert sent == 6


def test_options_are_defaults_of_every_question(server, source, tmp_path):
    source.write_text(
        lines_of({"image": "a.png", "question": "?"}, {"image": "a.png", "question": "?", "max_tokens": 7})
    )
    assert batch(source, tmp_path / "out", server.url, "--max-tokens", "3", "--clients", "1")[0] == 0
    assert [sampling.max_tokens for sampling in server.house.language.sampling] == [3, 7]


def test_options_about_images_are_left_out_of_lines_about_a_video_alone(server, source, tmp_path):
    (tmp_path / "film.gif").write_bytes(films.gif())
    alone = {"video": "film.gif", "question": "?", "video_frames": 2}
    source.write_text(lines_of(alone, alone | {"image": "a.png"}))
    out = tmp_path / "out"
    assert batch(source, out, server.url, "--detail", "high", "--fit", "pad")[2] == "2 of 2 answered\n"
    details = {each["line"]: each["vision"]["detail"] for each in written(out)}
    assert details == {1: "low", 2: "high"}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("NaN", "no valid JSON (NaN is no finite number)"),
        ("-Infinity", "no valid JSON (-Infinity is no finite number)"),
        ("1e999", "no valid JSON (1e999 is no finite number)"),
        ("[" * 100_000, "no valid JSON (maximum recursion depth exceeded"),
        ("1" * 5_000, "no valid JSON (Exceeds the limit"),
    ],
)
def test_a_line_that_no_program_can_send_fails_alone(server, source, tmp_path, value, told):
    with source.open("a") as questions:
        questions.write(f'{{"image": "a.png", "question": "?", "temperature": {value}}}\n')
    status, _, said = batch(source, tmp_path / "out", server.url)
    assert (status, said.splitlines()[0]) == (1, "6 of 7 answered")
    assert said.splitlines()[2].startswith(f"  line 7: {told}")


def test_several_images_and_ids_stand_in_a_question(server, source, tmp_path):
    known = httpx.post(f"{server.url}/v1/images", content=png()).json()["id"]
    source.write_text(
        lines_of({"images": ["a.png", known, "b.png"], "question": "?"}, {"image": known, "question": "?"})
    )
    assert batch(source, tmp_path / "out", server.url)[0] == 0
    assert [len(each["image_ids"]) for each in sorted(written(tmp_path / "out"), key=lambda each: each["line"])] == [
        3,
        1,
    ]


def test_questions_may_come_from_standard_input(server, source, tmp_path):
    text = lines_of({"image": str(tmp_path / "a.png"), "question": "?"}).encode()
    told = run("ask", "--batch", "-", "--out", str(tmp_path / "out"), "--url", server.url, stdin=text)
    assert (told[0], told[2]) == (0, "1 of 1 answered\n")


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "q"], ["--out", "o"], ["a.png", "?", "--batch", "q", "--out", "o"], ["--batch", "q", "--json"]],
)
def test_what_does_not_go_together_is_told(arguments):
    status, _, told = run("ask", *arguments)
    assert (status, told) == (
        1,
        "glimpse: --batch needs --out, and takes no images, questions, --json, --explain or --as-frames beside it\n",
    )


def test_a_service_that_is_not_there_is_told_at_once(source, tmp_path):
    status, _, told = batch(source, tmp_path / "out", "http://127.0.0.1:9")
    assert status == 1
    assert "nothing answers at http://127.0.0.1:9" in told


def test_a_model_that_is_gone_is_a_failure_of_its_question(server, source, tmp_path):
    server.house.language.fault = Unavailable("triton is gone")
    source.write_text(lines_of({"image": "a.png", "question": "?"}))
    threading.Timer(ONE_MOMENT_S, lambda: setattr(server.house.language, "fault", None)).start()
    status, _, told = batch(source, tmp_path / "out", server.url)  # 503 is tried again
    assert (status, told) == (0, "1 of 1 answered\n")


class Answers(BaseHTTPRequestHandler):
    """A service that has no room for some of its requests."""

    refusals = 3
    asked: ClassVar[list[float]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.asked.append(time.monotonic())
        full = len(self.asked) <= self.refusals
        body = b'{"error": {"message": "full"}}' if full else b'{"id": "img_1", "answer": "yes"}'
        self.send_response(429 if full else 200)
        self.send_header("content-length", str(len(body)))
        self.send_header("retry-after", "0.3")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


def test_it_waits_as_long_as_a_refusal_says(tmp_path):
    class Served(Answers):
        asked: ClassVar[list[float]] = []

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

    source = tmp_path / "q"
    source.write_text(lines_of({"image": UNKNOWN, "question": "?"}))
    with ThreadingHTTPServer(("127.0.0.1", 0), Served) as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        status, _, told = batch(source, tmp_path / "out", f"http://127.0.0.1:{service.server_port}")
        service.shutdown()
        thread.join()
    assert (status, told) == (0, "1 of 1 answered\n")
    gaps = [later - earlier for earlier, later in zip(Served.asked, Served.asked[1:], strict=False)]
    assert len(gaps) == 3
    assert min(gaps) >= 0.3


def test_the_pace_narrows_with_refusals_and_widens_with_answers():
    pace = Pace(8)
    pace.refused(0.0)
    assert pace.width == 4
    pace.refused(0.2)
    pace.refused(0.2)  # of the same moment: counts once
    assert pace.width == 2
    started = time.monotonic()
    with pace.turn():
        assert time.monotonic() - started >= 0.19
    for _ in range(100):
        pace.answered()
    assert pace.width == 8
    pace.stop()
    with pytest.raises(Stopped), pace.turn():
        pass


def test_no_more_than_the_width_have_a_turn():
    pace, inside, most = Pace(3), [], []
    barrier = threading.Barrier(3)

    def work() -> None:
        with pace.turn():
            inside.append(1)
            most.append(len(inside))
            barrier.wait(10)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(most), max(most)) == (9, 3)


def test_a_log_is_told_how_long_the_rest_takes():
    assert how_far(100, 400, 60.0) == "100 of 400 asked, about 3 min left"
    assert how_far(0, 400, 60.0) == "0 of 400 asked, no pace yet"


def test_one_program_writes_to_a_file(tmp_path):
    second = AnswersFile.opened(tmp_path / "out")
    with AnswersFile.opened(tmp_path / "out"), pytest.raises(AskFailed, match="another program writes"):
        second.__enter__()


@pytest.mark.parametrize(
    ("content", "left"),
    [
        (b"", b""),
        (b'{"line": 1', b""),
        (b'{"line": 1, "asked": "x"}\n{"line"', b'{"line": 1, "asked": "x"}\n'),
        (b'{"line": 1, "asked": "x"}\n\0\0\0\0\n', b'{"line": 1, "asked": "x"}\n'),
    ],
)
def test_a_torn_last_line_is_cut_off(tmp_path, content, left):
    path = tmp_path / "out"
    path.write_bytes(content)
    with AnswersFile.opened(path) as answers:
        assert answers.answered == ({1: "x"} if left else {})
        answers.append([{"line": 2, "asked": "ÿ"}])
    assert path.read_bytes() == left + '{"line": 2, "asked": "ÿ"}\n'.encode()


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"notes\nmore\n")
    with pytest.raises(AskFailed, match=r"line 1 of .* is none of a batch's answers"), AnswersFile.opened(path):
        pass
    assert path.read_bytes() == b"notes\nmore\n"


def test_ctrl_c_waits_for_what_was_asked_and_a_second_run_goes_on(server, source, tmp_path):
    out = tmp_path / "answers.jsonl"
    server.house.language.gate.clear()

    def interrupt() -> None:
        eventually(lambda: server.house.language.open == 2, 20, "two questions in work")
        os.kill(os.getpid(), signal.SIGINT)
        server.loop.call_soon_threadsafe(server.house.language.gate.set)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with httpx.Client(base_url=server.url) as client, pytest.raises(typer.Exit) as ended:
        ask_batch(client, str(source), out, {}, clients=2)
    thread.join()
    assert ended.value.exit_code == 130
    assert 2 <= len(written(out)) < 6
    assert batch(source, out, server.url)[0] == 0
    assert len({each["line"] for each in written(out)}) == len(written(out)) == 6
    assert len(server.house.language.request_ids) == 6  # none was asked twice


COMMAND = [sys.executable, "-c", "from service.cli.main import main; main()", "ask"]


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def encoded(gateway: Gateway) -> float:
    """Encodes that the service sent."""
    text = httpx.get(f"{gateway.url}/metrics", trust_env=False).text
    name = "glimpse_feature_cache_encodes_total "
    return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)


def long_batch(folder: Path, images: int, each: int) -> Path:
    """Questions about committed scenes, which have bytes of this batch's own behind them."""
    scenes = sorted(SCENES.glob("new_*.webp"))[:images]
    for scene in scenes:
        (folder / scene.name).write_bytes(scene.read_bytes() + folder.name.encode())
    source = folder / "questions.jsonl"
    asked = [
        {"image": scene.name, "question": f"how many objects are there? {number}"}
        for scene in scenes
        for number in range(each)
    ]
    source.write_text(lines_of(*asked))
    return source


def killed(after: int, out: Path, *arguments: str, number: int) -> None:
    """Run the command until it has written so many answers, then end it."""
    with running(*arguments) as process:
        eventually(lambda: out.exists() and out.read_bytes().count(b"\n") >= after, 120, f"{after} answers")
        process.send_signal(number)
        process.wait(60)


@pytest.mark.slow
def test_a_batch_that_is_killed_and_stopped_answers_each_question_once(gateway: Gateway, tmp_path: Path) -> None:
    """TEST_BATCH=50x10 runs it with 500 questions about 50 images."""
    images, each = map(int, os.environ.get("TEST_BATCH", "6x6").split("x"))
    source, out, before = long_batch(tmp_path, images, each), tmp_path / "answers.jsonl", encoded(gateway)
    count = images * each
    arguments = ["--batch", str(source), "--out", str(out), "--url", gateway.url]
    killed(count // 6, out, *arguments, number=signal.SIGKILL)
    killed(count // 3, out, *arguments, number=signal.SIGKILL)
    killed(count // 2, out, *arguments, number=signal.SIGINT)
    assert out.read_bytes().count(b"\n") < count
    with running(*arguments) as process:
        _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert Counter(answer["line"] for answer in written(out)) == dict.fromkeys(range(1, count + 1), 1)
    # An encode that a stop leaves behind goes on, so no image is encoded twice.
    assert encoded(gateway) - before == images
