"""Ask a dataset's questions, and write down how good the answers are: `glimpse eval --dataset`."""

from __future__ import annotations

import hashlib
import json
import random
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import typer

from service.cli.answers_file import AnswersFile
from service.cli.batch import Batch, Question, ask_left, unanswered
from service.cli.client import AskFailed, ImageRefused, successful
from service.cli.terminal import INTERRUPTED

if TYPE_CHECKING:
    from build_engines.datasets.entries import Dataset, Entry
    from build_engines.evaluation.report import Run
    from build_engines.evaluation.scoring import Answered

ANSWERS, RUN, REPORT, PAGE = "answers.jsonl", "run.json", "report.json", "report.html"
CAPTIONS = "coco-captions"
CAPTION_PROMPT = "describe the image."
MAX_TOKENS = {CAPTIONS: 40}
MAX_SHORT_TOKENS = 16
PLACE = "{question}"
# Of the model, and what it does if a question does not say: with another one, answers do not go together.
IDENTITY = ("id", "card", "fingerprint", "visual_fingerprint", "language_fingerprint", "precision")
UNASKED = ("default_vision_tokens", "default_visual_tokens", "closer_view", "fit")
KNOWN_BY_BYTES = 65_536  # of an image: its size and its beginning tell whether it changed


@dataclass(frozen=True, slots=True)
class Sample:
    """Which questions of which files are asked, and how they are worded."""

    path: Path
    form: str
    limit: int | None
    seed: int
    prompt: str | None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def wording(self, form: str) -> str:
        """What is asked, with a place for the question."""
        return self.prompt or (CAPTION_PROMPT if form == CAPTIONS else PLACE)


@dataclass(slots=True)
class Chosen:
    """The entries that can be asked, by their line in the dataset, and why others cannot be."""

    entries: dict[int, Entry]
    images: dict[int, str]  # by line: the image's path in the folder
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by reason


def measure(client: httpx.Client, sample: Sample, options: Mapping[str, Any], out: Path | None, clients: int) -> None:
    """Ask what was not answered before, write the report, and end the command if something is left.

    Raises AskFailed, httpx.HTTPError.
    """
    dataset = read(sample)
    wording = sample.wording(dataset.form)
    if PLACE not in wording and dataset.form != CAPTIONS:
        raise AskFailed(f"--prompt has no {PLACE}: write where the question belongs")
    found = usable(dataset, sample)
    chosen = drawn(found.entries, sample)
    folder = out or Path(f"{sample.folder.resolve().name}-eval")
    asked = {"priority": "low", "max_tokens": MAX_TOKENS.get(dataset.form, MAX_SHORT_TOKENS), **options}
    questions = worded(sample.folder, {line: found.images[line] for line in chosen}, found, wording, asked)
    model = successful(client.get("/v1/models")).json()["data"][0]
    go_on_with(folder, dataset, model)
    with AnswersFile.opened(folder / ANSWERS) as answers:
        left = unanswered(questions, answers, not_now=range(1, len(dataset.entries) + 1))
        batch = ask_left(client, sample.folder, left, answers, clients=clients, before=len(questions) - len(left))
    records = answered(folder / ANSWERS, chosen)
    typer.echo(told_of(sample, dataset, found, batch, records), err=True)
    if not records:
        raise AskFailed("no question was answered, so there is nothing to report")
    run = described(sample, dataset, found, batch, model, asked)
    write_report(folder, run, entries_with(records, found))
    end(folder, batch, len(questions) - len(records))


def read(sample: Sample) -> Dataset:
    """Raises AskFailed."""
    from build_engines.datasets import forms  # noqa: PLC0415
    from build_engines.datasets.entries import NotReadable  # noqa: PLC0415

    try:
        return forms.read(sample.path, sample.form)
    except NotReadable as exc:
        raise AskFailed(str(exc)) from exc


