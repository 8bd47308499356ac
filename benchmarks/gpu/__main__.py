"""Measure this project's models on a GPU in one command; not yet run on a GPU.

    python -m benchmarks.gpu --out benchmarks/results/gpu.json                      # everything, on the first GPU
    python -m benchmarks.gpu --device cpu --model reference --gemm 1024 --out cpu.json  # the same, small, on a CPU

There are three parts, which `--only` selects:

- `encoder`: the vision encoder of `--model` by batch size: ONNX Runtime in FP32 and FP16, PyTorch in FP16 and with FP8
  products. It reports milliseconds, images/s, nearness of the features to FP32's on the CPU, and MFU. MFU is the
  counted operations as a share of the device's peak, which is measured here with large square matrices;
- `chain`: the reference model as `--profile onnx-gpu` builds and serves it: `glimpse verify` against FP32 on the CPU;
- `large`: encoder, allocator, Q-Former and language model of `--model` end to end in FP16, in PyTorch with this
  project's modules: first token, time between tokens, memory.

`--model real` is ViT-g/14, the Q-Former and OPT-2.7B with random weights. By calculation it needs 16 GB of memory, 8 GB
of disk and 12 GB of GPU memory. Any other `--model` is a checkpoint's directory. A GPU needs PyTorch and ONNX Runtime
for CUDA: docs/engines.md. A CPU emulates FP16 and FP8, differently in each library, so only FP32's MFU is meaningful
there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu import chain, encoder, large, peak
from benchmarks.gpu.device import Device
from benchmarks.gpu.model import REAL, graphs_of_encoder, model_of

ROOT = Path(__file__).parents[2]
BATCHES = (1, 2, 4, 8, 16, 32)
PARTS = ("encoder", "chain", "large")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    found.add_argument(
        "--model", default=REAL, help=f"model of encoder and large: {REAL} or a checkpoint's directory [{REAL}]"
    )
    found.add_argument("--reference", type=Path, default=ROOT / "reference", help="checkpoint of chain")
    found.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    found.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    found.add_argument("--gemm", type=int, default=8192, help="side of the matrices that measure the peak")
    found.add_argument("--tokens", type=int, default=64, help="tokens of each answer of large")
    found.add_argument("--repeats", type=int, default=20)
    found.add_argument("--work", type=Path, help="folder that keeps graphs and builds [a temporary folder]")
    found.add_argument("--out", type=Path, help="JSON file; results of other parts on the same device are kept")
    return found


def measured(given: argparse.Namespace, device: Device, work: Path) -> dict[str, Callable[[], Any]]:
    """Return each part by name, not yet run."""
    return {
        "encoder": lambda: encoder.times(
            device,
            graphs_of_encoder(given.model, work),
            peak.peaks(device, given.gemm, given.repeats),
            given.batches,
            given.repeats,
        ),
        "chain": lambda: chain.verified(device, given.reference, work),
        "large": lambda: large.times(device, model_of(given.model, device), given.tokens, given.repeats),
    }


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    device = Device.of(given.device)
    told: dict[str, Any] = {"device": device.about(), "model": given.model}
    before = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    if {name: before.get(name) for name in told} == told:
        told = before
    with tempfile.TemporaryDirectory() as scratch:
        parts = measured(given, device, given.work or Path(scratch))
        for name in given.only:
            told[name] = parts[name]()
            print(name, json.dumps(told[name], indent=2), flush=True)
            if given.out:
                given.out.write_text(json.dumps(told, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
