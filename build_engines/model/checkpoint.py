"""A BLIP-2 checkpoint on disk in Hugging Face's format, with the allocator's weights beside it where it has them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration

from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.decoder import Decoder
from build_engines.model.knowing import ParticipatoryKnowing
from build_engines.model.qformer import QFormer
from build_engines.model.vision import VisionEncoder

# OpenAI CLIP's statistics, which BLIP-2's image processor uses when a checkpoint does not say otherwise.
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
BLIP2_PROMPT = "Question: {question} Answer:"


@dataclass(frozen=True)
class Checkpoint:
    """The whole model in FP32 on the CPU, in eval mode."""

    directory: Path
    model: Blip2ForConditionalGeneration
    participatory: ParticipatoryKnowing | None
    image_mean: list[float]
    image_std: list[float]
    card: dict[str, object]  # model_card.json, empty where there is none

    @classmethod
    def load(cls, directory: Path) -> Checkpoint:
        """Reads config.json, model.safetensors, and where present preprocessor_config.json, model_card.json and
        allocator.safetensors. Raises OSError for what is missing and ValueError for another architecture."""
        config = _read_json(directory / "config.json")
        architectures = config.get("architectures", [])
        if "Blip2ForConditionalGeneration" not in architectures:
            raise ValueError(
                f"{directory} holds {architectures or 'no architecture'}, not Blip2ForConditionalGeneration"
            )
        model = Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        preprocessor = _read_json(directory / "preprocessor_config.json", default={})
        participatory = None
        if (directory / "allocator.safetensors").exists():
            participatory = _participatory(load_file(directory / "allocator.safetensors"))
        return cls(
            directory=directory,
            model=model,
            participatory=participatory,
            image_mean=preprocessor.get("image_mean", CLIP_MEAN),
            image_std=preprocessor.get("image_std", CLIP_STD),
            card=_read_json(directory / "model_card.json", default={}),
        )

    def vision_encoder(self) -> VisionEncoder:
        return VisionEncoder(self.model.vision_model, self.image_mean, self.image_std).eval()

    def allocator(self) -> RelevanceAllocator:
        return RelevanceAllocator(self.participatory).eval()

    def qformer(self) -> QFormer:
        return QFormer(self.model).eval()

    def decoder(self) -> Decoder:
        return Decoder(self.model.language_model).eval()

    def vision_fingerprint(self) -> str:
        """Of everything that a vision feature depends on, 16 hex digits."""
        return _fingerprint(self.image_mean, self.image_std, self.model.vision_model)

    def visual_fingerprint(self) -> str:
        """Of everything that a visual token depends on, 16 hex digits."""
        return _fingerprint(self.image_mean, self.image_std, self.vision_encoder(), self.allocator(), self.qformer())


def _fingerprint(image_mean: list[float], image_std: list[float], *modules: nn.Module) -> str:
    digest = hashlib.sha256(repr((image_mean, image_std)).encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _participatory(weights: dict[str, Tensor]) -> ParticipatoryKnowing:
    """The trained module, its widths read from its weights (keys `participatory.*`, any float type)."""
    own = {name.removeprefix("participatory."): weight.float() for name, weight in weights.items()}
    vocabulary, token_width = own["tokens.weight"].shape
    coupling_width, width = own["patch.weight"].shape[0], own["patch_norm.weight"].shape[0]
    module = ParticipatoryKnowing(vocabulary, width, token_width, coupling_width)
    module.load_state_dict(own)
    return module.eval()


def _read_json(path: Path, default: dict[str, object] | None = None) -> dict:
    if default is not None and not path.exists():
        return default
    return json.loads(path.read_text())
