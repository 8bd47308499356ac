"""The whole allocator: maps in range with gradients on any image, budgets held, objects followed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from torch import Tensor

from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.balancing import LEANING, TRUSTED, OpponentProcessing, quadrant_summaries
from build_engines.model.checkpoint import Checkpoint
from build_engines.model.closer import CloserView
from build_engines.model.knowing import ParticipatoryKnowing, mean_meaning
from build_engines.model.texture import Texture
from service.core.vision import TOKENS_AT_LEVEL

ROOT = Path(__file__).parents[3]
WIDTH = 24
TEXTURE = Texture()
IMAGES = {
    "black": torch.zeros(1, 3, 224, 224),
    "white": torch.ones(1, 3, 224, 224),
    "constant": torch.full((1, 3, 224, 224), 0.37),
    "noise": torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)),
}


def allocator(seed: int = 1, spread: float = 1.0) -> RelevanceAllocator:
    torch.manual_seed(seed)
    participatory = ParticipatoryKnowing(50, WIDTH)
    made = RelevanceAllocator(participatory, OpponentProcessing(participatory.coupling_width), CloserView(WIDTH))
    torch.nn.init.normal_(made.balancing.out.weight, std=spread)
    return made


def looked_at(image: Tensor, seed: int = 0, words: int = 5) -> list[Tensor]:
    """Features of an encoder that gives the same values everywhere on a constant image."""
    texture, entropy = TEXTURE(image)
    features = torch.nn.functional.avg_pool2d(image, 14).flatten(2).mean(1).unsqueeze(2) * torch.ones(WIDTH)
    features = torch.cat([features.mean(1, keepdim=True), features], dim=1)
    torch.manual_seed(seed)
    asked = [torch.randint(0, 50, (len(image), 32)), (torch.arange(32) < words).int().expand(len(image), -1)]
    return [features, torch.full((len(image), 256), 1 / 256), entropy, texture, *asked]


@pytest.mark.parametrize("words", [0, 5, 32])
@pytest.mark.parametrize("name", IMAGES)
def test_maps_are_in_range_and_have_a_gradient(name: str, words: int) -> None:
    module, inputs = allocator(), looked_at(IMAGES[name], words=words)
    seen = [each.requires_grad_() for each in inputs[:4]]
    weighed = module.weigh(*inputs)
    for values in (weighed.relevance, weighed.scores, weighed.weights, weighed.tensions):
        assert bool(values.isfinite().all())
        assert bool(((values >= 0) & (values <= 1)).all())
    (weighed.relevance.square().sum() + weighed.tensions.square().sum()).backward()
    for weight in [*seen, *module.participatory.parameters(), *module.balancing.parameters()]:
        assert bool(weight.grad.isfinite().all())


BUDGETS = st.tuples(st.integers(64, 400), st.integers(64, 400)).map(sorted)


@given(st.integers(0, 1000), BUDGETS, st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_budget_is_kept_and_reached_within_one_cells_step(seed: int, asked: list[int], closer: bool) -> None:
    module, inputs = allocator(seed), looked_at(IMAGES["noise"], seed)
    budget = torch.tensor([[*asked, 32, 128]], dtype=torch.int32)
    detail = torch.randn(1, 1024, WIDTH) if closer else None
    with torch.inference_mode():
        _, mask, groups, _, _, levels, tensions = module(*inputs, budget, detail)
    spent = int(torch.tensor((*TOKENS_AT_LEVEL, 0))[levels.long()].sum())  # level -1 is the last: none
    assert spent == int((mask > 0).sum()) - 1
    most = min(asked[1], 400 if closer else 256)
    least = min(asked[0], most)
    wanted = least + float(tensions[0, 0]) * (most - least)
    assert wanted - (12 if closer else 3) < spent <= most
    assert set(mask[0, mask[0] > 0].tolist()) == set(range(1, int(groups) + 1))


def test_permuting_the_batch_permutes_the_result_and_the_same_gives_the_same() -> None:
    module = allocator()
    torch.manual_seed(5)
    inputs = [
        torch.cat(each) for each in zip(*(looked_at(IMAGES[name], i) for i, name in enumerate(IMAGES)), strict=True)
    ]
    inputs[0] = torch.randn(4, 257, WIDTH)
    budget = torch.tensor([[64, 400, 32, 128], [64, 64, 32, 32], [90, 200, 64, 64], [400, 400, 128, 128]]).int()
    detail, order = torch.randn(4, 1024, WIDTH), [2, 0, 3, 1]
    with torch.inference_mode():
        straight = module(*inputs, budget, detail)
        again = module(*inputs, budget, detail)
        mixed = module(*(each[order] for each in (*inputs, budget, detail)))
    for ours, same, moved in zip(straight, again, mixed, strict=True):
        assert torch.equal(ours, same)
        assert torch.allclose(ours[order].float(), moved.float(), atol=1e-6)


def test_before_training_the_balance_is_the_same_for_every_input() -> None:
    participatory = ParticipatoryKnowing(50, WIDTH)
    balancing = OpponentProcessing(participatory.coupling_width)
    weights, tensions = balancing(torch.rand(3, 3, 256), torch.randn(3, participatory.coupling_width))
    assert torch.allclose(weights, torch.tensor(TRUSTED).expand(3, -1))
    assert torch.allclose(tensions, torch.tensor(LEANING).expand(3, -1))


def test_quadrants_are_summarised_one_by_one() -> None:
    scores = torch.zeros(1, 3, 16, 16)
    scores[0, 2, :8, 8:] = 0.75
    scores[0, 2, 8, 0] = 1.0
    mean, greatest, deviation = quadrant_summaries(scores.flatten(2)).reshape(3, 3, 4)
    assert mean[2].tolist() == [0, 0.75, 1 / 64, 0]
    assert greatest[2].tolist() == [0, 0.75, 1, 0]
    assert torch.allclose(deviation[2], torch.tensor([0.001, 0.001, (63 / 4096 + 1e-6) ** 0.5, 0.001]), atol=1e-6)
    assert not mean[:2].any()


def test_a_questions_meaning_is_that_of_its_words_alone() -> None:
    meanings, mask = torch.randn(2, 32, 4), torch.zeros(2, 32, dtype=torch.int32)
    mask[0, :3] = 1
    found = mean_meaning(meanings, mask)
    assert torch.allclose(found[0], meanings[0, :3].mean(0))
    assert not found[1].any()


def test_an_untrained_closer_view_is_four_copies_of_each_patch() -> None:
    features = torch.randn(1, 257, WIDTH)
    tokens = CloserView(WIDTH)(features, torch.randn(1, 1024, WIDTH)).reshape(16, 2, 16, 2, WIDTH)
    for row in range(2):
        for column in range(2):
            assert torch.equal(tokens[:, row, :, column].reshape(256, WIDTH), features[0, 1:])


def test_parts_that_need_each_other_say_so() -> None:
    with pytest.raises(ValueError, match="give participatory too"):
        RelevanceAllocator(None, OpponentProcessing(96))
    plain = RelevanceAllocator(None)
    inputs, budget = looked_at(IMAGES["noise"]), torch.tensor([[64, 256, 32, 128]], dtype=torch.int32)
    with pytest.raises(ValueError, match="no closer view"):
        plain(*inputs, budget, torch.randn(1, 1024, WIDTH))
    _, mask, groups, relevance, scores, _, tensions = plain(*inputs, budget)
    assert ((mask > 0).sum().item(), groups.item(), tensions.tolist()) == (257, 4, [[1.0, 0.25, 0.0]])
    assert torch.allclose(relevance, scores[:, :2].mean(1))


def test_translating_an_object_moves_its_relevance() -> None:
    """With the trained encoder, moving the asked object moves its relevance.

    The object moves by whole cells; another one beside it stays.
    """
    checkpoint = Checkpoint.load(ROOT / "reference")
    tokenizer = Tokenizer.from_file(str(ROOT / "reference" / "tokenizer.json"))
    words = tokenizer.encode("what colour is the circle?", add_special_tokens=False).ids
    ids, mask = torch.zeros(1, 32, dtype=torch.int32), torch.zeros(1, 32, dtype=torch.int32)
    ids[0, : len(words)], mask[0, : len(words)] = torch.tensor(words).int(), 1
    y, x = np.mgrid[:224, :224]
    noise = np.random.default_rng(3).normal(150, 4, (224, 224, 3))
    encoder, module = checkpoint.vision_encoder(), checkpoint.allocator()
    found = []
    for column in (56, 84, 112, 140):
        pixels = noise.copy()
        pixels[150:190, 30:70] = (50, 80, 215)
        pixels[(y - 70) ** 2 + (x - column) ** 2 < 20**2] = (214, 30, 30)
        image = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(2, 0, 1).unsqueeze(0)
        with torch.inference_mode():
            features, saliency, entropy, texture = encoder(image)
            weighed = module.weigh(features, saliency, entropy, texture, ids, mask)
        relevance = weighed.relevance.reshape(16, 16).numpy()
        inside = relevance * (relevance >= relevance.max() / 2)
        found.append([float((inside * line).sum() / inside.sum()) for line in np.mgrid[:16, :16].astype(np.float32)])
    for (row, column), wanted in zip(found, (56, 84, 112, 140), strict=True):
        assert abs(row - 4.5) < 1
        assert abs(column - (wanted / 14 - 0.5)) < 1
