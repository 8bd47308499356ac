"""The soft choice equals the allocator's, and every tension gets a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from build_engines.model.allocation import CELL_COUNT
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.closer import CloserView
from build_engines.model.gates import gated_softmax
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.model.relaxation import choose, gates_of, perturbed, region_gates

WIDTH, ROWS = 24, 3


def allocator() -> RelevanceAllocator:
    torch.manual_seed(1)
    participatory = ParticipatoryKnowing(50, WIDTH)
    found = RelevanceAllocator(participatory, OpponentProcessing(participatory.coupling_width), CloserView(WIDTH))
    torch.nn.init.normal_(found.closer.out.weight, std=0.1)
    return found


def looked_at(closer: bool) -> tuple[list[Tensor], Tensor, Tensor | None]:
    torch.manual_seed(2)
    given = [torch.randn(ROWS, 257, WIDTH), torch.rand(ROWS, 256), torch.rand(ROWS, 256), torch.rand(ROWS, 13, 16, 16),
             torch.randint(0, 50, (ROWS, 32)), (torch.arange(32) < 6).int().expand(ROWS, -1)]  # fmt: skip
    most = 400 if closer else 256
    budget = torch.tensor([[64, most, 32, 128], [100, most, 32, 128], [most, most, 128, 128]], dtype=torch.int32)
    return given, budget, torch.randn(ROWS, 1024, WIDTH) if closer else None


def attended(query: Tensor, tokens: Tensor, gates: Tensor) -> Tensor:
    heads = tokens.unsqueeze(1)
    return gated_softmax(query @ heads.transpose(2, 3), gates) @ heads


@pytest.mark.parametrize("closer", [False, True])
def test_gated_tokens_say_what_the_packed_ones_say(closer: bool) -> None:
    module, (given, budget, detail) = allocator(), looked_at(closer)
    tokens, mask, _, _, _, levels, _ = module(*given, budget, detail)
    weighed = module.weigh(*given)
    choice = choose(module, weighed.cells, weighed.tensions, budget, closer=closer)
    candidates = module.allocation.sources(given[0], module.detail(given[0], detail))
    opened = gates_of(module.allocation, choice)
    assert torch.equal(choice.levels, levels.long())
    assert opened.sum(1).tolist() == (mask > 0).sum(1).tolist()
    regions = module.focus(weighed.cells).of_cell
    _, packed = module.allocation.pack(given[0], levels.long(), regions, detail)
    query = torch.randn(ROWS, 1, 5, WIDTH) / WIDTH
    for group in range(1, 5):
        gates = opened if group == 1 else region_gates(module.allocation, opened, regions, group - 1)
        seen = (packed > 0 if group == 1 else packed == group).float()
        ours, theirs = attended(query, candidates, gates), attended(query, tokens, seen)
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("closer", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_a_gradient_reaches_all_that_is_trained(closer: bool, temperature: float) -> None:
    module, (given, budget, detail) = allocator(), looked_at(closer)
    torch.nn.init.normal_(module.balancing.out.weight, std=0.1)
    weighed = module.weigh(*given)
    weighed.tensions.retain_grad()
    noise = torch.Generator().manual_seed(5)
    choice = choose(
        module, weighed.cells, weighed.tensions, budget,
        closer=closer, temperature=temperature, generator=noise,
    )  # fmt: skip
    candidates = module.allocation.sources(given[0], module.detail(given[0], detail))
    gates = gates_of(module.allocation, choice)
    attended(torch.randn(ROWS, 1, 5, WIDTH) / 5, candidates, gates).square().sum().backward()
    assert (weighed.tensions.grad[0] != 0).all()
    assert weighed.tensions.grad[2, 0] == 0  # least and most are equal: particularize changes nothing
    trained = [module.participatory, module.balancing, *([module.closer] if closer else [])]
    for part in trained:
        for name, weight in part.named_parameters():
            assert weight.grad is not None, name
            assert bool(weight.grad.isfinite().all()), name
            # A zero gradient means that the choice ignores this weight.
            assert bool((weight.grad != 0).any()), name


def test_closing_and_opening_are_seen_by_the_gates_gradient() -> None:
    """An open gate has the derivative; a closed one the first-order change that opening it makes."""
    torch.manual_seed(4)
    logits, values = torch.randn(1, 1, 2, 6), torch.randn(6, 3)
    gates = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0]], requires_grad=True)

    def said(gates: Tensor) -> Tensor:
        return (gated_softmax(logits, gates) @ values).sum()

    def soft(gates: Tensor) -> Tensor:
        shares = gates[:, None, None] * logits.exp()
        return (shares / shares.sum(-1, keepdim=True) @ values).sum()

    said(gates).backward()
    for index in range(6):
        if gates[0, index] > 0:
            (expected,) = torch.autograd.grad(soft(gates), gates)
            assert torch.allclose(gates.grad[0, index], expected[0, index], atol=1e-5)
        else:
            opened = gates.detach().clone()
            opened[0, index] = 1
            assert torch.allclose(gates.grad[0, index], said(opened) - said(gates), atol=1e-5)


def test_noise_keeps_gains_in_their_range_and_is_drawn_from_the_generator() -> None:
    gains = torch.rand(4, CELL_COUNT)
    noisy = [perturbed(gains, 3.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert all(bool(((each >= 0) & (each <= 1)).all()) for each in noisy)
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert perturbed(gains, 0.0) is gains
