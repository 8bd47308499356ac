"""Write down what was measured on a dataset: JSON, a Markdown table, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from PIL import Image, ImageOps

from build_engines.evaluation.scoring import CAPTIONS, RIGHT_AT, Answered, Line, Scores, telling

MOST_WRONG = 24  # in the gallery
MOST_BARS = 20  # of one typing
MOST_LISTED = 200  # of what was skipped for one reason
THUMBNAIL = (320, 320)  # pixels
THUMBNAIL_QUALITY = 70
CIDER_ONES = 10.0  # CIDEr-D goes from 0 to 10

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6570; --paper: #fbfbfa; --card: #fff; --line: #dfe2e6;
  --bar: #3d6fb4; --whisker: #1b1f24; --bad: #a8322a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --soft: #9aa4ae; --paper: #14171a; --card: #1d2125;
  --line: #343a41; --bar: #6d9fe0; --whisker: #f3f4f6; --bad: #f08a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p, dd, summary { overflow-wrap: anywhere; } .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; } th.wide { width: 55%; }
.scroll { overflow-x: auto; } details { margin: .5rem 0; } .cards + details { margin-top: 1.5rem; }
.track { position: relative; height: .7rem; margin: .2rem 0; background: var(--line); border-radius: 3px; }
.track b { position: absolute; inset: 0 auto 0 0; background: var(--bar); border-radius: 3px; }
.track i { position: absolute; top: 50%; height: 2px; margin-top: -1px; background: var(--whisker); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .7rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
figure img { display: block; width: 100%; height: 12rem; object-fit: contain; background: var(--line); }
figcaption { font-size: .9rem; margin-top: .5rem; overflow-wrap: anywhere; } figcaption p { margin: .15rem 0; }
.said { color: var(--bad); font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; } dt { color: var(--soft); }
dd { margin: 0; } code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; }
  th.wide { width: auto; } th, td { font-size: .9rem; padding-right: .4rem; } th.images, td.images { display: none; } }
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured, and how. `skipped` has places by reason, `failures` how many by reason."""

    form: str
    file: str
    folder: Path  # the images' names start here
    model: Mapping[str, Any]
    command: str
    asked: Mapping[str, Any]
    read: int  # entries of the file
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)
    failures: Mapping[str, int] = field(default_factory=dict)


def as_json(run: Run, answered: Sequence[Answered], scores: Scores) -> dict[str, Any]:
    """The content of report.json. Scores are shares from 0 to 1, CIDEr-D goes to 10."""
    return {
        "format": run.form,
        "file": run.file,
        "model": dict(run.model),
        "command": run.command,
        "asked": {name: value for name, value in run.asked.items() if value is not None},
        "metrics": {line.name: line.as_json() for line in scores.metrics},
        "by": {typing: {line.name: line.as_json() for line in lines} for typing, lines in scores.by.items()},
        "counts": {
            "read": run.read,
            "answered": len(answered),
            "failed": sum(run.failures.values()),
            "skipped": {reason: len(places) for reason, places in run.skipped.items()},
        },
        "answers": seen(answered),
        "failures": dict(run.failures),
        "skipped": {reason: list(places[:MOST_LISTED]) for reason, places in run.skipped.items()},
    }


def seen(answered: Sequence[Answered]) -> dict[str, Any]:
    """How the service looked and how long it took, over all answers; what no answer tells is left out."""
    records = [one.record for one in answered]
    vision = [record["vision"] for record in records if isinstance(record.get("vision"), Mapping)]
    totals = [record["timing_ms"]["total"] for record in records if isinstance(record.get("timing_ms"), Mapping)]
    models = sorted({str(record["model"]) for record in records if "model" in record})
    found: dict[str, Any] = {"models": models} if models else {}
    if vision:
        found |= {
            "mean_vision_tokens": round(fmean(each["vision_tokens"] for each in vision), 1),
            "mean_visual_tokens": round(fmean(each["visual_tokens"] for each in vision), 1),
            "looked_closer": sum(each["detail"] == "high" for each in vision),
            "reduced_by_load": sum(bool(each["reduced"]) for each in vision),
        }
    if totals:
        found["median_ms"] = round(median(totals), 1)
    return found


def as_markdown(scores: Scores) -> str:
    """The figures as a table."""
    lines = ["| | questions | figure | 95 % interval |", "|---|---|---|---|"]
    for typing, group in [("", scores.metrics), *((f"{typing}: ", group) for typing, group in scores.by.items())]:
        lines += [
            f"| {typing}{line.name} | {line.questions} | {line.figure.value:.3f} | "
            f"{line.figure.low:.3f} to {line.figure.high:.3f} |"
            for line in group[:MOST_BARS]
        ]
        if len(group) > MOST_BARS:
            lines.append(f"| {typing}{len(group) - MOST_BARS} more in report.json | | | |")
    return "\n".join(lines)


def as_page(run: Run, answered: Sequence[Answered], scores: Scores) -> str:
    """A page of HTML without scripts or outside hosts, readable on a telephone, light and dark."""
    name = str(run.model.get("id", "the model"))
    title = f"{name} on {Path(run.file).name}"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f'<p class="soft">{escape(_summary(run, answered))}</p>',
            *(f"<p>{escape(warning)}</p>" for warning in _warnings(run, answered)),
            "<h2>Result</h2>",
            _table(scores.metrics, "metric"),
            *(_by_type(typing, lines) for typing, lines in scores.by.items()),
            *_gallery(run, answered, scores),
            *_skipped(run),
            "<h2>Settings</h2>",
            _settings(run, answered),
            "</body></html>\n",
        ]
    )