def usable(dataset: Dataset, sample: Sample) -> Chosen:
    """The entries with an image that is there and an answer to compare with. Raises AskFailed if there are none."""
    from build_engines.datasets.images import ImageIndex, images_below  # noqa: PLC0415

    paths = images_below(sample.folder)
    index = ImageIndex(sample.folder, paths)
    found = Chosen({}, {})
    found.skipped["not readable"] = [f"{place}: {reason}" for place, reason in dataset.skipped.items()]
    for line, entry in enumerate(dataset.entries, 1):
        place = index.find(entry.image)
        if place is None:
            found.skipped["image missing"].append(f"{entry.image}: question {entry.id or line}")
        elif not entry.answers:
            found.skipped["without answers"].append(f"question {entry.id or line}")
        else:
            found.entries[line] = entry
            found.images[line] = paths[place].relative_to(sample.folder).as_posix()
    if not found.entries:
        why = ", ".join(
            f"{len(lines)} {reason} (such as {lines[0]})" for reason, lines in found.skipped.items() if lines
        )
        raise AskFailed(
            f"no question of {dataset.path} can be measured: {why}. Put the images into {sample.folder} or a folder "
            "below it, and take a split whose answers are published"
        )
    return found


def drawn(lines: Iterable[int], sample: Sample) -> list[int]:
    """The lines that are asked, in their order. A larger limit draws the same ones and more."""
    shuffled = list(lines)
    if sample.limit is None:
        return shuffled
    random.Random(sample.seed).shuffle(shuffled)
    return sorted(shuffled[: sample.limit])


def worded(
    folder: Path, images: Mapping[int, str], found: Chosen, wording: str, options: Mapping[str, Any]
) -> list[Question]:
    """The questions of these lines, each about its image. Raises AskFailed if an image cannot be read."""
    known = {image: known_by(folder / image) for image in dict.fromkeys(images.values())}
    return [
        Question(line, json.dumps(fields).encode(), options, known[image])
        for line, image in images.items()
        for fields in [{"image": image, "question": wording.replace(PLACE, found.entries[line].question)}]
    ]


def known_by(path: Path) -> bytes:
    """What tells whether an image changed. Raises AskFailed."""
    try:
        with path.open("rb") as file:
            beginning = hashlib.blake2b(file.read(KNOWN_BY_BYTES), digest_size=8).digest()
        return beginning + str(path.stat().st_size).encode()
    except OSError as exc:
        raise AskFailed(f"cannot read {path}: {exc.strerror}") from exc


def go_on_with(folder: Path, dataset: Dataset, model: Mapping[str, Any]) -> None:
    """Note in the folder what is measured. Raises AskFailed if its answers are of something else."""
    now = {"form": dataset.form, "model": {name: model.get(name) for name in (*IDENTITY, *UNASKED)}}
    path = folder / RUN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _has_answers(folder):
            path.write_text(json.dumps(now, indent=2) + "\n")
        before = json.loads(path.read_text())
    except (OSError, ValueError) as exc:
        raise AskFailed(f"cannot keep the run in {folder} ({exc}): choose another --out") from exc
    for name, value in now.items():
        if not agree(before.get(name), value):
            raise AskFailed(
                f"{folder} has answers of another {name} ({json.dumps(before.get(name))}, now {json.dumps(value)}): "
                "choose another --out"
            )


def agree(before: Any, now: Any) -> bool:
    """Whether `now` is all that was told before. An older version, or an older service, told less of its model."""
    if not isinstance(now, Mapping) or not isinstance(before, Mapping):
        return bool(before == now)
    told = {name: value for name, value in before.items() if value is not None or name == "card"}
    return "id" in told and all(now.get(name) == value for name, value in told.items())


def _has_answers(folder: Path) -> bool:
    path = folder / ANSWERS
    return path.exists() and path.stat().st_size > 0


def answered(path: Path, chosen: Sequence[int]) -> dict[int, dict[str, Any]]:
    """The answers of the lines that are asked, in their order."""
    by_line = {record["line"]: record for record in map(json.loads, path.read_bytes().splitlines())}
    return {line: by_line[line] for line in chosen if line in by_line}


