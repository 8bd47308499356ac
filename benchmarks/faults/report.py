"""Write a campaign's report as JSON and as one picture."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.clients import FORGOTTEN, OK, Entry
from benchmarks.faults.invariants import READY_S, RECOVER_S, RESTART_S, Episode, Records, Violation

MOST_TOLD = 40  # violations in the terminal; the report has all
SLICE_S = 5.0  # of the timeline
COLOURS = {"a": "#1b998b", "b": "#7a8fc9"}
FAILED = "#e0567a"


@dataclass(frozen=True, slots=True)
class Run:
    """What was run, for the report's head."""

    seed: int
    count: int
    machine: Mapping[str, Any]
    left_out: Mapping[str, str]  # kinds of faults that could not be caused here, and why
    began: float  # monotonic seconds


def report(run: Run, records: Records, violations: Sequence[Violation]) -> dict[str, Any]:
    """Return everything that is published. Times are seconds since the load began."""
    outcomes = Counter(entry.outcome for entry in records.entries)
    return {
        "title": f"{len(records.episodes)} faults, seed {run.seed}",
        "machine": dict(run.machine),
        "seed": run.seed,
        "count": len(records.episodes),
        "asked_for": run.count,
        "left_out": dict(run.left_out),
        "limits_s": {"ready": READY_S, "recovery": RECOVER_S, "recovery with a start": RESTART_S},
        "limits_times": records.patience,
        "duration_s": round(records.ended - run.began, 1),
        "requests": len(records.entries),
        "outcomes": dict(outcomes.most_common()),
        "violations": [
            {
                "invariant": each.invariant,
                "at": round(each.at - run.began, 2),
                "fault": each.episode,
                "what": each.message,
            }
            for each in violations
        ],
        "kinds": kinds(records),
        "faults": [_fault(run, records, episode) for episode in records.episodes],
        "timeline": timeline(run, records),
    }


def kinds(records: Records) -> dict[str, dict[str, Any]]:
    """Return, by kind of fault, how often it came, what failed and how long the recovery took."""
    found: dict[str, dict[str, Any]] = {}
    for kind in sorted({episode.kind for episode in records.episodes}):
        own = [episode for episode in records.episodes if episode.kind == kind]
        took_s = [episode.recovered - episode.healed for episode in own if episode.recovered is not None]
        found[kind] = {
            "count": len(own),
            "requests_meanwhile": sum(sum(map(episode.overlaps, records.entries)) for episode in own),
            "failures_allowed": sum(_touched(records, episode) for episode in own),
            "failures_seen": sum(_failed(records, episode) for episode in own),
            "triton_restarts": sum(bool(episode.restarted) for episode in own),
            "recovery_p50_s": round(statistics.median(took_s), 2) if took_s else None,
            "recovery_max_s": round(max(took_s), 2) if took_s else None,
            "limit_s": max(episode.limit_s for episode in own),
        }
    return found


def timeline(run: Run, records: Records) -> dict[str, Any]:
    """Return answers and failures of each gateway by slices of SLICE_S."""
    slices = int((records.ended - run.began) / SLICE_S) + 1
    found: dict[str, Any] = {"slice_s": SLICE_S}
    for gateway in records.starts:
        answered, failed = [0] * slices, [0] * slices
        for entry in records.entries:
            if entry.gateway == gateway and entry.outcome != FORGOTTEN:
                into = answered if entry.outcome == OK else failed
                into[int((entry.ended - run.began) / SLICE_S)] += 1
        found[gateway] = {"answered": answered, "failed": failed}
    return found


def _fault(run: Run, records: Records, episode: Episode) -> dict[str, Any]:
    recovered_s = None if episode.recovered is None else round(episode.recovered - episode.healed, 2)
    return {
        "kind": episode.kind,
        "target": episode.harm.target,
        "at": round(episode.begun - run.began, 1),
        "lasted_s": round(episode.healed - episode.begun, 2),
        "recovery_s": recovered_s,
        "triton_restarted": sorted(episode.restarted),
        "failed": _failed(records, episode),
    }


def _touched(records: Records, episode: Episode) -> int:
    """Count the requests that the fault could have failed."""
    return sum(episode.touches(entry.gateway) and episode.overlaps(entry) for entry in records.entries)


