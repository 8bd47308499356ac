"""Measure the served accuracy on the committed scenes: gateway, Triton and every model.

    glimpse eval                          # asks the server at http://127.0.0.1:8080
    glimpse eval --vision-tokens 64 112   # accuracy with a smaller budget
    glimpse eval --detail auto            # may use the closer view if the question needs it

An answer is right if it matches exactly after stripping and lower-casing. Results are by question type and split, with
the number of questions and the 95 % Wilson score interval (Wilson 1927).
"""

from __future__ import annotations

import base64
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

SCENES = Path(__file__).parent / "scenes"
Z_95 = 1.959964  # standard normal quantile of 0.975
NOT_IN_TOTAL = "describe"  # answers of many words are reported separately


@dataclass(frozen=True)
class Row:
    """One question on one committed scene."""

    image: str
    question: str
    answer: str
    type: str
    split: str


@dataclass(frozen=True)
class Outcome:
    """The service's answer to one question."""

    row: Row
    answer: str
    vision_tokens: int

    @property
    def right(self) -> bool:
        return is_right(self.answer, self.row)


def is_right(answer: str, row: Row) -> bool:
    return answer.strip().lower() == row.answer.strip().lower()


def rows(scenes: Path, split: str | None = None) -> list[Row]:
    """Every question of questions.jsonl, or of one split."""
    lines = (scenes / "questions.jsonl").read_text().splitlines()
    found = [Row(**json.loads(line)) for line in lines]
    return [row for row in found if split in (None, row.split)]


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a proportion."""
    share, square = right / of, Z_95**2
    centre = (share + square / (2 * of)) / (1 + square / of)
    half = Z_95 * math.sqrt(share * (1 - share) / of + square / (4 * of * of)) / (1 + square / of)
    return max(0.0, centre - half), min(1.0, centre + half)


def ask_all(
    client: httpx.Client, scenes: Path, questions: Iterable[Row], fields: Mapping[str, object], clients: int
) -> Iterator[Outcome]:
    """Ask every question with these extra fields, `clients` at a time; yield in order.

    Raises httpx.HTTPError on the first failed request.
    """

    def ask(row: Row) -> Outcome:
        body = dict(fields) | {
            "image": base64.b64encode((scenes / row.image).read_bytes()).decode(),
            "question": row.question,
            "max_tokens": 64 if row.type == NOT_IN_TOTAL else 8,
        }
        response = client.post("/v1/vqa", json=body)
        response.raise_for_status()
        said = response.json()
        return Outcome(row, said["answer"], said["vision"]["vision_tokens"])

    with ThreadPoolExecutor(clients) as pool:
        yield from pool.map(ask, questions)


def summarise(outcomes: Iterable[Outcome]) -> dict[str, dict[str, dict[str, float]]]:
    """n, accuracy, its interval and mean vision tokens, by split and type (and `all`)."""
    groups: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        row = outcome.row
        groups[row.split, row.type].append(outcome)
        if row.type != NOT_IN_TOTAL:
            groups[row.split, "all"].append(outcome)
    table: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (split, kind), group in sorted(groups.items()):
        right = sum(outcome.right for outcome in group)
        low, high = wilson(right, len(group))
        table[split][kind] = {
            "n": len(group),
            "accuracy": round(right / len(group), 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "vision_tokens": round(sum(outcome.vision_tokens for outcome in group) / len(group), 1),
        }
    return dict(table)


def as_markdown(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """The summary as a Markdown table, as in the README."""
    lines = ["| split | type | n | accuracy | 95 % interval | vision tokens |", "|---|---|---|---|---|---|"]
    for split, kinds in sorted(table.items(), reverse=True):
        for kind, row in sorted(kinds.items(), key=lambda item: (item[0] == "all", item[0])):
            lines.append(
                f"| {split} | {kind} | {row['n']} | {row['accuracy']:.3f} | "
                f"{row['low']:.3f} to {row['high']:.3f} | {row['vision_tokens']:.0f} |"
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
) -> dict[str, dict[str, dict[str, float]]]:
    """Ask the questions, print the table, and write it as JSON to `out` if given.

    Raises httpx.HTTPError if the server fails.
    """
    asked = {"budget": budget, "detail": detail, "fit": fit}
    fields = {name: value for name, value in asked.items() if value}
    model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
    table = summarise(ask_all(client, scenes, rows(scenes, split), fields, clients))
    print(as_markdown(table))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"model": model, "asked": fields, "accuracy": table}, indent=2) + "\n")
    return table
