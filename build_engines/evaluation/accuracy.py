"""Measure the served accuracy on the committed scenes: gateway, Triton and every model.

    glimpse eval                          # asks the server at http://127.0.0.1:8080
    glimpse eval --vision-tokens 64 112   # accuracy with a smaller budget
    glimpse eval --detail auto            # may use the closer view if the question needs it
    glimpse eval --split several          # two to four images a question
    glimpse eval --split clips            # clips, looked at with 4, 8, 16 and 32 frames

An answer is right if it matches exactly after stripping and lower-casing. Results are by question type and split, with
the number of questions, the 95 % interval (a bootstrap over scenes), and what the most frequent answer of each type
would reach.
"""

from __future__ import annotations

import base64
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np

from build_engines.evaluation.intervals import share_by_scene

SCENES = Path(__file__).parent / "scenes"
# Splits that models without clips or several images cannot answer: asked only if they are named.
CLIPS, SEVERAL = "clips", "several"
FOLDERS = {split: Path(__file__).parent / split for split in (CLIPS, SEVERAL)}
FRAMES = (4, 8, 16, 32)  # of a clip, each asked in turn
TRAINED_FRAMES = 8  # of the reference model's clips, with which the other numbers are compared
FINGERPRINTS = ("fingerprint", "visual_fingerprint")  # of the model's weights
NOT_IN_TOTAL = "describe"  # answers of many words are reported separately


@dataclass(frozen=True)
class Row:
    """One question on one committed scene, several of them, or a clip. Files lie beside questions.jsonl."""

    image: str
    question: str
    answer: str
    type: str
    split: str
    images: tuple[str, ...] = ()
    clip: str = ""

    @property
    def scene(self) -> tuple[str, ...]:
        """Name what it is about. Other questions may be about the same."""
        return (self.clip or self.image, *self.images)

    def seen(self, scenes: Path) -> dict[str, object]:
        """The fields of the request that hold the files."""
        if self.clip:
            return {"video": _base64(scenes / self.clip)}
        if self.images:
            return {"images": [_base64(scenes / name) for name in self.images]}
        return {"image": _base64(scenes / self.image)}


@dataclass(frozen=True)
class Outcome:
    """The service's answer to one question."""

    row: Row
    answer: str
    vision_tokens: int
    reduced: bool = False  # looked less closely than asked, because of load

    @property
    def right(self) -> bool:
        return is_right(self.answer, self.row)


def is_right(answer: str, row: Row) -> bool:
    return answer.strip().lower() == row.answer.strip().lower()


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def folder_of(split: str | None) -> Path:
    """Where a committed split lies."""
    return FOLDERS.get(split or "", SCENES)


def rows(scenes: Path, split: str | None = None) -> list[Row]:
    """Every question of questions.jsonl, or of one split."""
    lines = [json.loads(line) for line in (scenes / "questions.jsonl").read_text().splitlines()]
    found = [Row(**{"image": ""} | line | {"images": tuple(line.get("images", ()))}) for line in lines]
    return [row for row in found if split in (None, row.split)]


def ask_all(
    client: httpx.Client, scenes: Path, questions: Iterable[Row], fields: Mapping[str, object], clients: int
) -> Iterator[Outcome]:
    """Ask every question with these extra fields, `clients` at a time; yield in order.

    Raises httpx.HTTPError on the first failed request.
    """

    def ask(row: Row) -> Outcome:
        body = dict(fields) | {
            **row.seen(scenes),
            "question": row.question,
            "max_tokens": 64 if row.type == NOT_IN_TOTAL else 8,
        }
        response = client.post("/v1/vqa", json=body)
        response.raise_for_status()
        said = response.json()
        vision = said["vision"]
        return Outcome(row, said["answer"], vision["vision_tokens"], vision.get("reduced", False))

    with ThreadPoolExecutor(clients) as pool:
        yield from pool.map(ask, questions)


def summarise(outcomes: Iterable[Outcome]) -> dict[str, dict[str, dict[str, float]]]:
    """n, accuracy, its interval and mean vision tokens, by split and type (and `all`).

    majority: the share that the most frequent answer would get right; in `all`, that of each question's type.
    """
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        row = outcome.row
        groups[row.split, row.type].append(outcome)
        if row.type != NOT_IN_TOTAL:
            groups[row.split, "all"].append(outcome)
    table: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    frequent: Counter[tuple[str, str]] = Counter()
    for (split, kind), group in groups.items():
        if kind != "all":
            most = max(Counter(outcome.row.answer for outcome in group).values())
            frequent[split, kind] = most
            frequent[split, "all"] += most if kind != NOT_IN_TOTAL else 0
    for (split, kind), group in sorted(groups.items()):
        share = share_by_scene([outcome.right for outcome in group], [outcome.row.scene for outcome in group])
        table[split][kind] = {
            "n": len(group),
            "accuracy": round(share.value, 4),
            "low": round(share.low, 4),
            "high": round(share.high, 4),
            "majority": round(frequent[split, kind] / len(group), 4),
            "vision_tokens": round(sum(outcome.vision_tokens for outcome in group) / len(group), 1),
        }
    return dict(table)