def _failed(records: Records, episode: Episode) -> int:
    """Count the requests that failed by this fault: it explains them, or no fault does and it was the latest."""
    failed = [entry for entry in records.entries if entry.outcome not in (OK, FORGOTTEN) and episode.overlaps(entry)]
    return sum(
        episode.may_fail(entry)
        or (not any(each.may_fail(entry) for each in records.episodes) and _latest(records, entry) is episode)
        for entry in failed
    )


def _latest(records: Records, entry: Entry) -> Episode:
    return max((each for each in records.episodes if each.begun <= entry.ended), key=lambda each: each.begun)


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write `path`.json and `path`.png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(
        json.dumps(found, indent=None, separators=(",", ": ")).replace("},{", "},\n{") + "\n"
    )
    draw(path.with_suffix(".png"), found)


def text(found: Mapping[str, Any]) -> str:
    """Format the report for the terminal."""
    lines = [f"{'fault':34} {'count':>5} {'allowed':>8} {'failed':>7} {'restarts':>8} {'p50 s':>6} {'max s':>6}"]
    for kind, row in found["kinds"].items():
        lines.append(
            f"{kind:34} {row['count']:5} {row['failures_allowed']:8} {row['failures_seen']:7} "
            f"{row['triton_restarts']:8} {row['recovery_p50_s'] or 0:6.2f} {row['recovery_max_s'] or 0:6.2f}"
        )
    lines += [f"left out: {kind} ({why})" for kind, why in found["left_out"].items()]
    lines.append(f"{found['requests']} requests in {found['duration_s']:g} s: {found['outcomes']}")
    lines += [
        f"VIOLATED at {each['at']:.1f} s, fault {each['fault']}: {each['invariant']}: {each['what']}"
        for each in found["violations"][:MOST_TOLD]
    ]
    lines.append("every invariant holds" if not found["violations"] else f"{len(found['violations'])} violations")
    return "\n".join(lines)


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Draw answers and failures over time, the faults as marks, and the recovery of each kind."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    names = list(found["kinds"])
    figure, (load, marks) = plt.subplots(
        2,
        1,
        figsize=(11, 3.2 + 0.22 * len(names)),
        height_ratios=(2, 0.22 * len(names) + 0.6),
        sharex=True,
        layout="constrained",
    )
    timed = found["timeline"]
    for gateway in sorted(set(timed) - {"slice_s"}):
        series = timed[gateway]
        at = [(number + 0.5) * timed["slice_s"] / 60 for number in range(len(series["answered"]))]
        load.step(at, [each / timed["slice_s"] for each in series["answered"]], where="mid", linewidth=0.9,
                  color=COLOURS[gateway], label=f"answers of gateway {gateway}")  # fmt: skip
    failed = [sum(each) / timed["slice_s"] for each in zip(*(timed[name]["failed"] for name in COLOURS), strict=True)]
    load.fill_between(at, failed, step="mid", color=FAILED, label="failures of both")
    load.set_ylabel("requests per second", fontsize=8)
    load.set_ylim(bottom=0)
    load.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3, fontsize=8, frameon=False)
    for fault in found["faults"]:
        row = names.index(fault["kind"])
        begun, lasted = fault["at"] / 60, (fault["lasted_s"] + (fault["recovery_s"] or 0)) / 60
        marks.barh(row, lasted, left=begun, height=0.7, color=FAILED if fault["failed"] else "#9aa5b1")
    labels = [
        f"{name} ({found['kinds'][name]['count']}; {found['kinds'][name]['recovery_max_s'] or 0:.1f} s)"
        for name in names
    ]
    marks.set_yticks(range(len(names)), labels, fontsize=7)
    marks.invert_yaxis()
    marks.set_xlabel("minutes; a bar lasts from the fault to the recovery, red if requests failed", fontsize=8)
    for axis in (load, marks):
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    machine = found["machine"]
    figure.suptitle(
        f"{found['title']}, {found['requests']:,} requests, {len(found['violations'])} violations; "
        f"{machine['cpus']} cores of {machine['cpu']}\nkind of fault (how many; longest recovery)", fontsize=9
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)
