"""FP8 matrix products in PyTorch: the vision encoder as `glimpse build --precision fp8` has it, without TensorRT.

`torch._scaled_mm` is cuBLASLt's FP8 product: E4M3 factors with one scale each, sums in FP32, FP16 out. It wants the
second factor column by column and its sides in multiples of 16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from build_engines.model.vision import VisionEncoder

E4M3 = torch.float8_e4m3fn
GREATEST = torch.finfo(E4M3).max


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None) -> Tensor:
    """a [M, K] and b [N, K] in E4M3 -> FP16 a_scale * b_scale * a @ b.T + bias [M, N]."""
    return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, bias=bias, out_dtype=torch.float16,
                            use_fast_accum=True)  # fmt: skip


def scale_of(values: Tensor) -> Tensor:
    """FP32, so that the largest of the values becomes the largest of E4M3."""
    return (values.abs().amax().float() / GREATEST).clamp(min=1e-12)


def quantise(values: Tensor, scale: Tensor) -> Tensor:
    return (values.float() / scale).clamp(-GREATEST, GREATEST).to(E4M3)


class Fp8Linear(nn.Module):
    """A linear layer whose factors are E4M3. Its input's range is that of the first input, as `max` calibration
    takes it; FP16 out."""

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
    """Changes the encoder in place, on its device: projection, up and down of every layer but the first and the last.

    -> the share of the layers' operations with weights that are FP8 then."""
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
