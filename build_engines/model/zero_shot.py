"""Participatory knowing without training: what a Q-Former looks at once it has read the question.

InstructBLIP's own Q-Former reads it. For BLIP-2, the one of its first stage does, which was published for image-text
retrieval (`Salesforce/blip2-itm-vit-g`). Both see one frozen encoder, but each has its own layer norm behind it:
BLIP-2 trains that with the Q-Former (Li et al. 2023, `ln_vision` in their code).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, Blip2ForImageTextRetrieval

from build_engines.model.qformer import ImageTextQFormer, ReadingQFormer

SAME_ENCODER = 2e-3  # of a tensor's norm: how far weights may be apart that were rounded to FP16, or not
ENCODER, OWN = "vision_model.", "vision_model.post_layernorm."  # the latter is trained, and so differs


class QFormerKnowing(nn.Module):
    """Score each patch by the attention that the Q-Former's queries give it.

    The queries exchange with the question's words before every cross-attention, so that the attention depends on the
    question. It runs that Q-Former once more, on the full view.
    """

    def __init__(self, qformer: ReadingQFormer) -> None:
        super().__init__()
        self.qformer = qformer

    def forward(self, features: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """features [B, 257, D], CLS first; ids and mask int32 [B, 32] -> relevance [B, 256] in [0, 1]."""
        share = self.qformer.attention(features, (question_ids, question_mask))[:, 1:]
        return share / share.amax(1, keepdim=True).clamp(min=1e-9)


def load_image_text(directory: Path, encoder: nn.Module) -> ImageTextQFormer:
    """Load the Q-Former and the matching head of a Blip2ForImageTextRetrieval, in FP32, to read `encoder`'s features.

    Its own vision encoder is not loaded: it must be `encoder`, up to rounding to FP16 and the last layer norm. Raises
    ValueError if it is not, and OSError for a missing file.
    """
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval(AutoConfig.from_pretrained(directory))
    own, weights = encoder.state_dict(), {}
    for name, tensor in _stored(directory):
        if name.startswith(OWN) or not name.startswith(ENCODER):
            weights[name] = tensor
        elif not _agrees(tensor, own.get(name.removeprefix(ENCODER))):
            raise ValueError(
                f"{directory} was trained with another vision encoder ({name} differs): use the image-text checkpoint "
                "of the same encoder"
            )
    model.load_state_dict(weights, strict=False, assign=True)
    return ImageTextQFormer(model.eval(), encoder.post_layernorm)


def weight_files(directory: Path) -> list[str]:
    """The names of a checkpoint's files of weights, whether or not they exist. Raises ValueError for a broken index."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return ["model.safetensors"]
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def _stored(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """One tensor of the checkpoint after the other, in FP32."""
    for name in weight_files(directory):
        with safe_open(directory / name, framework="pt") as file:
            for tensor in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                yield tensor, file.get_tensor(tensor).float()


def _agrees(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.shape != other.shape:
        return False
    return bool((one - other.float()).norm() <= SAME_ENCODER * other.float().norm().clamp(min=1e-6))
