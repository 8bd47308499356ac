"""Measure how well pages that are not square are read, by how they meet the square encoder: `fit`.

    python -m benchmarks.fits                              # starts a service of its own; ten minutes on two cores
    python -m benchmarks.fits --url http://127.0.0.1:8080 --pages 10

It draws pages of `benchmarks.pages`, which the models never saw, and asks the same questions with each `fit`. Accuracy
has 95 % intervals of a bootstrap over pages. The bar: on the longest pages, reading by tiles is 40 points above the
squashed page or more, at no more than twice its visual tokens. The report says which share of an image's refined cells
lies in padding.
"""

from __future__ import annotations

import argparse
import base64
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from benchmarks.arguments import count
from benchmarks.faithfulness import service
from benchmarks.figures import tell
from benchmarks.pages import KINDS, SIZES, pages
from build_engines.evaluation.intervals import share_by_scene

FITS = ("squash", "pad", "tiles")
LONG = ("tall", "wide")  # the bar is for these
BAR_POINTS, BAR_TOKENS = 40, 2.0
CLIENTS = 3
SEED = 53

Said = dict[str, Any]


def measure(url: str, count: int, detail: str) -> dict[str, object]:
    """Ask about so many pages of each of SIZES -> the report. Raises httpx.HTTPError."""
    by_size = {}
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(CLIENTS) as pool:
        for number, size in enumerate(SIZES):
            asked = [
                (place, base64.b64encode(page.png).decode(), question)
                for place, page in enumerate(pages(size, count, np.random.default_rng((SEED, number))))
                for question in page.questions
            ]
            by_size[size] = {}
            for fit in FITS:
                bodies = [
                    {"image": image, "question": each.text, "fit": fit, "detail": detail, "explain": True}
                    for _, image, each in asked
                ]
                said = list(pool.map(lambda body: answer(client, body), bodies))
                right = [each["answer"].strip() == one.answer for each, (*_, one) in zip(said, asked, strict=True)]
                by_size[size][fit] = summary(
                    [one.type for *_, one in asked], [place for place, *_ in asked], right, said
                )
        model = client.get("/v1/models").raise_for_status().json()["data"][0]
    return {
        "model": model["id"],
        "fingerprint": model["fingerprint"],
        "pages_of_each_size": count,
        "detail": detail,
        "pixels": SIZES,
        "sizes": by_size,
        "bar": bar(by_size),
    }


def answer(client: httpx.Client, body: Said) -> Said:
    said: Said = client.post("/v1/vqa", json=body).raise_for_status().json()
    return said


def summary(
    types: Sequence[str], page: Sequence[int], right: Sequence[bool], said: Sequence[Said]
) -> dict[str, object]:
    """Accuracy by type with intervals, tokens of an answer, the share of tiles, and what was spent on padding."""
    of_page, rights = np.array(page), np.array(right)
    rows = {name: np.array(types) == name for name in KINDS} | {"all": np.ones(len(rights), bool)}
    return {
        "accuracy": {name: interval(rights[some], of_page[some]) for name, some in rows.items() if some.any()},
        "visual_tokens": round(float(np.mean([each["vision"]["visual_tokens"] for each in said])), 1),
        "vision_tokens": round(float(np.mean([each["vision"]["vision_tokens"] for each in said])), 1),
        "answered_by_a_tile": round(float(np.mean([each["vision"]["fit"] == "tiles" for each in said])), 3),
        "refined_cells_in_padding": round(in_padding([each["relevance"][0] for each in said]), 3),
    }


def interval(right: npt.NDArray[np.bool_], page: npt.NDArray[np.int64]) -> dict[str, float]:
    return share_by_scene(right, page).as_json(3) | {"of": len(right)}


def in_padding(relevance: Sequence[Said]) -> float:
    """Return the share of all refined cells whose centres lie outside the image."""
    outside = refined = 0
    for each in relevance:
        left, top, right, bottom = each["area"]
        levels = np.array(each["levels"])
        share = (np.arange(len(levels)) + 0.5) / len(levels)
        x, y = left + share * (right - left), top + share * (bottom - top)
        is_inside = np.outer((y >= 0) & (y < 1), (x >= 0) & (x < 1))
        refined += int((levels > 0).sum())
        outside += int(((levels > 0) & ~is_inside).sum())
    return outside / refined if refined else 0.0


def bar(by_size: dict[str, dict[str, Any]]) -> dict[str, object]:
    """Compare reading by tiles with reading the squashed page, on the longest pages together."""
    right = dict.fromkeys(FITS, 0.0)
    tokens = dict.fromkeys(FITS, 0.0)
    nothing = {"value": 0.0, "of": 0}
    asked = sum(by_size[size]["squash"]["accuracy"].get("read", nothing)["of"] for size in LONG)
    for fit in FITS:
        for size in LONG:
            read = by_size[size][fit]["accuracy"].get("read", nothing)
            right[fit] += read["value"] * read["of"] / max(asked, 1)
            tokens[fit] += by_size[size][fit]["visual_tokens"] / len(LONG)
    points = 100 * (right["tiles"] - right["squash"])
    ratio = tokens["tiles"] / tokens["squash"]
    return {
        "reading": {fit: round(value, 3) for fit, value in right.items()},
        "points_above_squash": round(points, 1),
        "visual_tokens_over_squash": round(ratio, 2),
        "least_points": BAR_POINTS,
        "most_tokens": BAR_TOKENS,
        "met": points >= BAR_POINTS and ratio <= BAR_TOKENS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=count, default=50, help="of each size")
    parser.add_argument("--detail", default="low", choices=("low", "high", "auto"))
    parser.add_argument("--url", help="of a running service")
    parser.add_argument("--out", type=Path, help="write the report as JSON here too")
    given = parser.parse_args()
    with service(given.url) as url:
        report = measure(url, given.pages, given.detail)
    tell(report, given.out)


if __name__ == "__main__":
    main()