def _summary(run: Run, answered: Sequence[Answered]) -> str:
    images = len({one.image for one in answered})
    skipped = sum(map(len, run.skipped.values()))
    return (
        f"{len(answered):,} answers about {images:,} images. {skipped:,} records or images skipped, "
        f"{sum(run.failures.values()):,} questions failed; neither counts as a wrong answer."
    )


def _warnings(run: Run, answered: Sequence[Answered]) -> Iterator[str]:
    found = seen(answered)
    if reduced := found.get("reduced_by_load"):
        yield f"The service was busy and looked less closely at {reduced:,} questions than it would at rest."
    if len(found.get("models", ())) > 1:
        yield f"Several models answered: {', '.join(found['models'])}."
    if run.failures:
        yield "Some questions failed. The same command asks them again."


def _table(lines: Sequence[Line], heading: str) -> str:
    rows = "".join(
        f"<tr><td>{escape(line.name)}{_bar(line)}</td><td class=n>{line.figure.value:.3f}</td>"
        f"<td class=n>{line.figure.low:.3f}–{line.figure.high:.3f}</td><td class=n>{line.questions:,}</td>"
        f'<td class="n images">{line.images:,}</td></tr>'
        for line in lines
    )
    return (
        f"<div class=scroll><table><thead><tr><th class=wide>{escape(heading)}</th><th class=n>figure</th>"
        "<th class=n>95 % interval</th><th class=n>asked</th>"
        f'<th class="n images">images</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _bar(line: Line) -> str:
    """The figure as a bar, its interval as a line across the bar's end."""
    ones = CIDER_ONES if line.name == "CIDEr-D" else 1.0
    value, low, high = (100 * each / ones for each in (line.figure.value, line.figure.low, line.figure.high))
    return (
        f'<div class=track aria-hidden="true"><b style="width:{value:.1f}%"></b>'
        f'<i style="left:{low:.1f}%;width:{max(0.4, high - low):.1f}%"></i></div>'
    )


def _by_type(typing: str, lines: Sequence[Line]) -> str:
    more = len(lines) - MOST_BARS
    rest = f'<p class="soft">{more} rarer types are in report.json.</p>' if more > 0 else ""
    return f"<h2>By {escape(typing)}</h2>{_table(lines[:MOST_BARS], typing)}{rest}"


def _gallery(run: Run, answered: Sequence[Answered], scores: Scores) -> Iterator[str]:
    """The most telling wrong answers; of captions, those furthest from people's."""
    if run.form == CAPTIONS:
        places = sorted(range(len(answered)), key=lambda place: scores.each[place])[:MOST_WRONG]
        heading = "Captions furthest from people's"
    else:
        places = telling(answered, scores, MOST_WRONG)
        wrong = sum(score < RIGHT_AT for score in scores.each)
        heading = f"Telling wrong answers: {len(places)} of {wrong:,}"
    if places:
        cards = "".join(_card(run, answered[place], scores.each[place]) for place in places)
        yield f"<h2>{escape(heading)}</h2><div class=cards>{cards}</div>"


def _card(run: Run, one: Answered, score: float) -> str:
    picture = thumbnail(run.folder / one.image)
    shown = f'<img src="{picture}" alt="{escape(one.image)}">' if picture else ""
    sure = one.record.get("confidence")
    facts = [f"score {score:.2f}", *([f"confidence {sure:.2f}"] if isinstance(sure, float) else ()), one.image]
    accepted = "; ".join(dict.fromkeys(one.answers))
    return (
        f"<figure>{shown}<figcaption><p>{escape(one.question)}</p>"
        f"<p class=said>{escape(one.said) or '(an empty answer)'}</p><p>right: {escape(accepted)}</p>"
        f'<p class="soft">{escape(", ".join(facts))}</p></figcaption></figure>'
    )


def thumbnail(path: Path) -> str:
    """A small JPEG as a data: URL; an empty text for a file that cannot be drawn."""
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", THUMBNAIL)
            image = ImageOps.exif_transpose(opened).convert("RGB")
        image.thumbnail(THUMBNAIL)
        output = io.BytesIO()
        image.save(output, "JPEG", quality=THUMBNAIL_QUALITY)
    except Exception:  # metadata that is broken makes Pillow raise almost anything
        return ""
    return f"data:image/jpeg;base64,{base64.b64encode(output.getvalue()).decode()}"


def _skipped(run: Run) -> Iterator[str]:
    for reason, places in run.skipped.items():
        items = "".join(f"<li>{escape(place)}</li>" for place in places[:MOST_LISTED])
        more = f"<li>and {len(places) - MOST_LISTED:,} more</li>" if len(places) > MOST_LISTED else ""
        yield (
            f"<details><summary>Skipped, {escape(reason)}: {len(places):,}</summary><ul>{items}{more}</ul></details>"
        )
    for reason, many in run.failures.items():
        yield f"<p>Failed: {many:,}: {escape(reason)}</p>"


def _settings(run: Run, answered: Sequence[Answered]) -> str:
    told = {
        "command": run.command,
        "questions": run.file,
        "format": run.form,
        "model": run.model,
        **{name: value for name, value in run.asked.items() if value is not None},
        **{name.replace("_", " "): value for name, value in seen(answered).items()},
    }
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd><code>{escape(_plain(value))}</code></dd>" for name, value in told.items()
    )
    return f"<dl>{rows}</dl>"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
