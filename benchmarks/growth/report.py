"""Tell the orders of all curves, as JSON, as text and as one picture."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.growth.curves import Curve, Found
from benchmarks.growth.order import Order, fitted

COLOURS = ("#1b998b", "#e0567a", "#7a8fc9", "#c28f5c")
STYLES = {"p95": "-", "gateway": "--", "triton": ":"}  # by the first word of a cost
TITLES = {
    "clients": "clients",
    "image_bytes": "bytes of a new image",
    "question_tokens": "tokens of the question",
    "answer_tokens": "tokens of the answer",
    "turns": "earlier turns",
    "images": "images of a request",
    "cache_entries": "entries of a full cache",
    "tenants": "tenants in rotation",
    "tenant_tables": "tables by tenant",
    "waiting_tenants": "tenants in the queue",
}
COLUMNS = 3


def summary(curve: Curve, found: Found) -> dict[str, Any]:
    """Return a curve's figures: medians and ranges of the rounds by size, and the order of each cost."""
    measures = list(found[curve.sizes[0]][0])
    rounds = {name: [[figures[name] for figures in found[size]] for size in curve.sizes] for name in measures}
    return {
        "axis": curve.axis,
        "name": curve.name,
        "counted": curve.counted,
        "holds": curve.holds,
        "sizes": list(curve.sizes),
        "median": {name: [rounded(statistics.median(each)) for each in costs] for name, costs in rounds.items()},
        "range": {name: [[rounded(min(each)), rounded(max(each))] for each in costs] for name, costs in rounds.items()},
        "order": {name: told(fitted(curve.sizes, rounds[name]), cause) for name, cause in curve.causes.items()},
    }


def told(order: Order, cause: int) -> dict[str, Any]:
    return {
        "slope": order.slope,
        "range_of_rounds" if order.is_range else "interval_95": [order.low, order.high],
        "word": order.word,
        "cause": "constant" if cause == 0 else "linear",
        "faster_than_its_cause": order.is_faster_than(cause),
    }


def spread(order: Mapping[str, Any]) -> Sequence[float]:
    """Return the ends of the slope's interval, or of the range of few rounds."""
    found: Sequence[float] = order.get("interval_95") or order["range_of_rounds"]
    return found


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def faster(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the axes that have a cost which grows faster than its cause."""
    axes = [
        curve["axis"] for curve in curves if any(order["faster_than_its_cause"] for order in curve["order"].values())
    ]
    return list(dict.fromkeys(axes))


def text(curves: Sequence[Mapping[str, Any]]) -> str:
    """Format the report for the terminal. The last line is the verdict."""
    lines = [f"{'axis':16} {'curve':38} {'cost':15} {'smallest':>9} {'largest':>9} {'slope':>7}  interval, order"]
    for curve in curves:
        for name, order in curve["order"].items():
            costs, (low, high) = curve["median"][name], spread(order)
            mark = " FASTER THAN ITS CAUSE" if order["faster_than_its_cause"] else ""
            lines.append(
                f"{curve['axis']:16} {curve['name']:38} {name:15} {costs[0]:9.4g} {costs[-1]:9.4g} "
                f"{order['slope']:7.2f}  {low:.2f} to {high:.2f}, {order['word']}{mark}"
            )
    named = ", ".join(faster(curves))
    lines.append(f"grows faster than its cause: {named}" if named else "nothing grows faster than its cause")
    return "\n".join(lines)


def draw(path: Path, report: Mapping[str, Any]) -> None:
    """Draw a panel an axis: p95 and CPU time of a request against the size, both logarithmic."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    curves = report["curves"]
    axes = list(dict.fromkeys(curve["axis"] for curve in curves))
    columns = min(COLUMNS, len(axes))
    rows = -(-len(axes) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(5.4 * columns, 4.6 * rows + 0.7), squeeze=False, layout="constrained"
    )
    for name, panel in zip(axes, panels.flat, strict=False):
        draw_axis(panel, TITLES[name], [curve for curve in curves if curve["axis"] == name])
    for panel in panels.flat[len(axes) :]:
        panel.set_visible(False)
    machine, rounds = report["machine"], report["rounds"]
    told = (
        f"Cost against size: {machine['cpus']} cores of {machine['cpu']}; median and range of {rounds} rounds. "
        "Solid: p95. Dashed: CPU of the gateway a request. Dotted: CPU of Triton a request. Grey: as fast as the size."
    )
    figure.suptitle(textwrap.fill(told, 62 * columns), fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_axis(panel: Any, title: str, curves: Sequence[Mapping[str, Any]]) -> None:
    lowest, highest = [], []
    for curve, colour in zip(curves, COLOURS, strict=False):
        sizes = curve["sizes"]
        for name in curve["order"]:
            if (style := STYLES.get(name.partition("_")[0])) is None:
                continue
            costs = curve["median"][name]
            lowest.append(min(costs))
            highest.append(max(costs))
            panel.plot(sizes, costs, style, color=colour, marker="o" if style == "-" else None, markersize=3.5,
                       linewidth=1.4, label=label(curve, name) if style == "-" else None)  # fmt: skip
            panel.fill_between(sizes, *zip(*curve["range"][name], strict=True), color=colour, alpha=0.15, linewidth=0)
    panel.set_xscale("log")
    panel.set_yscale("log")
    first, last = curves[0]["sizes"][0], curves[0]["sizes"][-1]
    most = max(highest)
    panel.plot([first, last], [most * first / last, most], color="#999999", linewidth=0.8, zorder=0)
    panel.set_ylim(min(lowest) / 1.7, most * 2.2)
    write_numbers(panel.xaxis, panel.yaxis)
    panel.set_xlabel(curves[0]["counted"], fontsize=9)
    unit = "µs of CPU an operation" if "p95_us" in curves[0]["order"] else "ms"
    panel.set_ylabel(unit, fontsize=9)
    panel.set_title(title, fontsize=10)
    panel.tick_params(labelsize=8, which="both")
    panel.grid(alpha=0.25, which="major")
    panel.spines["top"].set_visible(False)
    if curves[0]["axis"] == "clients":
        draw_rates(panel, curves)
    panel.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=1)


def write_numbers(*axes: Any) -> None:
    """Label the ticks of logarithmic axes with plain numbers."""
    from matplotlib.ticker import LogFormatter, NullFormatter  # noqa: PLC0415

    for axis in axes:
        low, high = axis.get_view_interval()
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.4)) if high < 100 * low else NullFormatter())


def label(curve: Mapping[str, Any], cost: str) -> str:
    order = curve["order"][cost]
    low, high = spread(order)
    return f"{curve['name']}: p95 {order['word']} ({low:.2f} to {high:.2f})"


def draw_rates(panel: Any, curves: Sequence[Mapping[str, Any]]) -> None:
    """Draw the answers a second on a scale of their own."""
    rates = panel.twinx()
    for curve, colour in zip(curves, COLOURS, strict=False):
        rates.plot(curve["sizes"], curve["median"]["answers_per_s"], "-.", color=colour, linewidth=1, alpha=0.8)
    rates.set_yscale("log")
    write_numbers(rates.yaxis)
    rates.set_ylabel("answers a second (dash-dotted)", fontsize=9)
    rates.tick_params(labelsize=8, which="both")
    rates.spines["top"].set_visible(False)
