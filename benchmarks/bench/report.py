"""Write a run's report as JSON and as one picture."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bench.summary import KINDS

COLOURS = {"naive": "#9aa5b1", "litserve": "#c28f5c", "triton": "#7a8fc9", "glimpse": "#1b998b",
           "glimpse-no-cache": "#e0567a", "glimpse-no-scheduler": "#8e6bbf", "glimpse-no-fidelity": "#5b5b5b",
           "glimpse-no-reuse": "#d1b13c", "fifo": "#7a8fc9", "glimpse-door": "#14675a",
           "fifo-door": "#46578c", "glimpse-no-limit": "#b07a4f"}  # fmt: skip
LATENCIES = ("first_token_ms", "inter_token_ms", "end_to_end_ms")
LEGEND_COLUMNS = 4  # more columns are wider than a picture of three workloads


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write `path`.json and a picture of the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    if report.get("marks"):
        draw_soak(path.with_suffix(".png"), report)
    elif report.get("runs"):
        draw(path.with_suffix(".png"), report)


def table(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per workload and system: medians over the rounds, sums of requests, each round's requests/s."""
    rows = []
    for workload, system in dict.fromkeys((run["workload"], run["system"]) for run in runs):
        rounds = [run["figures"] for run in runs if (run["workload"], run["system"]) == (workload, system)]
        row = {"workload": workload, "system": system, "rounds": len(rounds)}
        for key in ("requests_per_s", "tokens_per_s", "goodput_per_s"):
            row[key] = statistics.median(figures[key] for figures in rounds)
        for kind in KINDS:
            for what in ("requests", "answered", "in_time"):
                row[f"{kind}_{what}"] = sum(figures["by_kind"][kind][what] for figures in rounds)
        row["requests_per_s_rounds"] = [figures["requests_per_s"] for figures in rounds]
        for key in LATENCIES:
            for percentile in ("p50", "p95", "p99"):
                found = [figures[key][percentile] for figures in rounds if percentile in (figures[key] or {})]
                row[f"{key}_{percentile}"] = statistics.median(found) if found else None
        row["cpu_ms_a_request"] = statistics.median(figures["cpu_ms_a_request"]["all"] for figures in rounds)
        row["memory_mb"] = max(figures["memory_mb"]["all"] for figures in rounds)
        rows.append(row)
    return rows


def text(report: Mapping[str, Any]) -> str:
    """Format the report for the terminal."""
    lines = [
        f"{'workload':30} {'system':22} {'req/s':>8} {'first p50':>10} {'e2e p50':>9} {'e2e p95':>9} {'CPU ms':>8} "
        f"{'in time/s':>9} {'of new images':>14} {'of follow-ups':>14}"
    ]
    for row in report.get("table", []):
        lines.append(
            f"{row['workload']:30} {row['system']:22} {row['requests_per_s']:8.2f} "
            f"{row['first_token_ms_p50'] or 0:10.1f} "
            f"{row['end_to_end_ms_p50'] or 0:9.1f} {row['end_to_end_ms_p95'] or 0:9.1f} {row['cpu_ms_a_request']:8.1f} "
            f"{row['goodput_per_s']:9.2f} {in_time(row, 'new'):>14} {in_time(row, 'follow_up'):>14}"
        )
    for workload, roles in report.get("profile", {}).items():
        parts = (f"{role} {ms['spent_ms']:.1f} ({ms['bare_ms']:.1f})" for role, ms in roles.items())
        lines.append(f"core ms per answer of glimpse, {workload} (bare engines): {', '.join(parts)}")
    for verdict in report.get("verdict", []):
        met = "met    " if verdict["met"] else "NOT met"
        found = "-" if verdict["found"] is None else verdict["found"]
        lines.append(f"{met} {verdict['promise']}: {found} ({verdict['wanted']}, {verdict['by']}) {verdict['note']}")
    return "\n".join(lines)


