"""Samples of the service's own metrics."""

from __future__ import annotations

from collections.abc import Mapping

from service.telemetry.metrics import Metrics


def sample(metrics: Metrics, name: str, labels: Mapping[str, str] | None = None) -> float | None:
    """Return one value; None if there is no such sample.

    It collects one metric: the registry's own `get_sample_value` collects all, which takes 12 ms.
    """
    for metric in metrics.registry.restricted_registry([name]).collect():
        for each in metric.samples:
            if each.name == name and each.labels == (labels or {}):
                return each.value
    return None
