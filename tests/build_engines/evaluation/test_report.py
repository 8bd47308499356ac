"""The report's page needs nothing but itself, and fits a telephone."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest
from PIL import Image
from playwright.async_api import async_playwright

from build_engines.evaluation.report import MOST_BARS, MOST_WRONG, Run, as_json, as_markdown, as_page, thumbnail
from build_engines.evaluation.scoring import Answered, score
from tests.support.fakes import png

VISION = {"vision_tokens": 100, "visual_tokens": 32, "detail": "low", "reduced": True}
HOSTILE = '<script>alert("x")</script>'


def run_of(folder: Path, **changed: object) -> Run:
    settings = {
        "form": "jsonl",
        "file": "questions.jsonl",
        "folder": folder,
        "model": {"id": "m"},
        "command": "glimpse eval --dataset .",
        "asked": {"prompt": "{question}", "limit": None},
        "read": 100,
        "skipped": {"image missing": ["x.png: question 1"]},
        "failures": {"too late": 2},
    }
    return Run(**settings | changed)


def wrong(folder: Path, many: int) -> list[Answered]:
    (folder / "a.png").write_bytes(png())
    return [
        Answered(
            "a.png" if number == 0 else f"{number}.png",
            HOSTILE,
            "w" * 200,
            ("yes",),
            {"type": (f"type {number % 30}",)},
            {"vision": VISION, "timing_ms": {"total": 5.0}, "model": "m", "confidence": 0.5},
        )
        for number in range(many)
    ]


def test_report_json_says_what_was_measured_and_how(tmp_path: Path) -> None:
    told = wrong(tmp_path, 4)
    report = as_json(run_of(tmp_path), told, score("jsonl", told))
    assert report["counts"] == {"read": 100, "answered": 4, "failed": 2, "skipped": {"image missing": 1}}
    assert report["asked"] == {"prompt": "{question}"}
    assert report["answers"] == {
        "models": ["m"],
        "mean_vision_tokens": 100,
        "mean_visual_tokens": 32,
        "looked_closer": 0,
        "reduced_by_load": 4,
        "median_ms": 5.0,
    }
    assert report["metrics"]["exact match"]["value"] == 0.0


def test_tables_are_bounded_and_say_what_they_leave_out(tmp_path: Path) -> None:
    told = wrong(tmp_path, 60)
    scores = score("jsonl", told)
    assert f"{30 - MOST_BARS} more in report.json" in as_markdown(scores)
    page = as_page(run_of(tmp_path), told, scores)
    assert f"{30 - MOST_BARS} rarer types are in report.json" in page
    assert f"Telling wrong answers: {MOST_WRONG} of 60" in page
    assert "looked less closely at 60 questions" in page


def test_a_file_that_is_no_image_has_no_thumbnail(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png()[:40])
    assert (thumbnail(tmp_path / "a.png"), thumbnail(tmp_path / "gone.png")) == ("", "")


def test_an_image_with_broken_metadata_does_not_end_the_report(tmp_path: Path) -> None:
    """It is to be turned, and its camera's maker is a number. The service reads such a file."""
    turned, maker = struct.pack("<HHII", 0x112, 3, 1, 6), struct.pack("<HHIf", 0x10F, 11, 1, 1.0)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + turned + maker + bytes(4)
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert thumbnail(tmp_path / "a.jpg") == ""


@pytest.mark.needs("chromium")
@pytest.mark.slow
async def test_the_page_asks_no_host_and_fits_a_telephone_in_light_and_dark(tmp_path: Path) -> None:
    told = wrong(tmp_path, 60)
    path = tmp_path / "report.html"
    path.write_text(as_page(run_of(tmp_path), told, score("jsonl", told)))
    requests: list[str] = []
    faults: list[str] = []
    papers = []
    async with async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = await browser.new_page(viewport={"width": 360, "height": 800}, color_scheme=scheme)
            page.on("request", lambda request: requests.append(request.url))
            page.on("console", lambda message: faults.append(message.text))
            page.on("dialog", lambda dialog: faults.append(dialog.message))
            await page.goto(path.as_uri())
            assert await page.evaluate("document.documentElement.scrollWidth") == 360
            assert await page.evaluate("document.querySelector('img').naturalWidth") > 0
            papers.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        await browser.close()
    assert set(requests) == {path.as_uri()}  # images that stand in the page itself are no requests
    assert faults == []
    assert len(set(papers)) == 2
