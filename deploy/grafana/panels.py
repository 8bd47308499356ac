"""Describe dashboards as data, and turn them into Grafana's JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphDrawStyle, StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableHide,
)

WIDTH, HALF, HEIGHT = 24, 12, 8  # of Grafana's grid
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# What a core of CPU costs an hour, in the currency of your bill. Callers of the dashboard change it in its head.
CPU_PRICE = "cpu_price_an_hour"
DEFAULT_CPU_PRICE = "0.04"

# Grafana's names of units, as its field "unit" takes them.
Unit = Literal["s", "short", "percentunit", "bytes", "reqps", "ops", "none"]


@dataclass(frozen=True, slots=True)
class Query:
    """One expression of PromQL. `legend` names its series, with labels as {{label}}.

    `exemplars` shows single requests as dots, each of which leads to its trace.
    """

    expression: str
    legend: str
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture. `stacked` puts the series on top of each other; a `number` shows the last value only."""

    title: str
    queries: Sequence[Query]
    unit: Unit
    about: str
    kind: Literal["lines", "stacked", "number"] = "lines"
    width: int = HALF


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One page of panels, from left to right and from top to bottom."""

    uid: str
    title: str
    about: str
    panels: Sequence[Panel]


def as_json(description: Dashboard) -> str:
    """Write a dashboard as Grafana's JSON, which ends with a line feed."""
    builder = (
        dashboard.Dashboard(description.title)
        .uid(description.uid)
        .description(description.about)
        .tags(["glimpse"])
        .readonly()
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    if any(CPU_PRICE in query.expression for panel in description.panels for query in panel.queries):
        builder.with_variable(
            dashboard.TextBoxVariable(CPU_PRICE)
            .label("Price of a CPU core an hour")
            .default_value(DEFAULT_CPU_PRICE)
            .hide(VariableHide.DONT_HIDE)
        )
    for index, panel in enumerate(description.panels):
        builder.with_panel(_built(panel, index + 1))
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def _built(panel: Panel, number: int) -> stat.Panel | timeseries.Panel:
    built: stat.Panel | timeseries.Panel
    if panel.kind == "number":
        built = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    else:
        built = timeseries.Panel().draw_style(GraphDrawStyle.LINE).fill_opacity(8).span_nulls(False)
        if panel.kind == "stacked":
            built.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(60)
    built.id(number).title(panel.title).description(panel.about).unit(panel.unit).datasource(SOURCE)
    built.min(0).span(panel.width).height(HEIGHT)
    for index, query in enumerate(panel.queries):
        target = (
            prometheus.Dataquery()
            .expr(query.expression)
            .legend_format(query.legend)
            .ref_id(chr(ord("A") + index))
            .datasource(SOURCE)
            .range()
        )
        built.with_target(target.exemplar(True) if query.exemplars else target)
    return built
