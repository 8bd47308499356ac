"""Multiply in FP8 in PyTorch: the encoder of `glimpse build --precision fp8`, without TensorRT.

`torch._scaled_mm` is cuBLASLt's FP8 product: E4M3 factors with one scale each, sums in FP32, FP16 out. It requires the
second factor in column-major order and its sides in multiples of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from build_engines.model.vision import VisionEncoder

E4M3 = torch.float8_e4m3fn
GREATEST = torch.finfo(E4M3).max


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply a [M, K] and b [N, K] in E4M3 -> FP16 a_scale * b_scale * a @ b.T + bias [M, N]."""
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=torch.float16,
                            use_fast_accum=True)  # fmt: skip


def scale_of(values: Tensor) -> Tensor:
    """Return the scale in FP32 that maps the largest absolute value to E4M3's largest."""
    return (values.abs().amax().float() / GREATEST).clamp(min=1e-12)


def quantise(values: Tensor, scale: Tensor) -> Tensor:
    return (values.float() / scale).clamp(-GREATEST, GREATEST).to(E4M3)


class Fp8Linear(nn.Module):
    """A linear layer with E4M3 factors and FP16 output.

    The first input sets the range of all inputs, as in `max` calibration.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight_scale = scale_of(linear.weight)
        self.weight = quantise(linear.weight.detach(), self.weight_scale)
        self.bias = None if linear.bias is None else linear.bias.detach().half()
        self.input_scale: Tensor | None = None

    def forward(self, values: Tensor) -> Tensor:
        if self.input_scale is None:
            self.input_scale = scale_of(values)
        rows = quantise(values.flatten(0, -2), self.input_scale)
        return product(rows, self.weight, self.input_scale, self.weight_scale, self.bias).unflatten(
            0, values.shape[:-1]
        )


def in_fp8(encoder: VisionEncoder) -> float:
    """Change the encoder in place to FP8 -> the share of the layers' operations with weights that are FP8.

    It changes the projection and both MLP products of every layer but the first and the last.
    """
    layers, done, all_of = list(encoder.layers), 0, 0
    for number, layer in enumerate(layers):
        all_of += sum(each.weight.numel() for each in layer.modules() if isinstance(each, nn.Linear))
        if number in (0, len(layers) - 1):
            continue
        for owner, name in ((layer.self_attn, "projection"), (layer.mlp, "fc1"), (layer.mlp, "fc2")):
            linear = getattr(owner, name)
            setattr(owner, name, Fp8Linear(linear))
            done += linear.weight.numel()
    return done / all_of
