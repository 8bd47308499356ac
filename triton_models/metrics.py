"""Metrics of Triton that survive the unloading of their model."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils


def counter_family(name: str, description: str) -> Any:
    return _never_freed(pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER))


def gauge_family(name: str, description: str) -> Any:
    return _never_freed(pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.GAUGE))


def metric_of(family: Any, labels: Mapping[str, str]) -> Any:
    return _never_freed(family.Metric(labels=dict(labels)))


def _never_freed(metric: Any) -> Any:
    """Keep a metric, or a family, for ever: also when this process ends, Triton is not told to delete it.

    Triton 2.51 writes to freed memory when a family is deleted, and aborts or hangs; a dozen reloads of a model show
    it. Several models also have a family of the same name, and in Triton these are one. The series of a model that is
    loaded again go on from where they were. A metric that Python deleted after its interpreter's end would crash the
    process, too.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(metric))
    return metric
