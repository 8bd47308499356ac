"""Q-Former graph: vision tokens in, visual tokens (rows of the LLM's hidden size) out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    InstructBlipVideoForConditionalGeneration,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerAttention
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerAttention

from build_engines.model.attention import attend, bias_where_hidden


class QFormer(nn.Module):
    """BLIP-2's Q-Former: vision_tokens [B, N, D] and attend int32 [B, N] -> visual_tokens [B, 32, H].

    attend (the argument `visible`) is 1 for a token that the queries may read.
    """

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.query_tokens = model.query_tokens
        self.layernorm = model.qformer.layernorm
        self.layers = model.qformer.encoder.layer
        self.language_projection = model.language_projection

    def forward(self, vision_tokens: Tensor, visible: Tensor) -> Tensor:
        bias = bias_where_hidden(visible[:, None, None, :] > 0)
        return self.language_projection(self.read(vision_tokens, bias))

    def read(
        self,
        vision_tokens: Tensor,
        bias: Tensor | None = None,
        gates: Tensor | None = None,
        owner: Tensor | None = None,
    ) -> Tensor:
        """Run the queries over the vision tokens -> [B, 32, width of the Q-Former].

        bias [B, 1, 1, N] hides tokens. In training, gates [B, N] do so instead (`relaxation.gates_of`). With owner
        int64 [B], row i reads the tokens of image owner[i]. The keys and values of an image are then computed once for
        all questions about it.
        """
        rows = vision_tokens.shape[0] if owner is None else owner.shape[0]
        hidden = self.layernorm(self.query_tokens).expand(rows, -1, -1)
        for layer in self.layers:
            hidden = attend_block(layer.attention, hidden, hidden, None)
            if layer.has_cross_attention:
                hidden = attend_block(layer.crossattention, hidden, vision_tokens, bias, gates, owner)
            hidden = layer.output_query(layer.intermediate_query(hidden), hidden)
        return hidden

    def attention(self, vision_tokens: Tensor) -> Tensor:
        """The share of the queries' attention that each vision token gets, [B, N]: mean over layers, heads, queries.

        vision_tokens [B, N, D], all of them visible.
        """
        hidden = self.layernorm(self.query_tokens).expand(vision_tokens.shape[0], -1, -1)
        shares = []
        for layer in self.layers:
            hidden = attend_block(layer.attention, hidden, hidden, None)
            if layer.has_cross_attention:
                shares.append(_shares(layer.crossattention, hidden, vision_tokens))
                hidden = attend_block(layer.crossattention, hidden, vision_tokens, None)
            hidden = layer.output_query(layer.intermediate_query(hidden), hidden)
        return torch.stack(shares).mean(0)


class InstructQFormer(nn.Module):
    """InstructBLIP's Q-Former, whose queries also read the question. InstructBLIP-Video's reads one frame at a time.

    vision_tokens [B, N, D], attend int32 [B, N], question_ids and question_mask int32 [B, 32] -> visual_tokens [B, 32,
    H]. The ids are those of its own tokenizer, with [CLS] and [SEP].
    """

    def __init__(self, model: InstructBlipForConditionalGeneration | InstructBlipVideoForConditionalGeneration) -> None:
        super().__init__()
        self.query_tokens = model.query_tokens
        self.words = model.qformer.embeddings.word_embeddings
        self.positions = model.qformer.embeddings.position_embeddings
        self.layernorm = model.qformer.embeddings.layernorm
        self.layers = model.qformer.encoder.layer
        self.language_projection = model.language_projection

    def forward(self, vision_tokens: Tensor, visible: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        image_bias = bias_where_hidden(visible[:, None, None, :] > 0)
        return self.language_projection(self.read(vision_tokens, (question_ids, question_mask), image_bias))

    def read(
        self,
        vision_tokens: Tensor,
        question: tuple[Tensor, Tensor],
        bias: Tensor | None = None,
        gates: Tensor | None = None,
        owner: Tensor | None = None,
    ) -> Tensor:
        """As `QFormer.read`, with the question's ids and mask, each [B, 32]."""
        hidden, text_bias, count = self._begin(question)
        for layer in self.layers:
            hidden = attend_block(layer.attention, hidden, hidden, text_bias)
            hidden = self._look(layer, hidden, count, vision_tokens, bias, gates, owner)
        return hidden[:, :count]

    def attention(self, vision_tokens: Tensor, question: tuple[Tensor, Tensor]) -> Tensor:
        """The share of the queries' attention that each vision token gets, [B, N]: mean over layers, heads, queries.

        vision_tokens [B, N, D], question ids and mask [B, 32]. The queries have read the question before they look.
        """
        hidden, text_bias, count = self._begin(question)
        looking = [number for number, layer in enumerate(self.layers) if layer.has_cross_attention]
        shares = []
        for layer in self.layers[: looking[-1] + 1]:
            hidden = attend_block(layer.attention, hidden, hidden, text_bias)
            if layer.has_cross_attention:
                shares.append(_shares(layer.crossattention, hidden[:, :count], vision_tokens))
            hidden = self._look(layer, hidden, count, vision_tokens, None, None, None)
        return torch.stack(shares).mean(0)

    def _begin(self, question: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
        """Queries and words [B, 64, width], the bias that hides padding, and the number of queries."""
        question_ids, question_mask = question
        queries = self.query_tokens.expand(question_ids.shape[0], -1, -1)
        words = self.words(question_ids) + self.positions.weight[: question_ids.shape[1]]
        hidden = self.layernorm(torch.cat([queries, words], dim=1))
        read = torch.cat([torch.ones_like(queries[:, :, 0]), question_mask.float()], dim=1)
        return hidden, bias_where_hidden(read[:, None, None, :] > 0), queries.shape[1]

    def _look(
        self, layer: nn.Module, hidden: Tensor, count: int, vision_tokens: Tensor, bias: Tensor | None,
        gates: Tensor | None, owner: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The rest of a layer after its self-attention."""
        queries, words = hidden[:, :count], hidden[:, count:]
        if layer.has_cross_attention:
            queries = attend_block(layer.crossattention, queries, vision_tokens, bias, gates, owner)
        queries = layer.output_query(layer.intermediate_query(queries), queries)
        words = layer.output(layer.intermediate(words), words)
        return torch.cat([queries, words], dim=1)


def attend_block(
    block: Blip2QFormerAttention | InstructBlipQFormerAttention,
    hidden: Tensor,
    context: Tensor,
    bias: Tensor | None,
    gates: Tensor | None = None,
    owner: Tensor | None = None,
) -> Tensor:
    attention = block.attention
    heads = (attention.num_attention_heads, attention.attention_head_size)
    query = attention.query(hidden).unflatten(2, heads).transpose(1, 2) * attention.scaling
    key = attention.key(context).unflatten(2, heads).transpose(1, 2)
    value = attention.value(context).unflatten(2, heads).transpose(1, 2)
    if owner is not None:
        key, value = key[owner], value[owner]
    return block.output(attend(query, key, value, bias, gates), hidden)


def _shares(block: Blip2QFormerAttention | InstructBlipQFormerAttention, hidden: Tensor, context: Tensor) -> Tensor:
    """Attention [B, N] of a block over its context [B, N, D]: mean over heads and queries."""
    attention = block.attention
    heads = (attention.num_attention_heads, attention.attention_head_size)
    query = attention.query(hidden).unflatten(2, heads).transpose(1, 2) * attention.scaling
    key = attention.key(context).unflatten(2, heads).transpose(1, 2)
    return torch.softmax(query @ key.transpose(2, 3), dim=-1).mean((1, 2))
