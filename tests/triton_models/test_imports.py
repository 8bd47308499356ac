"""What Triton's python backend loads into each model's process: memory and start time, once per instance."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.support.paths import PROJECT

# One of each library that only the gateway, the builder or the trainer needs.
NOT_HERE = {"asyncio", "fastapi", "grpc", "onnx", "pydantic", "redis", "structlog", "torch", "tritonclient", "uvicorn"}
OURS = (
    "service.core",
    "service.text.guides",
    "service.media.bmp",
    "service.media.colours",
    "service.media.decoder",
    "service.media.exif",
    "service.media.fields",
    "service.media.foreign",
    "service.media.formats",
    "service.media.header",
    "service.media.isobmff",
    "service.media.jpeg",
    "service.media.pages",
    "service.media.structure",
    "service.media.tiff",
    "service.text.prompt",
    "service.text.spelling",
    "service.telemetry.tracing",
)

IMPORT_ALL = """
import importlib, json, pkgutil, sys, triton_models
for module in pkgutil.iter_modules(triton_models.__path__):
    importlib.import_module(f"triton_models.{module.name}")
print(json.dumps(sorted(sys.modules)))
"""


def loaded() -> set[str]:
    """The names of all modules in a fresh process that has imported every module of triton_models."""
    path = os.pathsep.join((str(PROJECT), str(PROJECT / "tests" / "support")))  # the second holds Triton's own module
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return set(json.loads(done.stdout))


def test_a_models_process_loads_nothing_of_the_gateway() -> None:
    modules = loaded()
    assert {"triton_models.prepare", "service.media.decoder", "numpy"} <= modules
    assert modules & NOT_HERE == set()
    packages = {"service", "service.media", "service.telemetry", "service.text"}
    assert {name for name in modules - packages if name.startswith("service") and not name.startswith(OURS)} == set()
