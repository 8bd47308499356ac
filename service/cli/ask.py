"""Ask a running service about an image: `glimpse ask`."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from service.cli.batch import ask_batch
from service.cli.client import (
    IMAGE_ID,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    AskFailed,
    answer,
    connected,
    plain_words,
    read_image,
    stream,
    upload,
)
from service.cli.options import Detail, Fit, Url, budget, url_of
from service.cli.terminal import require
from service.core.frames import MAX_FRAMES, FrameSampling
from service.media.clip_header import FILMS, clip_format, is_clip
from service.media.formats import HAS_PDFIUM, is_pdf

NO_PDFIUM = (
    "drawing a page of a PDF needs pypdfium2, which is not installed here: run "
    ".venv/bin/pip install -c constraints.txt -e '.[pdf]' in Glimpse's folder"
)


def ask(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IMAGE... QUESTION...",
            help="First the images or videos: files, patterns such as 'photos/*.jpg', - for standard input, or ids "
            "img_... of what was sent before. Then one or more questions about each of them.",
            show_default=False,
        ),
    ] = None,
    url: Url = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token each time.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw only from this number of most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw only from the most likely tokens whose probabilities reach this sum.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
    vision_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="Vision tokens that the Q-Former reads.")
    ] = None,
    visual_tokens: Annotated[
        tuple[int, int] | None, typer.Option(metavar="LEAST MOST", help="Visual tokens that the LLM reads: 32 to 128.")
    ] = None,
    detail: Annotated[
        Detail | None, typer.Option(help="high adds a closer view of the image; auto adds it if the question needs it.")
    ] = None,
    fit: Fit = None,
    page: Annotated[int | None, typer.Option(min=1, help="The page of a PDF or a TIFF [default: 1].")] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_FRAMES, help="Look at no more than so many frames of a video [default: 8 of a video file]."
        ),
    ] = None,
    sampling: Annotated[
        FrameSampling | None,
        typer.Option(
            help="Which frames of a video: uniform takes them evenly spaced, change leaves out those that look like "
            "the one before."
        ),
    ] = None,
    as_frames: Annotated[
        bool, typer.Option("--as-frames", help="Take the images as the frames of one video, in this order.")
    ] = False,
    explain: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw where the model looked, and why; one question only.")
    ] = None,
    confidence: Annotated[bool, typer.Option("--confidence", help="Print how sure each answer is behind it.")] = False,
    min_confidence: Annotated[
        float | None, typer.Option(min=0, max=1, help="Mark answers that are less sure; implies --confidence.")
    ] = None,
    timeout_s: Annotated[float | None, typer.Option(help="Give up after this many seconds.")] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.jsonl",
            help='Ask the questions of this file, one line each: {"image": "x.jpg", "question": "..."} and any other '
            "field of POST /v1/vqa. Images are files beside it, or ids.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Where the answers of --batch go. Answers that it has are not asked again."
        ),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, max=64, help="Questions of --batch asked at the same time.")] = 4,
) -> None:
    """Ask a running service about images or videos.

    It prints the answers as they come.

    With several questions an image is sent once, and its features are computed once. Whether a file is a video, its
    content says: a GIF or WebP that moves is one. With --frames or --sampling, an id names a video.

    \b
      glimpse ask photo.jpg "what colour is the small circle?"
      glimpse ask photo.jpg "how many circles are there?" "is there a red square?"
      glimpse ask photo.jpg "what does the label say?" --detail high
      glimpse ask photo.jpg "what does the label say?" --min-confidence 0.8
      glimpse ask photo.jpg "is there a red square?" --explain looked.png
      glimpse ask photo.jpg "is there a red square?" --explain looked.png --json | jq .relevance     # the numbers drawn
      glimpse ask report.pdf "what does the sign say?" --page 3 --explain looked.png
      glimpse ask photos/*.jpg "is there a red square?"                          # a line for each file
      glimpse ask clip.mp4 "which way does the square move?" --frames 16 --explain looked.png
      glimpse ask before.png after.png "what is missing?" --as-frames            # one answer about both
      glimpse ask --batch questions.jsonl --out answers.jsonl                    # goes on where it was stopped
    """
    fields: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "budget": budget(vision_tokens, visual_tokens),
        "detail": detail,
        "fit": fit,
        "page": page,
        "video_frames": frames,
        "video_sampling": sampling,
        "explain": True if explain else None,
        "min_confidence": min_confidence,
        "timeout_s": timeout_s,
    }
    asked = {name: value for name, value in fields.items() if value is not None}
    address = url_of(url)
    with plain_words(address), connected(address) as client:
        if batch is not None or out is not None:
            if words or as_json or explain or as_frames or batch is None or out is None:
                raise AskFailed(
                    "--batch needs --out, and takes no images, questions, --json, --explain or --as-frames beside it"
                )
            require_sendable(asked, [])
            ask_batch(client, batch, out, asked, clients)
            return
        images, questions = sorted_out(words or [])
        require_sendable(asked, questions)
        subjects = [Subject(tuple(images), as_frames)] if as_frames else [Subject((image,)) for image in images]
        if explain:
            require_drawable(explain, subjects, questions)
        sure = confidence or min_confidence is not None
        show = Show(as_json, explain, named=len(subjects) > 1, sure=sure)
        failed = False
        for subject in subjects:
            try:
                ask_about(client, subject, questions, asked, show=show)
            except AskFailed as exc:
                if len(subjects) == 1:
                    raise
                failed = True
                typer.echo(f"glimpse: {subject}: {exc}", err=True)
        if failed:
            raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Subject:
    """What questions are about: an image, a video, or images that are the frames of a video. Files or ids."""

    names: tuple[str, ...]
    as_frames: bool = False

    def __str__(self) -> str:
        return " ".join(self.names)

    def read(self) -> tuple[bytes | None, ...]:
        """Return the bytes of each file, None for an id. Raises AskFailed."""
        return tuple(None if is_id(name) else read_image(name) for name in self.names)

    def field(self, data: bytes | None, asked: Mapping[str, Any]) -> str:
        """Return the field of a question that names it. `data` is that of the one file. Raises AskFailed."""
        if self.as_frames:
            return "frames"
        as_video = "video_frames" in asked or "video_sampling" in asked
        if data is None:
            return "video" if as_video else "image"
        if as_video and not is_clip(data):
            raise AskFailed(f"{self} is no video: leave --frames and --sampling out, or take images as --as-frames")
        return "video" if is_clip(data) else "image"


@dataclass(frozen=True, slots=True)
class Show:
    """How answers are shown."""

    as_json: bool
    explain: Path | None  # where to draw
    named: bool  # with the image's name, because there are several
    sure: bool  # with its confidence


def ask_about(
    client: httpx.Client, subject: Subject, questions: Sequence[str], asked: Mapping[str, Any], *, show: Show
) -> None:
    """Ask the questions about one subject, which is sent once. Raises AskFailed."""
    files = subject.read()
    field = subject.field(files[0], asked)
    require_askable(subject, field, files, asked, show)
    ids = [name if data is None else upload(client, data) for name, data in zip(subject.names, files, strict=True)]
    for question in questions:
        body = {**asked, field: ids if subject.as_frames else ids[0], "question": question}
        if show.as_json or show.explain:
            said = answer(client, body)
            if show.as_json:
                typer.echo(json.dumps({"file": str(subject), **said} if show.named else said))
            else:
                typer.echo(said["answer"])
            if show.explain:
                draw(subject, [data for data in files if data is not None], body, said, show.explain)
            continue
        in_front = [f"{subject}:"] * show.named + [question] * (len(questions) > 1)
        said_first = "".join(f"{word} " for word in in_front)
        if show.sure:
            said = answer(client, body)
            typer.echo(f"{said_first}{said['answer']} {sureness(said)}")
            continue
        for text in stream(client, body):
            typer.echo(said_first + text, nl=False)
            said_first = ""
        typer.echo(said_first)


def sorted_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell images from questions -> both. The first word is an image, the last one a question. Raises AskFailed.

    Words between them are images as long as they name files or ids, or end as image files do.
    """
    if len(words) < 2:
        raise AskFailed('name an image and a question: glimpse ask photo.jpg "how many objects are there?"')
    count = 1
    while count < len(words) - 1 and is_image(words[count]):
        count += 1
    images = [name for word in words[:count] for name in matching(word)]
    if images.count("-") > 1:
        raise AskFailed("standard input holds one image: name - once")
    return images, list(words[count:])


def is_image(word: str) -> bool:
    if word == "-" or is_id(word):
        return True
    try:
        return Path(word).is_file() or (
            " " not in word and Path(word).suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES
        )
    except (OSError, ValueError):  # a long question is no name of a file
        return False


def matching(word: str) -> list[str]:
    """Return the files of a pattern, which a shell may have left as it is. Raises AskFailed if there are none."""
    if word == "-" or is_id(word) or not glob.has_magic(word) or Path(word).exists():
        return [word]
    files = sorted(name for name in glob.glob(word, recursive=True) if Path(name).is_file())
    if not files:
        raise AskFailed(f"no file matches {word}")
    return files


def sureness(said: dict[str, Any]) -> str:
    """Write how sure an answer is, such as `(confidence 0.31, found 0.02: abstained, not_found)`. Raises AskFailed."""
    if "confidence" not in said:
        raise AskFailed(f"{said['model']} does not tell how sure it is: leave --confidence out")
    told = ", ".join(f"{name} {said[name]:.2f}" for name in ("confidence", "found") if name in said)
    return f"({told}: abstained, {said['reason']})" if said.get("abstained") else f"({told})"


def is_id(image: str) -> bool:
    """Whether it names an image that the service has: a file of that name comes first."""
    return IMAGE_ID.fullmatch(image) is not None and not Path(image).exists()


def require_sendable(fields: dict[str, Any], questions: list[str]) -> None:
    """Check what JSON cannot carry. Raises AskFailed."""
    for name, value in fields.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise AskFailed(f"--{name.replace('_', '-')} is {value}: give a finite number")
    for name, texts in (("the question", questions), ("--stop", fields.get("stop", []))):
        for text in texts:
            if any("\ud800" <= letter <= "\udfff" for letter in text):  # Python's words for bytes that it cannot read
                raise AskFailed(f"{name} is not UTF-8 text: {text!a}")


def require_drawable(target: Path, subjects: Sequence[Subject], questions: list[str]) -> None:
    """Check before any request whether a picture can be drawn. Raises AskFailed."""
    require("matplotlib", "serve")
    if target.suffix.lower() != ".png":
        raise AskFailed(f"{target} is not a .png file: write --explain {target.with_suffix('.png')}")
    if len(subjects) > 1:
        raise AskFailed(f"--explain draws over one image, not {len(subjects)}: ask about each one separately")
    if len(questions) > 1:
        raise AskFailed(f"--explain draws one question, not {len(questions)}: ask each one separately")
    if any(is_id(name) for name in subjects[0].names):
        raise AskFailed("--explain draws over the image: name its file, not its id")


def require_askable(
    subject: Subject, field: str, files: Sequence[bytes | None], asked: Mapping[str, Any], show: Show
) -> None:
    """Check by the files' content, before anything is sent, what the service or the drawing would refuse.

    Raises AskFailed.
    """
    if field != "image" and "page" in asked:
        raise AskFailed(f"{subject} is a video, which has no pages: leave --page out")
    if subject.as_frames and len(files) > MAX_FRAMES:
        raise AskFailed(f"--as-frames takes 1 to {MAX_FRAMES} images, and {len(files)} are named: leave some out")
    if subject.as_frames:
        for name, data in zip(subject.names, files, strict=True):
            if data is not None and (clip_format(data) in FILMS or is_pdf(data)):
                kind = "a document" if is_pdf(data) else "a video"
                raise AskFailed(f"{name} is {kind}: --as-frames takes images")
    if show.explain and not HAS_PDFIUM and any(data is not None and is_pdf(data) for data in files):
        raise AskFailed(NO_PDFIUM)
    if show.explain and field == "video" and files[0] is not None and clip_format(files[0]) in FILMS:
        require("av", "serve")


def draw(
    subject: Subject, files: Sequence[bytes], asked: Mapping[str, Any], said: dict[str, Any], target: Path
) -> None:
    """Draw where the model looked into a file. Raises AskFailed."""
    from service.cli import drawing, film_strip  # noqa: PLC0415  (takes 0.3 s, so only this command imports it)

    question = asked["question"]
    try:
        if "image" in asked:
            figure = drawing.explain(files[0], question, said, asked.get("page"))
        else:
            clip = files if "frames" in asked else files[0]
            figure = film_strip.explain_clip(clip, question, said, asked.get("video_frames"))
        picture = drawing.png(figure)
    except OSError as exc:
        raise AskFailed(f"cannot draw {subject}: {exc.strerror or exc}") from exc
    try:
        target.write_bytes(picture)
    except OSError as exc:
        raise AskFailed(f"cannot write {target}: {exc.strerror}") from exc