def in_time(row: Mapping[str, Any], kind: str) -> str:
    """Say how many requests of this kind were answered in time, and of how many."""
    return f"{row[f'{kind}_in_time']}/{row[f'{kind}_requests']}"


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Draw throughput, latency and CPU of each system and workload: median and range of the rounds."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    runs = report["runs"]
    workloads = list(dict.fromkeys(run["workload"] for run in runs))
    systems = list(dict.fromkeys(run["system"] for run in runs))
    panels = [
        ("answers per second\n(more is better)", lambda figures: figures["requests_per_s"]),
        ("first token, median, ms\n(less is better)", lambda figures: (figures["first_token_ms"] or {}).get("p50")),
        ("whole answer, p95, ms\n(less is better)", lambda figures: (figures["end_to_end_ms"] or {}).get("p95")),
        ("CPU time per answer, ms\n(less is better)", lambda figures: figures["cpu_ms_a_request"]["all"]),
    ]
    if any(len(run["figures"]["outcomes"]) > 1 for run in runs):  # the other panels leave refused requests out
        panels.insert(1, ("answers in time per second\n(more is better)", lambda figures: figures["goodput_per_s"]))
    width = max(7.0, 1.2 * len(workloads) * max(1.5, 0.45 * len(systems)))
    figure, axes = plt.subplots(len(panels), 1, figsize=(width, 2.3 * len(panels) + 0.8), layout="constrained")
    bar = 0.8 / len(systems)
    for axis, (title, value) in zip(axes, panels, strict=True):
        top = 0.0
        for number, system in enumerate(systems):
            for place, workload in enumerate(workloads):
                found = [
                    value(run["figures"]) for run in runs if (run["workload"], run["system"]) == (workload, system)
                ]
                found = [each for each in found if each is not None]
                if not found:
                    continue
                at = place + (number - (len(systems) - 1) / 2) * bar
                height = statistics.median(found)
                top = max(top, *found)
                axis.bar(at, height, bar * 0.92, color=COLOURS[system])
                if len(found) > 1:
                    span = [[height - min(found)], [max(found) - height]]
                    axis.errorbar(at, height, yerr=span, color="#222222", linewidth=1, capsize=2)
                said = f"{height:,.0f}" if height >= 100 else f"{height:.3g}"
                behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # the limit's line may cross the text
                axis.annotate(said, (at, max(found)), ha="center", va="bottom", fontsize=7, bbox=behind)
        for place, workload in enumerate(workloads):
            if (most := limit_of(report, workload)) is not None and title.startswith("answers per"):
                axis.hlines(most, place - 0.45, place + 0.45, colors="#222222", linestyles="dashed", linewidth=1)
                axis.annotate("bare engines", (place - 0.45, most), ha="left", va="bottom", fontsize=7)
                top = max(top, most)
        axis.set_ylim(0, top * 1.18 or 1)
        axis.set_xticks(range(len(workloads)), [spoken(workload) for workload in workloads], fontsize=8)
        axis.set_ylabel(title, fontsize=8)
        axis.tick_params(axis="y", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[system]) for system in systems]
    figure.legend(
        handles, systems, loc="outside lower center", ncols=min(len(systems), LEGEND_COLUMNS), fontsize=9, frameon=False
    )
    rounds = max(run["round"] for run in runs)
    spread = f"bars: median of {rounds} rounds in turn, whiskers: their range" if rounds > 1 else "one round"
    figure.suptitle(f"{report['title']}\n{report['machine']['cpus']} cores of {report['machine']['cpu']}; {spread}",
                    fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_soak(path: Path, report: Mapping[str, Any]) -> None:
    """Draw each process's memory and the answers per second, slice by slice."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    marks, runs = report["marks"], report["runs"]
    minutes = [(number + 1) * report["slice_s"] / 60 for number in range(len(marks))]
    figure, (memory, answers) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    for role in sorted(marks[-1]["memory_mb"], key=marks[-1]["memory_mb"].get, reverse=True):
        held = [mark["memory_mb"].get(role) for mark in marks]
        memory.plot(minutes, held, label=f"{role}, {held[-1]:.0f} MB at the end")
    memory.set_ylabel("memory of a process, MB")
    memory.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    for workload in dict.fromkeys(run["workload"] for run in runs):
        own = [(at, run["figures"]) for at, run in zip(minutes, runs, strict=True) if run["workload"] == workload]
        answers.plot([at for at, _ in own], [figures["requests_per_s"] for _, figures in own], "o-", markersize=3,
                     label=spoken(workload).replace("\n", " "))  # fmt: skip
    answers.set_ylabel("answers per second")
    answers.set_xlabel("minutes")
    answers.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7, frameon=False)
    for axis in (memory, answers):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['title']}; {cancelled_share(runs):.1%} of the requests were cancelled", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cancelled_share(runs: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of all requests whose client hung up."""
    ended = sum((Counter(run["figures"]["outcomes"]) for run in runs), Counter[str]())
    return ended["cancelled"] / max(ended.total(), 1)


def spoken(workload: str) -> str:
    """Write a workload's label in words, on two lines."""
    shape, _, arrivals = workload.partition(", ")
    words = {
        "mixed_50_50": "half new images,\nhalf follow-ups",
        "mixed_75_25": "4 new images to\n12 follow-ups",
        "cold": "new images",
        "follow_up": "follow-ups",
        "repeat": "images that come again",
        "same": "one image, again and again",
    }
    return f"{words.get(shape, shape)}\n{arrivals}"


def limit_of(report: Mapping[str, Any], workload: str) -> float | None:
    """Return the bare engine limit of a workload, or None if it was not measured."""
    limits = (report.get("engine") or {}).get("requests_per_s", {})
    return limits.get(workload.partition(",")[0])
