"""Plot an ablation's JSON on one page.

Colours are Okabe and Ito's (2008), and every line has its own marker.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.ablation.arms import (
    ADAPTIVE,
    AUTO,
    BUDGETS,
    CLOSER_BUDGETS,
    CLOSER_MOST,
    HIGH,
    LOW,
    POLICIES,
    detail,
    fixed,
    visual,
)
from benchmarks.ablation.report import ALL, READ, WITHOUT_READ, Json
from build_engines.scenes.held_out import NEW, SMALL
from build_engines.scenes.questions import TYPES
from build_engines.train.selection import GUIDED

INK, PALE = "#1a1a1a", "#767676"
LOOKS = {
    GUIDED: ("#0072B2", "o", "-"),
    "participatory": ("#56B4E9", "D", "--"),
    "perspectival": ("#009E73", "s", "--"),
    "propositional": ("#E69F00", "^", "--"),
    "random": ("#D55E00", "x", ":"),
    "uniform": ("#CC79A7", "+", ":"),
    "centre": ("#000000", "v", ":"),
}
NAMES = {
    GUIDED: "relevance: all three ways, weighed",
    "participatory": "participatory alone",
    "perspectival": "perspectival alone",
    "propositional": "propositional alone",
    "random": "random",
    "uniform": "evenly spread",
    "centre": "centre first",
}
TITLES = {ALL: "all questions", WITHOUT_READ: "all but reading", READ: "reading"}


def page(told: Json, path: Path) -> None:
    """Write a PNG of about 1900 by 2000 pixels."""
    figure = Figure(figsize=(19, 20), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subfigures(4, 1)  # each has its own layout
    kinds = (WITHOUT_READ, READ, *(kind for kind in TYPES if kind != READ))
    above, below = rows[0].subplots(1, 4), rows[1].subplots(1, 4)
    for axes, kind in zip([*above, *below], kinds, strict=True):
        _by_vision_tokens(axes, told, kind)
    rows[0].legend(*above[0].get_legend_handles_labels(), ncols=8, loc="outside upper center", fontsize=9.5)
    visually, gains, closer = rows[2].subplots(1, 3, width_ratios=(1, 2, 1))
    _by_visual_tokens(visually, told)
    _differences(gains, told)
    _closer(closer, told)
    left, right = rows[3].subfigures(1, 2, width_ratios=(3, 1))
    deep, spent = left.subplots(1, 2, width_ratios=(1, 2))
    _small_print(deep, told)
    _spending(spent, told)
    above, below = right.subplots(2, 1)
    _cost(above, told, "latency_ms", "ms, one thread")
    _cost(below, told, "gflops", "GFLOP, counted")
    scenes = " and ".join(f"{number:,} scenes of {split.replace('_', ' ')}" for split, number in told["scenes"].items())
    questions = sum(told["questions"].values())
    figure.suptitle(
        f"{told['checkpoint']['name']} ({told['checkpoint']['fingerprint']}): {questions:,} questions about {scenes}; "
        "bars are 95 % intervals",
        fontsize=13,
    )
    figure.savefig(path)


def _bars(rows: list[Json]) -> tuple[np.ndarray, np.ndarray]:
    """Return values [n] and interval lengths down and up [2, n], in percent."""
    value, low, high = (np.array([100 * row[name] for row in rows]) for name in ("value", "low", "high"))
    return value, np.abs(np.stack([value - low, high - value]))


def _style(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, weight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _by_vision_tokens(axes: Axes, told: Json, kind: str) -> None:
    arms = told["arms"]
    for place, policy in enumerate(POLICIES):
        names = [fixed(policy, tokens).name for tokens in BUDGETS] + [fixed(policy, CLOSER_MOST, closer=True).name]
        rows = [arms[name] for name in names if name in arms and kind in arms[name]["accuracy"]]
        if not rows:
            continue
        colour, marker, line = LOOKS[policy]
        value, reach = _bars([row["accuracy"][kind] for row in rows])
        tokens = np.array([row["mean_vision_tokens"]["value"] for row in rows])
        if policy != GUIDED:  # shared points belong to guided: draw their bars once
            reach[:, np.isin([row["policy"] for row in rows], GUIDED)] = np.nan
        shift = (place - 3) * 1.2  # keeps bars from hiding each other
        axes.errorbar(
            tokens + shift, value, reach, color=colour, marker=marker, ls=line, ms=5, lw=1.3, elinewidth=0.8,
            label=NAMES[policy], zorder=3 if policy == GUIDED else 2,
        )  # fmt: skip
    row = arms[ADAPTIVE.name]
    if kind in row["accuracy"]:
        value, reach = _bars([row["accuracy"][kind]])
        axes.errorbar(
            [row["mean_vision_tokens"]["value"]], value, reach, color=LOOKS[GUIDED][0], marker="*", ms=15,
            mec="white", ls="", zorder=5, label="relevance, 64 to 256 as the question needs (mean)",
        )  # fmt: skip
    axes.set_xticks([*BUDGETS, *([CLOSER_MOST] if told["closer_view"] else [])])
    _style(axes, TITLES.get(kind, kind), "vision tokens (400: with the closer view)", "exact match, %")


def _by_visual_tokens(axes: Axes, told: Json) -> None:
    arms = told["arms"]
    asked = [visual()[0].name, ADAPTIVE.name, *(arm.name for arm in visual()[1:-1])]
    for kind, colour, marker in ((WITHOUT_READ, "#0072B2", "o"), (READ, "#D55E00", "s")):
        rows = [arms[name] for name in asked if kind in arms[name]["accuracy"]]
        if rows:
            value, reach = _bars([row["accuracy"][kind] for row in rows])
            tokens = [row["mean_visual_tokens"] for row in rows]
            axes.errorbar(tokens, value, reach, color=colour, marker=marker, label=TITLES[kind], capsize=2)
    axes.set_xticks([16, 32, 64, 96, 128])
    axes.legend(fontsize=8.5)
    _style(axes, "visual tokens", "visual tokens (queries) that the LLM reads", "exact match, %")


def _differences(axes: Axes, told: Json) -> None:
    """Plot each part's gain in points: one dot and bar per comparison, for all questions and for reading."""
    shown = {name: row for name, row in told["comparisons"].items() if name in told["shown"]}
    for place, row in enumerate(reversed(shown.values())):
        for kind, colour, marker, shift in ((ALL, "#0072B2", "o", 0.14), (READ, "#D55E00", "s", -0.14)):
            figure = row[kind]
            if figure is not None:
                reach = [[figure["value"] - figure["low"]], [figure["high"] - figure["value"]]]
                axes.errorbar(
                    [figure["value"]], [place + shift], xerr=np.abs(reach), color=colour, marker=marker, ms=5,
                    capsize=2, label=TITLES[kind] if place == 0 else None,
                )  # fmt: skip
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_xscale("symlog", linthresh=1.0, linscale=1.5)  # keeps both half a point and sixty points readable
    ticks = [-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30, 80]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_yticks(range(len(shown)), list(reversed(shown)))
    axes.legend(fontsize=8.5)
    _style(axes, "what it gains", "percentage points (paired, bootstrap over scenes)", "")


