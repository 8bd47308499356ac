"""Vision encoder graph: pixels to features, saliency, entropy, texture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention, Blip2VisionModel

from build_engines.model.attention import attend
from build_engines.model.texture import Texture


class VisionEncoder(nn.Module):
    """Encode images and compute the maps that the allocator reads.

    uint8 RGB [B, 3, 224, 224] -> features [B, 257, D], saliency [B, 256], entropy [B, 256], texture [B, 13, 16, 16].

    Features are the encoder's last hidden state after its final layer norm, CLS first. `Blip2ForConditionalGeneration`
    passes the same tensor to its Q-Former. Saliency is the last layer's attention from CLS to each patch, averaged over
    the heads.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vision: Blip2VisionModel, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.embeddings = vision.embeddings
        self.layers = vision.encoder.layers
        self.post_layernorm = vision.post_layernorm
        self.texture = Texture(vision.config.image_size)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rgb = image.float() / 255
        texture, entropy = self.texture(rgb)
        hidden = self.embeddings((rgb - self.mean) / self.std)
        saliency = hidden.new_zeros(())
        for layer in self.layers:
            query, key, value = split_heads(layer.self_attn, layer.layer_norm1(hidden))
            # Only the last layer's saliency is used. The exported graph drops the others.
            saliency = torch.softmax(query[:, :, :1] @ key.transpose(2, 3), dim=-1).mean(1)[:, 0, 1:]
            hidden = hidden + layer.self_attn.projection(attend(query, key, value))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return self.post_layernorm(hidden), saliency, entropy, texture


def split_heads(attention: Blip2Attention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, D] -> query (already scaled), key, value, each [B, heads, T, head_dim]."""
    batch, length, width = hidden.shape
    shape = (batch, length, 3, attention.num_heads, width // attention.num_heads)
    query, key, value = attention.qkv(hidden).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
    return query * attention.scale, key, value
