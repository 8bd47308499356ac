"""Provide the measured models: real sizes with random weights, or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from transformers import Blip2Config

from benchmarks.gpu.device import Device
from benchmarks.real_scale import OPT_27B, SMALL_OPT, VIT_G, random_checkpoint
from build_engines.convert.precision import to_fp16
from build_engines.convert.steps import save
from build_engines.export import export_graph, graphs
from build_engines.model import flops
from build_engines.model.checkpoint import Checkpoint
from build_engines.model.vision import VisionEncoder

REAL = "real"
ENCODER = "vision_encoder"


@dataclass(frozen=True)
class EncoderGraphs:
    """One encoder in PyTorch (FP32, on the CPU) and as ONNX files by precision. `gflops` is per image."""

    module: VisionEncoder
    files: dict[str, Path]
    gflops: float


def model_of(name: str, device: Device) -> Checkpoint:
    """Load a checkpoint in FP32 on the CPU, or make `real` in FP16 on the device.

    FP32 would need twice the memory.
    """
    if name != REAL:
        return Checkpoint.load(Path(name))
    return random_checkpoint(config({"vision_config": VIT_G, "text_config": OPT_27B}), device.kind, half=True)


def config(sizes: dict[str, Any]) -> Blip2Config:
    """Make a configuration of these sizes; the Q-Former's defaults are the published ones."""
    return Blip2Config(**sizes, num_query_tokens=32)


def graphs_of_encoder(name: str, work: Path) -> EncoderGraphs:
    """Export the encoder into `work` unless the files are already there."""
    checkpoint = (
        random_checkpoint(config({"vision_config": VIT_G, "text_config": SMALL_OPT}))
        if name == REAL
        else Checkpoint.load(Path(name))
    )
    graph = next(graph for graph in graphs(checkpoint) if graph.name == ENCODER)
    files = {precision: work / precision / f"{ENCODER}.onnx" for precision in ("fp32", "fp16")}
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if not files["fp32"].exists():
        export_graph(graph, files["fp32"])
    if not files["fp16"].exists():
        save(to_fp16(ENCODER, onnx.load(files["fp32"])).model, files["fp16"], ENCODER)
    counted = flops.encoder(checkpoint.model.config.vision_config) / 1e9
    return EncoderGraphs(checkpoint.vision_encoder(), files, counted)
