"""Command lines for converting ONNX to TensorRT plans. Pure.

Shapes come from the models' configurations. Plans are strongly typed: the ONNX file sets the precision of every layer.
(TensorRT 11 has no other way, and ignores `--stronglyTyped`.) A plan runs only on the exact TensorRT version and the
kind of GPU that built it. It is therefore built in the image that serves it, and its timing cache belongs to that
version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from build_engines.convert.commands import CACHE, OUT, WORK
from build_engines.convert.options import Options

TRTEXEC = "/usr/src/tensorrt/bin/trtexec"  # in NVIDIA's Triton images
HEADER_BYTES = 28  # of a plan: its tag, the format's number, and from byte 24 on TensorRT's version
TAG, FORMAT = b"ftrt", bytes(4)
BANNER = re.compile(r"&&&& RUNNING TensorRT\.trtexec \[TensorRT v(\d+)(\d\d)(\d\d)\] \[b(\d+)\]")


def command(options: Options, inputs: Mapping[str, Sequence[int]], onnx: str) -> tuple[str, ...]:
    """`inputs` by name without the batch dimension; `onnx` is the folder of the step that made the graph."""
    build = trtexec if options.run_in == "docker" else polygraphy
    batches = (1, options.opt_batch, options.vision_batch)
    return build(f"{WORK}/{onnx}/model.onnx", f"{OUT}/model.plan", inputs, batches)


def trtexec(
    onnx: str, plan: str, inputs: Mapping[str, Sequence[int]], batches: tuple[int, int, int]
) -> tuple[str, ...]:
    """Build by trtexec. `batches` are the minimum, the one to tune for, and the maximum."""
    return (
        TRTEXEC,
        f"--onnx={onnx}",
        f"--saveEngine={plan}",
        "--stronglyTyped",
        "--noTF32",  # TF32 rounds factors to FP16's precision, also of what must stay in FP32
        *(
            f"--{bound}Shapes=" + ",".join(f"{name}:{shape(batch, dims, 'x')}" for name, dims in inputs.items())
            for bound, batch in zip(("min", "opt", "max"), batches, strict=True)
        ),
        f"--timingCacheFile={CACHE}",
        "--profilingVerbosity=detailed",  # layer names, for finding a slow or wrong layer
        "--skipInference",
    )


def polygraphy(
    onnx: str, plan: str, inputs: Mapping[str, Sequence[int]], batches: tuple[int, int, int]
) -> tuple[str, ...]:
    """Build by polygraphy, if TensorRT is a Python package of this machine. Without --tf32 it clears TF32's flag."""
    bounds = zip(("min", "opt", "max"), batches, strict=True)
    return (
        "polygraphy",
        "convert",
        onnx,
        "--convert-to",
        "trt",
        "--output",
        plan,
        "--strongly-typed",
        *(
            word
            for bound, batch in bounds
            for word in (
                f"--trt-{bound}-shapes",
                *(f"{name}:[{shape(batch, dims, ',')}]" for name, dims in inputs.items()),
            )
        ),
        "--load-timing-cache",
        CACHE,
        "--save-timing-cache",
        CACHE,
        "--profiling-verbosity",
        "detailed",
    )


def load(plan: str) -> tuple[str, ...]:
    """Load a plan as a server does, without running it."""
    return (TRTEXEC, f"--loadEngine={plan}", "--skipInference")


def version_of_plan(header: bytes) -> str:
    """The TensorRT version that built a plan, "10.14.1.48", from its first HEADER_BYTES.

    Raises ValueError if it is not a plan. Source: `printPlanVersion` of TensorRT's samples/common/sampleEngines.cpp,
    behind trtexec's --getPlanVersionOnly.
    """
    if len(header) < HEADER_BYTES or header[:4] != TAG or header[4:8] != FORMAT:
        raise ValueError("no TensorRT plan: build it again")
    return ".".join(str(number) for number in header[24:HEADER_BYTES])


def version_of_runtime(said: str) -> str:
    """The TensorRT version of `trtexec` itself, from the first line of its output. Raises ValueError."""
    if not (found := BANNER.search(said)):
        raise ValueError("trtexec did not print its version: run it by hand to see why")
    return ".".join(str(int(number)) for number in found.groups())


def shape(batch: int, dims: Sequence[int], between: str) -> str:
    return between.join(str(size) for size in (batch, *dims))