def frames_of(split: str) -> int:
    """Read the number in a split's name such as "clips, 16 frames"; 0 if there is none."""
    number = split.partition(", ")[2].partition(" ")[0]
    return int(number) if number.isdigit() else 0


def as_markdown(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """The summary as a Markdown table, as in the README."""
    lines = [
        "| split | type | n | accuracy | 95 % interval | most frequent answer | vision tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    by_frames = sorted(table.items(), key=lambda item: frames_of(item[0]))
    for split, kinds in sorted(by_frames, key=lambda item: item[0].partition(",")[0], reverse=True):
        for kind, row in sorted(kinds.items(), key=lambda item: (item[0] == "all", item[0])):
            lines.append(
                f"| {split} | {kind} | {row['n']} | {row['accuracy']:.3f} | "
                f"{row['low']:.3f} to {row['high']:.3f} | {row['majority']:.3f} | {row['vision_tokens']:.0f} |"
            )
    return "\n".join(lines)


def evaluate(
    client: httpx.Client,
    scenes: Path = SCENES,
    split: str | None = None,
    budget: Mapping[str, tuple[int, int]] | None = None,
    detail: str | None = None,
    fit: str | None = None,
    clients: int = 4,
    out: Path | None = None,
    frames: Sequence[int] = FRAMES,
) -> dict[str, dict[str, dict[str, float]]]:
    """Ask the questions, print the table, and write it as JSON to `out` if given.

    Questions about clips are asked with each number of `frames`, which the table tells apart as splits.
    Raises httpx.HTTPError if the server fails.
    """
    asked = {"budget": budget, "detail": detail, "fit": fit}
    fields = {name: value for name, value in asked.items() if value}
    model = client.get("/v1/models").raise_for_status().json()["data"][0]
    questions = rows(scenes, split)
    clips = [row for row in questions if row.clip]
    outcomes = list(ask_all(client, scenes, [row for row in questions if not row.clip], fields, clients))
    by_frames = {
        number: list(ask_all(client, scenes, clips, {**fields, "video_frames": number}, clients))
        for number in (frames if clips else ())
    }
    for number, found in by_frames.items():
        outcomes += [replace(one, row=replace(one.row, split=f"{one.row.split}, {number} frames")) for one in found]
    table, differences = summarise(outcomes), compare_frames(by_frames)
    print(as_markdown(table))
    if reduced := sum(one.reduced for one in outcomes):
        print(f"{reduced} of {len(outcomes)} answers are reduced, because the service was busy: ask with fewer clients")
    for number, difference in differences.items():
        told = "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**difference)
        print(f"{number} frames minus {TRAINED_FRAMES}: {told}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        report = {"model": model["id"]} | {name: model.get(name) for name in FINGERPRINTS}
        report |= {"asked": fields, "answers": len(outcomes), "reduced_by_load": reduced, "accuracy": table}
        report |= {f"minus_{TRAINED_FRAMES}_frames": differences} if differences else {}
        out.write_text(json.dumps(report, indent=2) + "\n")
    return table


def compare_frames(by_frames: Mapping[int, Sequence[Outcome]]) -> dict[int, dict[str, float]]:
    """Accuracy with each number of frames minus that with 8, with its 95 % interval (bootstrap over clips).

    Every number has the same questions in the same order. Empty if none was asked with 8 frames.
    """
    from build_engines.evaluation.intervals import mean  # noqa: PLC0415 - imports this module

    if TRAINED_FRAMES not in by_frames:
        return {}
    trained = by_frames[TRAINED_FRAMES]
    _, clip = np.unique([one.row.clip for one in trained], return_inverse=True)
    found = {}
    for number, outcomes in by_frames.items():
        changes = [float(one.right) - float(other.right) for one, other in zip(outcomes, trained, strict=True)]
        if number != TRAINED_FRAMES and (difference := mean(changes, clip)):
            found[number] = difference.as_json()
    return found
