"""LoRA on the language model (Hu et al. 2021), `--adapter-rank`.

It is a measured alternative to a frozen language model.
"""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import OPTForCausalLM

MATRICES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def adapt(language: OPTForCausalLM, rank: int) -> list[nn.Parameter]:
    """Add adapters of this rank to every matrix of the decoder's layers, in place.

    Returns their parameters. They start at zero, so nothing changes before training.
    """
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=MATRICES)  # scaled by one
    inject_adapter_in_model(config, language)
    return [weight for name, weight in language.named_parameters() if ".lora_" in name]


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge a state dict with adapters into one of the plain model, by adding their products to the matrices."""
    plain = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        if BASE not in name:
            plain[name] = value
            continue
        module, own = name.split(BASE)
        total = value + state[module + UP] @ state[module + DOWN] if own == "weight" else value
        plain[f"{module}.{own}"] = total
    return plain
