"""Draw the main panels of Grafana's dashboards without Grafana, from the data of a Prometheus.

    python -m benchmarks.dashboards --prometheus http://127.0.0.1:9090 --seconds 90 --out docs/dashboards.png

The queries are those of deploy/grafana/content.py.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl

from deploy.grafana.content import DASHBOARDS
from deploy.grafana.panels import CPU_PRICE, DEFAULT_CPU_PRICE, Panel, Query

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

MAIN = (
    ("glimpse-overview", "Questions by outcome"),
    ("glimpse-overview", "Time to first token"),
    ("glimpse-request-life", "Mean time in each stage"),
    ("glimpse-vision", "Feature lookups by tier"),
    ("glimpse-vision", "Vision tokens an image"),
    ("glimpse-llm", "Sequences"),
    ("glimpse-llm", "Between two tokens"),
    ("glimpse-capacity", "CPU cores in use"),
    ("glimpse-capacity", "Time in models, a thousand answers"),
)
STEP_S = 1
RATE_INTERVAL = "10s"  # the Prometheus of a short run scrapes every second

Series = dict[str, list[tuple[float, float]]]


def panel_of(uid: str, title: str) -> Panel:
    (found,) = [
        panel for each in DASHBOARDS if each.uid == uid for panel in each.panels if panel.title == title
    ]  # fmt: skip
    return found


def legend(query: Query, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), query.legend).strip()


def read(client: httpx.Client, panel: Panel, seconds: int) -> Series:
    """The panel's series over the last seconds: legend -> (seconds since the start, value)."""
    end = time.time()
    found: Series = {}
    for query in panel.queries:
        expression = query.expression.replace("$__rate_interval", RATE_INTERVAL)
        expression = expression.replace(f"${CPU_PRICE}", DEFAULT_CPU_PRICE)
        asked = {"query": expression, "start": end - seconds, "end": end, "step": STEP_S}
        answer: dict[str, Any] = client.post("/api/v1/query_range", data=asked).raise_for_status().json()
        for each in answer["data"]["result"]:
            points = [(float(at) - end + seconds, float(value)) for at, value in each["values"]]
            if any(value > 0 for _, value in points):  # NaN is not, nor what is always zero
                found[legend(query, each["metric"])] = points
    return found


def draw(axes: Axes, panel: Panel, found: Series) -> None:
    units = {"s": "s", "reqps": "/s", "ops": "/s"}
    axes.set_title(f"{panel.title}{f' [{units[panel.unit]}]' if panel.unit in units else ''}", fontsize=9, loc="left")
    if panel.kind == "stacked":
        moments = sorted({round(at) for points in found.values() for at, _ in points})
        rows = [{round(at): value for at, value in points if math.isfinite(value)} for points in found.values()]
        heights = [[row.get(moment, 0.0) for moment in moments] for row in rows]
        axes.stackplot(moments, heights, labels=list(found), alpha=0.75)
    else:
        for name, points in found.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    axes.set_ylim(0, 1.4 * max(axes.get_ylim()[1], 1e-3))  # room for the legend
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.2)
    if found:
        columns = 3 if max(map(len, found)) < 12 else 2
        axes.legend(fontsize=6, loc="upper left", framealpha=0.7, ncols=columns).set_in_layout(False)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--prometheus", default="http://127.0.0.1:9090")
    options.add_argument("--seconds", type=int, default=90)
    options.add_argument("--out", type=Path, default=Path("docs/dashboards.png"))
    given = options.parse_args()
    figure, grid = plt.subplots(3, 3, figsize=(12, 7.2), constrained_layout=True)
    with httpx.Client(base_url=given.prometheus, timeout=30) as client:
        for axes, (uid, title) in zip(grid.flat, MAIN, strict=True):
            panel = panel_of(uid, title)
            draw(axes, panel, read(client, panel, given.seconds))
    for axes in grid[-1]:
        axes.set_xlabel("seconds", fontsize=7)
    figure.savefig(given.out, dpi=80)


if __name__ == "__main__":
    main()
