"""The Q-Former as one graph: vision tokens in, visual tokens (rows of the LLM's hidden size) out."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerAttention

from build_engines.model.attention import attend, bias_where_hidden


class QFormer(nn.Module):
    """vision_tokens [B, N, D] and attend int32 [B, N] (1 = visible) -> visual_tokens [B, 32, H]."""

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.query_tokens = model.query_tokens
        self.layernorm = model.qformer.layernorm
        self.layers = model.qformer.encoder.layer
        self.language_projection = model.language_projection

    def forward(self, vision_tokens: Tensor, visible: Tensor) -> Tensor:
        bias = bias_where_hidden(visible[:, None, None, :] > 0)
        hidden = self.layernorm(self.query_tokens).expand(vision_tokens.shape[0], -1, -1)
        for layer in self.layers:
            hidden = _attend(layer.attention, hidden, hidden, None)
            if layer.has_cross_attention:
                hidden = _attend(layer.crossattention, hidden, vision_tokens, bias)
            hidden = layer.output_query(layer.intermediate_query(hidden), hidden)
        return self.language_projection(hidden)


def _attend(block: Blip2QFormerAttention, hidden: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
    attention = block.attention
    heads = (attention.num_attention_heads, attention.attention_head_size)
    query = attention.query(hidden).unflatten(2, heads).transpose(1, 2) * attention.scaling
    key = attention.key(context).unflatten(2, heads).transpose(1, 2)
    value = attention.value(context).unflatten(2, heads).transpose(1, 2)
    return block.output(attend(query, key, value, bias), hidden)
