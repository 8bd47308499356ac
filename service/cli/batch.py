"""Ask the questions of a file, and write the answers into another: `glimpse ask --batch`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import typer

from service.cli.answers_file import AnswersFile
from service.cli.client import IMAGE_ID, AskFailed, ImageRefused, message_of, read_image, successful
from service.cli.pace import Pace, Stopped
from service.cli.terminal import INTERRUPTED

ONE_FILE, SEVERAL_FILES = ("image", "video"), ("images", "frames")  # fields of a question that name files
REFUSED = (429, 503)
BAD_IMAGE = (400, 413, 415)
RETRY_AFTER_S = 1.0  # if a refusal does not say
PATIENCE_S = 300.0  # with refusals of one request in a row
OUTAGE_S = 60.0  # without any connection; then the batch ends
SENDINGS = 3  # of one image whose id is no longer known
TOLD_EVERY_S = 60.0  # without a terminal: how far it is
MOST_LINES_SHOWN = 10  # of the questions that failed for one reason


@dataclass(frozen=True, slots=True)
class Question:
    """One line of the file."""

    line: int  # from 1
    text: bytes
    options: Mapping[str, Any]  # of the command: defaults of every question
    about: bytes = b""  # what else the answer depends on, such as the image's bytes

    def fields(self) -> dict[str, Any]:
        """Raises AskFailed."""
        try:
            fields = json.loads(self.text, parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as exc:
            raise AskFailed(f"no valid JSON ({exc})") from exc
        if not isinstance(fields, dict):
            raise AskFailed('no JSON object such as {"image": "x.jpg", "question": "how many?"}')
        if fields.get("stream"):
            raise AskFailed("a batch sends no streams: leave stream out")
        return {**applicable(self.options, fields), **fields}

    @property
    def digest(self) -> str:
        """Of what is asked, so that answers of other questions are never taken for these."""
        try:
            asked = json.dumps(self.fields(), sort_keys=True).encode()
        except (AskFailed, RecursionError):
            asked = self.text
        return hashlib.blake2b(asked + self.about, digest_size=8).hexdigest()


def _finite(text: str) -> float:
    """Read a number. Raises ValueError for NaN, Infinity and what is beyond all floats: JSON has none of them."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def applicable(options: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the options that a line cannot have.

    Those of videos need one. --page is about the one image, and --detail and --fit are about images.
    """
    has_video = any(fields.get(name) is not None for name in ("video", "frames"))
    not_of_this = set[str]() if has_video else {"video_frames", "video_sampling"}
    if has_video or fields.get("image") is None:
        not_of_this.add("page")
    if has_video and not any(fields.get(name) for name in ("image", "images")):
        not_of_this |= {"detail", "fit"}
    return {name: value for name, value in options.items() if name not in not_of_this}


class Service:
    """Send requests to the service at its pace."""

    def __init__(self, client: httpx.Client, pace: Pace) -> None:
        self.client = client
        self.pace = pace

    def post(self, path: str, **content: Any) -> httpx.Response:
        """Send a request again while the service has no room or is gone for a moment. Raises AskFailed, Stopped."""
        started = time.monotonic()
        while True:
            try:
                with self.pace.turn():
                    response = self.client.post(path, **content)
            except (
                httpx.ConnectError,
                httpx.ConnectTimeout,
                httpx.ReadError,
                httpx.WriteError,
                httpx.RemoteProtocolError,
            ):
                if time.monotonic() - started > OUTAGE_S:
                    raise
                self.pace.refused(RETRY_AFTER_S)
                continue
            except httpx.TimeoutException as exc:
                raise AskFailed("the service did not answer in time") from exc
            if response.status_code not in REFUSED:
                self.pace.answered()
                return response
            if time.monotonic() - started > PATIENCE_S:
                return response
            self.pace.refused(retry_after_s(response))


def retry_after_s(response: httpx.Response) -> float:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return RETRY_AFTER_S


@dataclass(slots=True)
class _Sent:
    """One image file: its id once it was sent, or why it cannot be, and the lock of the thread that sends it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    id: str | None = None
    refused: ImageRefused | None = None


