"""The metrics that exist, and those that an expression of PromQL names."""

from __future__ import annotations

import ast
import re

import promql_parser

from service.telemetry.metrics import Metrics
from tests.support.paths import PROJECT

# Of other programs: Prometheus itself, kube-state-metrics, the kubelet.
FOREIGN = {
    "up",
    "kube_cronjob_created",
    "kube_cronjob_status_last_successful_time",
    "kube_deployment_spec_replicas",
    "kube_deployment_status_replicas_unavailable",
    "kube_pod_deletion_timestamp",
    "kube_statefulset_replicas",
    "kube_statefulset_status_replicas_ready",
    "container_memory_working_set_bytes",
    "container_spec_memory_limit_bytes",
}
# Triton's own, as the bundled server tells them: tests/deploy/test_dashboards.py asks a running one.
TRITON = {
    "nv_cpu_memory_total_bytes",
    "nv_cpu_memory_used_bytes",
    "nv_cpu_utilization",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_pending_request_count",
    "nv_inference_queue_duration_us",
    "nv_inference_request_duration_us",
    "nv_inference_request_failure",
    "nv_inference_request_success",
    "nv_pinned_memory_pool_total_bytes",
    "nv_pinned_memory_pool_used_bytes",
}
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}


def known_metrics() -> set[str]:
    """Names of samples: the gateway's, the LLM's and Triton's."""
    gateway = {
        family.name + suffix for family in Metrics().registry.collect() for suffix in SUFFIXES.get(family.type, ("",))
    }
    return gateway | {"glimpse_memory_bytes", "glimpse_memory_limit_bytes"} | of_the_models() | TRITON


def of_the_models() -> set[str]:
    """The names in two files of triton_models, which import a module that only Triton has."""
    sources = [(PROJECT / "triton_models" / name).read_text() for name in ("gauges.py", "costs.py")]
    nodes = (node for source in sources for node in ast.walk(ast.parse(source)))
    words = (node.value for node in nodes if isinstance(node, ast.Constant))
    return {word for word in words if isinstance(word, str) and re.fullmatch(r"glimpse_\w+", word)}


def metrics_in(expression: str) -> set[str]:
    """Names of all series that an expression reads. Raises ValueError if it is no PromQL."""
    found: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector) and node.name:
            found.add(node.name)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.add(node.vector_selector.name)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found
