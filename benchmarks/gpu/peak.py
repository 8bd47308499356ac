"""Measure a device's peak with two square matrices, by precision; MFU is a share of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.fp8 import E4M3, product


def peaks(device: Device, side: int, repeats: int) -> dict[str, Any]:
    """Return TFLOP/s by precision, at 2 side**3 operations per product.

    If the device lacks a precision, the reason is under `not_run`.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {"side": side}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        found[name] = tflops(device, plain(device, side, dtype), side, repeats)
    if device.why_no_fp8:
        return found | {"not_run": {"fp8": device.why_no_fp8}}
    return found | {"fp8": tflops(device, eight_bits(device, side), side, repeats)}


def tflops(device: Device, run: Callable[[], Tensor], side: int, repeats: int) -> float:
    return float(f"{2 * side**3 / device.median_s(run, repeats) / 1e12:.4g}")


def plain(device: Device, side: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    a, b = (torch.randn(side, side, device=device.kind).to(dtype) for _ in range(2))
    return lambda: a @ b


def eight_bits(device: Device, side: int) -> Callable[[], Tensor]:
    a, b = (torch.randn(side, side, device=device.kind).to(E4M3) for _ in range(2))
    one = torch.ones((), device=device.kind)
    return lambda: product(a, b, one, one, None)
