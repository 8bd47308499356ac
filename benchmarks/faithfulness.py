"""Measure whether the relevance map shows what an answer rests on: cover cells of the image, and ask again.

    python -m benchmarks.faithfulness                       # starts a service of its own; a few minutes on two cores
    python -m benchmarks.faithfulness --split new --detail low
    python -m benchmarks.faithfulness --url http://127.0.0.1:8080

It asks the committed questions that read a character, and keeps those with the right answer. The map ranks the image's
16x16 cells. The tenth that it ranks highest is covered with the image's mean colour, and the question is asked again.
There are two controls: a tenth of the cells drawn at random, and the map's own tenth shifted by a random offset, which
has the same shape elsewhere (round the edges too). If the map is faithful, covering its cells changes the answer, and
covering the controls does not. Intervals come from resampling images.
"""

from __future__ import annotations

import argparse
import base64
import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.figures import tell
from benchmarks.latency import own_server
from build_engines.evaluation.accuracy import FINGERPRINTS, SCENES, Row, rows
from build_engines.evaluation.intervals import Figure, mean

SHARE = 0.1  # of the cells, covered
RANDOM_DRAWS = 3  # of each control, for each question
CLIENTS = 4
SEED = 5
MOST_RELEVANT_BAR, RANDOM_BAR = 0.9, 0.1  # of the answers: at least, at most, change

UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Covered:
    """What one right answer became: by the most relevant cells covered, and by each draw of the controls."""

    image: str
    most_relevant: bool  # whether it changed
    random: tuple[bool, ...]
    shifted: tuple[bool, ...]
    reduced: bool  # whether the service looked less closely at any of them, because of load


def most_relevant(relevance: Floats, share: float = SHARE) -> npt.NDArray[np.bool_]:
    """The cells [rows, columns] of the largest values, this share of all. The first of equal ones count."""
    order = np.argsort(-relevance, axis=None, kind="stable")
    return chosen(order[: round(share * relevance.size)], relevance.shape)


def at_random(shape: tuple[int, ...], rng: np.random.Generator, share: float = SHARE) -> npt.NDArray[np.bool_]:
    """This share of the cells, drawn without replacement."""
    size = int(np.prod(shape))
    return chosen(rng.choice(size, round(share * size), replace=False), shape)


def shifted(cells: npt.NDArray[np.bool_], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """The cells [rows, columns] moved by a random offset, not by none. What leaves one edge enters at the other."""
    offset = np.unravel_index(rng.integers(1, cells.size), cells.shape)
    return np.roll(cells, offset, (0, 1))


def chosen(places: npt.NDArray[np.int64], shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    cells = np.zeros(int(np.prod(shape)), bool)
    cells[places] = True
    return cells.reshape(shape)


def cover(pixels: UInt8, cells: npt.NDArray[np.bool_]) -> UInt8:
    """Image [H, W, 3] with these cells of a grid over all of it in the image's mean colour."""
    (height, width, _), (rows_of_cells, columns) = pixels.shape, cells.shape
    down = np.arange(height) * rows_of_cells // height
    across = np.arange(width) * columns // width
    covered = pixels.copy()
    covered[cells[np.ix_(down, across)]] = pixels.mean((0, 1)).round().astype(np.uint8)
    return covered


def ask(client: httpx.Client, pixels: UInt8, question: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Ask about an image of these pixels, without loss. Raises httpx.HTTPError."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    body = {"image": image, "question": question, "max_tokens": 8, **fields}
    said: dict[str, Any] = client.post("/v1/vqa", json=body).raise_for_status().json()
    return said


def covered(client: httpx.Client, row: Row, number: int, detail: str) -> Covered | None:
    """Ask one question, and again with cells covered; None if its answer is wrong. Raises httpx.HTTPError."""
    fields = {"detail": detail}
    with Image.open(SCENES / row.image) as image:
        pixels = np.asarray(image.convert("RGB"))
    said = ask(client, pixels, row.question, {**fields, "explain": True})
    if said["answer"] != row.answer:
        return None
    relevance = np.array(said["relevance"][0]["map"])
    rng = np.random.default_rng((SEED, number))
    by_map = most_relevant(relevance)
    masks = [by_map, *(at_random(relevance.shape, rng) for _ in range(RANDOM_DRAWS))]
    masks += [shifted(by_map, rng) for _ in range(RANDOM_DRAWS)]
    again = [ask(client, cover(pixels, mask), row.question, fields) for mask in masks]
    changed = [each["answer"] != said["answer"] for each in again]
    reduced = any(each["vision"]["reduced"] for each in (said, *again))
    of_random, of_shifted = changed[1 : 1 + RANDOM_DRAWS], changed[1 + RANDOM_DRAWS :]
    return Covered(row.image, changed[0], tuple(of_random), tuple(of_shifted), reduced)


def summary(told: list[Covered]) -> dict[str, object]:
    """Shares of right answers that change, with 95 % intervals over images. Raises ValueError for no answers."""
    if not told:
        raise ValueError("no reading question was answered right, so there is nothing to cover")
    names = sorted({each.image for each in told})
    image = np.array([names.index(each.image) for each in told])
    by_map, by_chance, elsewhere = (
        cast(Figure, mean(values, image))
        for values in (
            [each.most_relevant for each in told],
            [np.mean(each.random) for each in told],
            [np.mean(each.shifted) for each in told],
        )
    )
    return {
        "right_answers": len(told),
        "images": len(names),
        "reduced_by_load": sum(each.reduced for each in told),
        "most_relevant_covered": by_map.as_json(),
        "random_covered": by_chance.as_json(),
        "shifted_covered": elsewhere.as_json(),
        "bars": {"most_relevant_covered": MOST_RELEVANT_BAR, "random_covered": RANDOM_BAR},
        "met": by_map.value >= MOST_RELEVANT_BAR and by_chance.value <= RANDOM_BAR,
    }


def measure(url: str, split: str, detail: str, limit: int | None) -> dict[str, object]:
    """Ask about a split's reading questions -> the report. Raises httpx.HTTPError."""
    asked = [row for row in rows(SCENES, split) if row.type == "read"][:limit]
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(CLIENTS) as pool:
        told = list(pool.map(lambda numbered: covered(client, numbered[1], numbered[0], detail), enumerate(asked)))
        model = client.get("/v1/models").raise_for_status().json()["data"][0]
    right = [each for each in told if each is not None]
    weights = {name: model[name] for name in FINGERPRINTS}
    settings = {**weights, "split": split, "detail": detail, "share_of_cells": SHARE, "random_draws": RANDOM_DRAWS}
    return {**settings, "questions": len(asked), **summary(right)}


@contextmanager
def service(url: str | None) -> Iterator[str]:
    """The address of the service; of a new one if none is named, which never looks less closely under load."""
    if url:
        yield url
        return
    with own_server(ELASTIC_FIDELITY="false") as server:
        yield server.url


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="small_print", choices=("new", "held_out_pairs", "small_print"))
    parser.add_argument("--detail", default="auto", choices=("low", "high", "auto"))
    parser.add_argument("--limit", type=int, help="ask only so many questions")
    parser.add_argument("--url", help="of a running service")
    parser.add_argument("--out", type=Path, help="write the report as JSON here too")
    given = parser.parse_args()
    with service(given.url) as url:
        report = measure(url, given.split, given.detail, given.limit)
    tell(report, given.out)


if __name__ == "__main__":
    main()
