"""Receive traces as an operator's collector would: a real OTLP receiver, and behind it what it passes on."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services

from benchmarks.ports import free_ports
from tests.support.servers import eventually


@dataclass
class ReceivedSpan:
    service: str
    name: str
    trace_id: str
    id: str
    parent: str  # empty at the top of a trace
    attributes: dict[str, Any]
    failed: bool
    seconds: float


@dataclass
class Spans(services.TraceServiceServicer):
    """Everything that was received, in the order of its coming."""

    received: list[ReceivedSpan] = field(default_factory=list)

    def Export(self, request: messages.ExportTraceServiceRequest, _: object) -> messages.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            service = {each.key: each.value.string_value for each in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                self.received += [received(service, span) for span in scope.spans]
        return messages.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[ReceivedSpan]:
        return [span for span in self.received if span.trace_id == trace_id]


def received(service: str, span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        service=service,
        name=span.name,
        trace_id=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        attributes={
            each.key: getattr(each.value, each.value.WhichOneof("value") or "string_value") for each in span.attributes
        },
        failed=span.status.code == span.status.STATUS_CODE_ERROR,
        seconds=(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
    )


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def otlp_receiver(folder: Path) -> Iterator[tuple[str, Spans]]:
    """rotel, which passes everything on to the second value -> its endpoint, and what came through."""
    ports = free_ports(3)
    spans = Spans()
    server = grpc.server(ThreadPoolExecutor(2))
    services.add_TraceServiceServicer_to_server(spans, server)
    server.add_insecure_port(f"127.0.0.1:{ports[0]}")
    server.start()
    package = find_spec("rotel")
    assert package is not None
    assert package.origin is not None
    with (folder / "rotel.log").open("wb") as log:
        process = subprocess.Popen(
            [
                Path(package.origin).with_name("rotel-agent"),
                "start",
                f"--otlp-grpc-endpoint=127.0.0.1:{ports[1]}",
                f"--otlp-http-endpoint=127.0.0.1:{ports[2]}",
                "--exporter=otlp",
                f"--otlp-exporter-endpoint=http://127.0.0.1:{ports[0]}",
            ],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if name != "SSL_CERT_DIR"},  # it reads authorities
        )
    try:
        eventually(lambda: listens(ports[1]), 10, "rotel listens")
        yield f"http://127.0.0.1:{ports[1]}", spans
    finally:
        process.terminate()
        process.wait(10)
        server.stop(None)
