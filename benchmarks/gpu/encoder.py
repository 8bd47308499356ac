"""Time the vision encoder alone by batch size, in ONNX Runtime and PyTorch.

ONNX Runtime runs it in FP32 and FP16, PyTorch in FP16 and with FP8 matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnxruntime import OrtValue

from benchmarks.gpu.device import Device
from benchmarks.gpu.fp8 import in_fp8
from benchmarks.gpu.model import EncoderGraphs
from build_engines.convert.parity import nearness
from build_engines.convert.samples import samples
from build_engines.model.vision import VisionEncoder
from triton_models.session import Array, Graph

COMPARED = 2  # images that are compared with FP32 on the CPU


@dataclass(frozen=True)
class Way:
    """One way to run the encoder."""

    precision: str  # selects the peak for MFU
    on_device: Callable[[Array], Callable[[], Any]]  # copies images uint8 [B, 3, 224, 224] to the device -> a run
    features: Callable[[Any], Array]  # a run's result -> features on the host
    more: Mapping[str, float]


def times(
    device: Device, graphs: EncoderGraphs, peaks: Mapping[str, Any], batches: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Return milliseconds, images/s and MFU by way and batch size, and each way's nearness to FP32's features."""
    images = np.stack([pixels for pixels, _ in samples(None, max(*batches, COMPARED))])
    (expected,) = Graph(graphs.files["fp32"], 0).run({"image": images[:COMPARED]}, ["features"])
    found: dict[str, Any] = {"gflops_per_image": round(graphs.gflops, 3), "peak_tflops": dict(peaks), "ways": {}}
    for name, opened in ways(device, graphs).items():
        with opened as way:
            told = way.features(way.on_device(images[:COMPARED])())
            found["ways"][name] = {
                "precision": way.precision,
                **way.more,
                "features_against_fp32_on_the_cpu": nearness(told, expected).as_json(),
                "batches": {
                    str(batch): timed(device, way, images[:batch], graphs.gflops, peaks[way.precision], repeats)
                    for batch in batches
                },
            }
    if device.why_no_fp8:
        found["not_run"] = {"pytorch fp8": device.why_no_fp8}
    return found


def timed(device: Device, way: Way, images: Array, gflops: float, peak_tflops: float, repeats: int) -> dict[str, float]:
    median_s = device.median_s(way.on_device(images), repeats)
    achieved = len(images) * gflops / 1000 / median_s  # TFLOP/s
    return {
        "median_ms": float(f"{1000 * median_s:.4g}"),
        "images_per_s": float(f"{len(images) / median_s:.4g}"),
        "mfu": float(f"{achieved / peak_tflops:.4g}"),
    }


def ways(device: Device, graphs: EncoderGraphs) -> dict[str, Any]:
    """Return the ways, each to be opened separately, so that the device holds one at a time."""
    found = {f"onnxruntime {precision}": onnx_way(device, graphs, precision) for precision in ("fp32", "fp16")}
    found["pytorch fp16"] = torch_way(device, graphs.module, fp8=False)
    if not device.why_no_fp8:
        found["pytorch fp8"] = torch_way(device, graphs.module, fp8=True)
    return found


@contextmanager
def onnx_way(device: Device, graphs: EncoderGraphs, precision: str) -> Iterator[Way]:
    graph = Graph(graphs.files[precision], 0, device.kind)
    names = list(graph.outputs)

    def on_device(images: Array) -> Callable[[], list[OrtValue]]:
        there = OrtValue.ortvalue_from_numpy(images, device.kind, 0)
        return lambda: graph.run_bound({"image": there}, names)

    yield Way(precision, on_device, lambda given: given[names.index("features")].numpy(), {})


@contextmanager
def torch_way(device: Device, encoder: VisionEncoder, *, fp8: bool) -> Iterator[Way]:
    """Run the encoder like FP16 graphs, with norms, softmax and texture in FP32.

    It changes the encoder; FP8 cannot be undone.
    """
    half(encoder).to(device.kind)
    more = {"share_of_weights_in_fp8": round(in_fp8(encoder), 4)} if fp8 else {}

    def on_device(images: Array) -> Callable[[], Any]:
        there = torch.from_numpy(images).to(device.kind)
        return lambda: encoder(there)

    with torch.inference_mode(), torch.autocast(device.kind, torch.float16):
        yield Way("fp8" if fp8 else "fp16", on_device, lambda given: given[0].float().cpu().numpy(), more)
    encoder.to("cpu")


def half(encoder: VisionEncoder) -> VisionEncoder:
    """Convert to FP16 all but the texture's constants and the pixels' mean and standard deviation."""
    for part in (encoder.embeddings, encoder.layers, encoder.post_layernorm):
        part.half()
    return encoder
