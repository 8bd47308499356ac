"""LoRA (Hu et al. 2021) on the Q-Former's cross-attention, so that it gets used to pooled tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from build_engines.train.adapters import merged

CROSS_ATTENTION = r".*crossattention\.attention\.(query|key|value)"
PREFIX = "qformer."  # of the Q-Former's weights in a checkpoint


def adapt(qformer: nn.Module, rank: int) -> list[nn.Parameter]:
    """Add adapters of this rank, in place -> their parameters. They start at zero, so nothing changes at first."""
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=CROSS_ATTENTION), qformer
    )
    return [weight for name, weight in qformer.named_parameters() if ".lora_" in name]


@contextmanager
def without(qformer: nn.Module) -> Iterator[None]:
    """The Q-Former as it was, for the teacher."""
    layers = [module for module in qformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for name, weight in qformer.named_parameters():
            if ".lora_" in name:
                weight.requires_grad_(True)


def changed(qformer: nn.Module) -> dict[str, Tensor]:
    """The cross-attention's weights with their adapters added, by their names in a checkpoint."""
    plain = merged(qformer.state_dict())
    return {
        PREFIX + name: weight.contiguous() for name, weight in plain.items() if ".crossattention.attention." in name
    }