class Images:
    """Send each file once, and know its id from then on."""

    def __init__(self, service: Service, folder: Path) -> None:
        self.service = service
        self.folder = folder
        self._sent: defaultdict[Path, _Sent] = defaultdict(_Sent)
        self._adding = threading.Lock()

    def named(self, image: object) -> object:
        """Return the id of a file, or what is no file's name as it is. Raises AskFailed, Stopped."""
        path = self.path_of(image)
        if path is None:
            return image
        with self._adding:
            sent = self._sent[path]
        with sent.lock:
            if sent.refused is not None:
                raise sent.refused
            if sent.id is None:
                data = read_image(str(path))
                response = self.service.post("/v1/images", content=data)
                if response.status_code in BAD_IMAGE:
                    sent.refused = ImageRefused(message_of(response))
                    raise sent.refused
                sent.id = str(successful(response).json()["id"])
            return sent.id

    def forget(self, image: object, image_id: object) -> None:
        """The service does not know this id any more."""
        path = self.path_of(image)
        if path is not None:
            sent = self._sent[path]
            with sent.lock:
                if sent.id == image_id:
                    sent.id = None

    def path_of(self, image: object) -> Path | None:
        """A file's name is relative to the folder of the questions."""
        if not isinstance(image, str) or image.startswith(("data:", "http://", "https://")):
            return None
        path = self.folder / image
        return None if IMAGE_ID.fullmatch(image) and not path.exists() else path


