"""The formulas against PyTorch's own counter, on tiny checkpoints of both families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Blip2Config

from build_engines.model import flops
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.balancing import OpponentProcessing
from build_engines.model.checkpoint import Checkpoint
from build_engines.model.closer import CloserView
from build_engines.model.knowing import ParticipatoryKnowing
from tests.support.tiny_checkpoints import save_blip2_opt, save_instructblip_vicuna

pytestmark = pytest.mark.slow

SAVED: dict[str, Callable[[Path], None]] = {
    "blip2-opt": save_blip2_opt, "instructblip-vicuna": save_instructblip_vicuna
}  # fmt: skip
WIDTH = 48


@pytest.fixture(scope="module", params=SAVED)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    SAVED[request.param](folder)
    return Checkpoint.load(folder)


def counted(module: nn.Module, *inputs: Tensor | None) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops()


def question() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 32, dtype=torch.int32), torch.ones(1, 32, dtype=torch.int32)


def test_encoder(tiny: Checkpoint) -> None:
    vision = tiny.model.config.vision_config
    found = counted(tiny.vision_encoder(), torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    # PyTorch computes the saliency of every layer. The exported graph drops all but the last.
    dropped = (vision.num_hidden_layers - 1) * flops.product(1, vision.hidden_size, 257)
    assert flops.encoder(vision) == found - dropped


@pytest.mark.parametrize(("participatory", "balancing"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("closer", [False, True])
def test_allocator(participatory: bool, balancing: bool, closer: bool) -> None:
    knowing = ParticipatoryKnowing(300, WIDTH)
    module = RelevanceAllocator(
        knowing if participatory else None,
        OpponentProcessing(knowing.coupling_width) if balancing else None,
        CloserView(WIDTH),
    )
    seen = [torch.rand(1, 257, WIDTH), torch.rand(1, 256), torch.rand(1, 256), torch.rand(1, 13, 16, 16)]
    budget = torch.tensor([[64, 400, 32, 128]], dtype=torch.int32)
    found = counted(module, *seen, *question(), budget, torch.rand(1, 1024, WIDTH) if closer else None)
    assert flops.allocator(WIDTH, participatory=participatory, balancing=balancing, closer=closer) == found


def test_qformer(tiny: Checkpoint) -> None:
    config, found = tiny.model.config, []
    for tokens in (65, 257, 36):
        asked = question() if tiny.reads_question else ()
        visible = torch.ones(1, tokens, dtype=torch.int32)
        found.append(counted(tiny.qformer(), torch.rand(1, tokens, WIDTH), visible, *asked))
    assert flops.qformer(config, [65]) == found[0]
    assert flops.qformer(config, [257, 36, 36]) == found[1] + 2 * found[2]


def llm_step(tiny: Checkpoint, tokens: int, past: int) -> int:
    text = tiny.model.config.text_config
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    size = (1, heads, past, text.hidden_size // text.num_attention_heads)
    given = [torch.zeros(1, tokens, dtype=torch.long), torch.rand(1, 3, text.hidden_size)]
    kept = [torch.rand(size) for _ in range(2 * text.num_hidden_layers)]
    return counted(tiny.decoder(), *given, torch.tensor([past]), torch.tensor([tokens]), *kept)


def test_llm(tiny: Checkpoint) -> None:
    text = tiny.model.config.text_config
    assert flops.prefill(text, 44) == llm_step(tiny, 44, 0)
    assert flops.decode(text, 44, 1) == 0
    assert flops.decode(text, 44, 3) == llm_step(tiny, 1, 44) + llm_step(tiny, 1, 45)


def test_of_a_real_checkpoints_size_without_its_weights() -> None:
    """Bound the counts of BLIP-2's default configuration by its parameters.

    The defaults are ViT-g, its Q-Former and a smaller sibling of OPT-2.7b. Li et al. 2023 gives no figure. A matrix of
    p parameters costs 2 p a token.
    """
    config = Blip2Config()
    vision = config.vision_config
    parameters = vision.num_hidden_layers * (
        4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    )
    assert 2 * 257 * parameters < flops.encoder(vision) < 2.2 * 257 * parameters
    assert flops.qformer(config, [65]) < flops.qformer(config, [257]) < flops.qformer(config, [257, 37, 37, 37])