def entries_with(records: Mapping[int, Mapping[str, Any]], found: Chosen) -> list[Answered]:
    from build_engines.evaluation.scoring import Answered  # noqa: PLC0415

    return [
        Answered(
            found.images[line],
            str(record["question"]),
            str(record["answer"]),
            found.entries[line].answers,
            found.entries[line].kinds,
            record,
        )
        for line, record in records.items()
    ]


def failed(batch: Batch) -> tuple[dict[str, list[str]], Counter[str]]:
    """Images that the service cannot use, with their questions; and failures of other reasons, counted."""
    broken: dict[str, list[str]] = defaultdict(list)
    reasons: Counter[str] = Counter()
    images = {question.line: str(question.fields()["image"]) for question in batch.questions}
    for line, failure in sorted(batch.failures.items()):
        if isinstance(failure, ImageRefused):
            broken[f"{images[line]}: {failure}"].append(str(line))
        else:
            reasons[str(failure)] += 1
    return broken, reasons


def described(
    sample: Sample, dataset: Dataset, found: Chosen, batch: Batch, model: Mapping[str, Any], asked: Mapping[str, Any]
) -> Run:
    from build_engines.evaluation.report import Run  # noqa: PLC0415

    broken, reasons = failed(batch)
    skipped = {reason: lines for reason, lines in found.skipped.items() if lines}
    if broken:
        skipped["image broken"] = [f"{image} ({len(lines)} questions)" for image, lines in broken.items()]
    return Run(
        form=dataset.form,
        file=str(dataset.path),
        folder=sample.folder,
        model={name: model.get(name) for name in IDENTITY if model.get(name)},
        command=shlex.join(["glimpse", *sys.argv[1:]]),
        asked={
            "prompt": sample.wording(dataset.form),
            "limit": sample.limit,
            "seed": sample.seed if sample.limit else None,
            **asked,
        },
        read=len(dataset.entries) + len(dataset.skipped),
        skipped=skipped,
        failures=dict(reasons.most_common()),
    )


def told_of(sample: Sample, dataset: Dataset, found: Chosen, batch: Batch, records: Mapping[int, object]) -> str:
    """What was answered, skipped and failed, for the terminal."""
    broken, reasons = failed(batch)
    lines = [f"{len(records)} answers to {dataset.path} ({dataset.form}), images from {sample.folder}"]
    skipped = {**found.skipped, "image broken": [f"{image}" for image in broken]}
    lines += [f"  skipped, {reason}: {len(each)}, such as {each[0]}" for reason, each in skipped.items() if each]
    lines += [f"  failed: {many}: {reason}" for reason, many in reasons.most_common()]
    return "\n".join(lines)


def write_report(folder: Path, run: Run, entries: Sequence[Answered]) -> None:
    from build_engines.evaluation import report  # noqa: PLC0415
    from build_engines.evaluation.scoring import score  # noqa: PLC0415

    scores = score(run.form, entries)
    content = report.as_json(run, entries, scores)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A file's name or an answer may have half of a surrogate pair: as JSON it is \udxxx, elsewhere a question mark.
    (folder / REPORT).write_bytes(text.encode(errors="backslashreplace"))
    (folder / PAGE).write_bytes(report.as_page(run, entries, scores).encode(errors="replace"))
    typer.echo(report.as_markdown(scores).encode(errors="replace"))


def end(folder: Path, batch: Batch, without: int) -> None:
    """Say where the report is; end the command with an error if a question is left that could be answered."""
    failures = sum(not isinstance(failure, ImageRefused) for failure in batch.failures.values())
    typer.echo(f"report: {folder / PAGE}", err=True)
    if batch.interrupted and without > len(batch.failures):
        typer.echo("glimpse: interrupted; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED)
    if failures:
        typer.echo(f"glimpse: {failures} questions failed; the same command asks them again", err=True)
        raise typer.Exit(1)