class Asking:
    """Ask one question after the other, in each of several threads."""

    def __init__(self, service: Service, images: Images) -> None:
        self.service = service
        self.images = images

    def answer(self, question: Question) -> dict[str, Any]:
        """Return the line for the answers. Raises AskFailed, Stopped."""
        fields = question.fields()
        for _ in range(SENDINGS):
            body = fields | self.with_ids(fields)
            try:
                response = self.service.post("/v1/vqa", json=body)
            except UnicodeEncodeError as exc:
                raise AskFailed(
                    f"the text has half of a surrogate pair ({exc.object[exc.start]!a}): remove it"
                ) from exc
            except RecursionError as exc:
                raise AskFailed("its fields are nested too deeply: flatten them") from exc
            if response.status_code != 404:
                break
            self.forget(fields, body)
        said: dict[str, Any] = successful(response).json()
        asked = {"line": question.line, "asked": question.digest}
        named = (*ONE_FILE, *SEVERAL_FILES, "question")
        return asked | {name: fields[name] for name in named if name in fields} | said

    def with_ids(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for name in ONE_FILE:
            if fields.get(name) is not None:
                named[name] = self.images.named(fields[name])
        for name in SEVERAL_FILES:
            if isinstance(fields.get(name), list):
                named[name] = [self.images.named(image) for image in fields[name]]
        return named

    def forget(self, fields: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        for name in (*ONE_FILE, *SEVERAL_FILES):
            given, sent = fields.get(name), body.get(name)
            if isinstance(given, list) and isinstance(sent, list):
                for image, image_id in zip(given, sent, strict=True):
                    self.images.forget(image, image_id)
            else:
                self.images.forget(given, sent)


Result = tuple[Question, dict[str, Any] | AskFailed]  # the answer, or why there is none


@dataclass(slots=True)
class Batch:
    """The questions that are left, the threads that ask them, and what came of it."""

    questions: Sequence[Question]
    asking: Asking
    clients: int
    failures: dict[int, AskFailed] = field(default_factory=dict)  # by line
    results: queue.SimpleQueue[Result | BaseException | None] = field(default_factory=queue.SimpleQueue)

    def run(self) -> Iterator[list[Result]]:
        """Yield what has come since the last time. Raises what ended a thread."""
        left, reading = iter(self.questions), threading.Lock()

        def work() -> None:
            try:
                while not self.asking.service.pace.stopped:
                    with reading:
                        question = next(left, None)
                    if question is None:
                        break
                    self.results.put((question, self._asked(question)))
            except Stopped:
                pass
            except BaseException as exc:
                self.asking.service.pace.stop()
                self.results.put(exc)
            finally:
                self.results.put(None)

        working = min(self.clients, len(self.questions))
        for _ in range(working):
            threading.Thread(target=work, daemon=True).start()
        while working:
            came = [self.results.get()]
            while not self.results.empty():
                came.append(self.results.get())
            working -= came.count(None)
            yield [each for each in came if isinstance(each, tuple)]
            for each in came:
                if isinstance(each, BaseException):
                    raise each

    @property
    def interrupted(self) -> bool:
        return self.asking.service.pace.stopped

    def _asked(self, question: Question) -> dict[str, Any] | AskFailed:
        try:
            return self.asking.answer(question)
        except AskFailed as exc:
            return exc


def ask_batch(client: httpx.Client, source: str, out: Path, options: Mapping[str, Any], clients: int) -> None:
    """Ask what was not answered before, and end the command if it was interrupted or a question failed.

    Raises AskFailed, httpx.HTTPError.
    """
    folder, questions = read_questions(source, {"priority": "low", **options})
    with AnswersFile.opened(out) as answers:
        left = unanswered(questions, answers)
        before = len(questions) - len(left)
        batch = ask_left(client, folder, left, answers, clients=clients, before=before)
    report(len(questions), before, len(answers.answered), batch.failures, interrupted=batch.interrupted)


def ask_left(
    client: httpx.Client, folder: Path, left: Sequence[Question], answers: AnswersFile, *, clients: int, before: int
) -> Batch:
    """Ask these questions, append what is answered, and show how far it is; `before` were answered earlier.

    The time that is left is told from this run's pace. The first Ctrl-C ends it early.

    Raises AskFailed, httpx.HTTPError.
    """
    pace = Pace(clients)
    service = Service(client, pace)
    batch = Batch(left, Asking(service, Images(service, folder)), clients)
    if left:
        successful(client.get("/health/live"))  # say at once if nobody is there
    hidden = not sys.stderr.isatty()
    label = f"{before} answered before, and now" if before else "answered"
    progress = typer.progressbar(length=len(left), label=label, show_pos=True, file=sys.stderr, hidden=hidden)
    started = told_at = time.monotonic()
    done = 0
    with interruptible(pace), progress as bar:
        for results in batch.run():
            answers.append([said for _, said in results if isinstance(said, dict)])
            batch.failures |= {question.line: said for question, said in results if isinstance(said, AskFailed)}
            bar.update(len(results))
            done += len(results)
            if hidden and (now := time.monotonic()) - told_at >= TOLD_EVERY_S:
                told_at = now
                typer.echo(how_far(done, len(left), now - started), err=True)
    return batch


def how_far(done: int, total: int, took_s: float) -> str:
    """A line for logs, with the time that is left at this pace."""
    left_s = took_s * (total - done) / done if done else 0.0
    left = f"about {left_s / 60:.0f} min left" if done else "no pace yet"
    return f"{done} of {total} asked, {left}"


def read_questions(source: str, options: Mapping[str, Any]) -> tuple[Path, list[Question]]:
    """Read a file of JSON lines, or standard input for "-" -> its folder, and its questions. Raises AskFailed."""
    lines = read_image(source).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    questions = [Question(line, text, options) for line, text in enumerate(lines, 1) if text.strip()]
    if not questions:
        raise AskFailed(f"{source} has no questions: write one JSON object a line")
    return Path() if source == "-" else Path(source).parent, questions


def unanswered(questions: Sequence[Question], answers: AnswersFile, not_now: Iterable[int] = ()) -> list[Question]:
    """Return what was not answered before. not_now: lines of questions that are left out this time.

    Raises AskFailed if the answers belong to other questions.
    """
    left, known = [], {question.line for question in questions} | set(not_now)
    for question in questions:
        if (asked := answers.answered.get(question.line)) is None:
            left.append(question)
        elif asked != question.digest:
            raise AskFailed(
                f"{answers.path} has an answer to another question or with other options for line {question.line}: "
                "choose another --out"
            )
    if others := answers.answered.keys() - known:
        raise AskFailed(
            f"{answers.path} has an answer for line {min(others)}, which is not a question: choose another --out"
        )
    return left


@contextmanager
def interruptible(pace: Pace) -> Iterator[None]:
    """Let the first Ctrl-C start no more questions and await those that were asked; the second one ends at once."""

    def stop(_: int, __: FrameType | None) -> None:
        if pace.stopped:
            raise KeyboardInterrupt
        pace.stop()
        with suppress(OSError):  # written past Python's buffers, which the signal may have found half written
            os.write(2, b"\nglimpse: waits for the questions that were asked; Ctrl-C again ends at once\n")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def report(total: int, before: int, answered: int, failures: Mapping[int, AskFailed], *, interrupted: bool) -> None:
    """Say on standard error what came of it, and end the command unless every question has its answer."""
    earlier = f", {before} of them before" if before else ""
    typer.echo(f"{answered} of {total} answered{earlier}", err=True)
    if failures:
        typer.echo(f"{len(failures)} failed; the same command asks them again:", err=True)
    lines: defaultdict[str, list[int]] = defaultdict(list)
    for line, failure in sorted(failures.items()):
        lines[str(failure)].append(line)
    for message, failed in lines.items():
        shown = ", ".join(map(str, failed[:MOST_LINES_SHOWN]))
        more = f" and {len(failed) - MOST_LINES_SHOWN} more" if len(failed) > MOST_LINES_SHOWN else ""
        typer.echo(f"  line{'s' if len(failed) > 1 else ''} {shown}{more}: {message}", err=True)
    if interrupted and answered + len(failures) < total:
        typer.echo("glimpse: interrupted; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED)
    if failures:
        raise typer.Exit(1)