def _closer(axes: Axes, told: Json) -> None:
    wanted = [(NEW, WITHOUT_READ), (NEW, READ), (SMALL, WITHOUT_READ), (SMALL, READ)]
    details = ((LOW, "#56B4E9", "o"), (AUTO, "#009E73", "D"), (HIGH, "#D55E00", "s"))
    for shift, (level, colour, marker) in zip((-0.2, 0.0, 0.2), details, strict=True):
        places, rows = [], []
        for place, (split, kind) in enumerate(wanted):
            name = detail(split, level).name
            if name in told["arms"] and kind in told["arms"][name]["accuracy"]:
                places.append(place + shift)
                rows.append(told["arms"][name]["accuracy"][kind])
        if rows:
            value, reach = _bars(rows)
            axes.errorbar(places, value, reach, color=colour, marker=marker, ls="", capsize=3, label=f"detail {level}")
    axes.set_xticks(range(len(wanted)), [f"{split.replace('_', ' ')}\n{TITLES[kind]}" for split, kind in wanted])
    axes.legend(fontsize=8.5)
    _style(axes, "closer view", "", "exact match, %")


def _small_print(axes: Axes, told: Json) -> None:
    """Plot reading of small print with the closer view, which depends on the cells seen most closely."""
    arms = told["arms"]
    lines = [(policy, [fixed(policy, tokens, True, SMALL).name for tokens in CLOSER_BUDGETS]) for policy in POLICIES]
    for place, (policy, names) in enumerate(lines):
        rows = [arms[name] for name in names if name in arms and READ in arms[name]["accuracy"]]
        if rows:
            colour, marker, line = LOOKS[policy]
            value, reach = _bars([row["accuracy"][READ] for row in rows])
            tokens = np.array([row["mean_vision_tokens"]["value"] for row in rows]) + (place - 3) * 2
            axes.errorbar(tokens, value, reach, color=colour, marker=marker, ls=line, ms=5, lw=1.3, elinewidth=0.8)
    row = arms.get(detail(SMALL, HIGH).name)
    if row and READ in row["accuracy"]:
        value, reach = _bars([row["accuracy"][READ]])
        tokens = [row["mean_vision_tokens"]["value"]]
        axes.errorbar(tokens, value, reach, color=LOOKS[GUIDED][0], marker="*", ms=15, mec="white", ls="", zorder=5)
    axes.set_xticks(CLOSER_BUDGETS)
    _style(axes, "reading small print, closer view", "vision tokens (colours as above)", "exact match, %")


