"""Muon in FP32 takes the steps of PyTorch's own, which rounds to bfloat16."""

from __future__ import annotations

import pytest
import torch

from build_engines.train.muon import Fp32Muon, orthogonal

pytestmark = pytest.mark.slow

COEFFICIENTS = (3.4445, -4.775, 2.0315)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_it_steps_as_pytorchs_own(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        kind([parameter], lr=0.05, momentum=0.9, weight_decay=0.1)
        for kind, parameter in ((Fp32Muon, ours), (torch.optim.Muon, theirs))
    ]
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.03 * moved
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


def test_a_gradient_becomes_nearly_orthogonal() -> None:
    torch.manual_seed(1)
    found = torch.linalg.svdvals(orthogonal(torch.randn(5, 64), COEFFICIENTS, 5, 1e-7))
    assert ((found > 0.6) & (found < 1.3)).all()


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = Fp32Muon([parameter], lr=1.0)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 2))
    with pytest.raises(ValueError, match="no closure"):
        optimizer.step(lambda: None)