def _spending(axes: Axes, told: Json) -> None:
    spent = told["spending"][ADAPTIVE.name]
    rows = {**spent["by_type"], **spent["by_type_and_size"]}
    rows.pop(ALL, None)
    rows = dict(sorted(rows.items(), key=lambda item: (TYPES.index(item[0].split(",")[0]), "," in item[0])))
    for place, (name, row) in enumerate(rows.items()):
        whole = "," not in name
        axes.errorbar(
            [place], [row["value"]], [[row["value"] - row["low"]], [row["high"] - row["value"]]], capsize=3,
            color="#0072B2" if whole else PALE, marker="o" if whole else "s", ms=7 if whole else 5,
        )  # fmt: skip
    axes.set_xticks(range(len(rows)), list(rows), rotation=50, ha="right", rotation_mode="anchor")
    _style(axes, "what questions spend: by type, and by size of the one object asked about", "", "mean vision tokens")


def _cost(axes: Axes, told: Json, what: str, unit: str) -> None:
    cost: dict[str, Any] = told["cost"][what]
    reader = {int(name.split()[0]): row for name, row in cost["qformer"].items() if name.endswith("vision tokens")}
    value = np.array([row["value"] for row in reader.values()])
    reach = np.array([[row["value"] - row["low"], row["high"] - row["value"]] for row in reader.values()]).T
    axes.errorbar(list(reader), value, np.abs(reach), color="#0072B2", marker="o", capsize=2, label="Q-Former")
    flat = [
        ("vision_encoder", "224 view", "encoder", "#D55E00", "-"),
        ("vision_encoder", "four crops", "encoder, closer view", "#D55E00", ":"),
        ("relevance_allocator", "224 view", "allocator", "#009E73", "-"),
        ("relevance_allocator", "closer view", "allocator, closer view", "#009E73", ":"),
    ]
    for model, view, label, colour, line in flat:
        if view in cost.get(model, {}):
            axes.axhline(cost[model][view]["value"], color=colour, ls=line, label=label)
    axes.set_yscale("log")
    axes.legend(fontsize=7.5)
    _style(axes, "cost of one question", "vision tokens", unit)
