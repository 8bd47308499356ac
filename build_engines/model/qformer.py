"""Q-Former graph: vision tokens in, visual tokens (rows of the LLM's hidden size) out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
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
                shares.append(_shares(layer.crossattention, hidden, vision_tokens).mean(1))
                hidden = attend_block(layer.crossattention, hidden, vision_tokens, None)
            hidden = layer.output_query(layer.intermediate_query(hidden), hidden)
        return torch.stack(shares).mean(0)


class ReadingQFormer(nn.Module):
    """A Q-Former whose queries also read a text, in the ids of its own tokenizer with [CLS] and [SEP]."""

    def __init__(self, query_tokens: Tensor, embeddings: nn.Module, layernorm: nn.Module, layers: nn.Module) -> None:
        super().__init__()
        self.query_tokens = query_tokens
        self.words = embeddings.word_embeddings
        self.positions = embeddings.position_embeddings
        self.layernorm = layernorm
        self.layers = layers

    def attention(self, vision_tokens: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """The share of the queries' attention that each vision token gets, [B, N]: mean over layers, heads, queries.

        vision_tokens [B, N, D], the text's ids and mask int32 [B, 32]. The queries have read the text before they look.
        """
        hidden, text_bias, count = self._begin(text)
        looking = [number for number, layer in enumerate(self.layers) if layer.has_cross_attention]
        shares = []
        for layer in self.layers[: looking[-1] + 1]:
            hidden = attend_block(layer.attention, hidden, hidden, text_bias)
            if layer.has_cross_attention:
                shares.append(_shares(layer.crossattention, hidden[:, :count], vision_tokens).mean(1))
            hidden = self._look(layer, hidden, count, vision_tokens)
        return torch.stack(shares).mean(0)

    def _begin(self, text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
        """Queries and words [B, 64, width], the bias that hides padding, and the number of queries."""
        ids, mask = text
        queries = self.query_tokens.expand(ids.shape[0], -1, -1)
        words = self.words(ids) + self.positions.weight[: ids.shape[1]]
        hidden = self.layernorm(torch.cat([queries, words], dim=1))
        read = torch.cat([torch.ones_like(queries[:, :, 0]), mask.float()], dim=1)
        return hidden, bias_where_hidden(read[:, None, None, :] > 0), queries.shape[1]

    def _look(
        self, layer: nn.Module, hidden: Tensor, count: int, vision_tokens: Tensor, bias: Tensor | None = None,
        gates: Tensor | None = None, owner: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The rest of a layer after its self-attention."""
        queries, words = hidden[:, :count], hidden[:, count:]
        if layer.has_cross_attention:
            queries = attend_block(layer.crossattention, queries, vision_tokens, bias, gates, owner)
        queries = layer.output_query(layer.intermediate_query(queries), queries)
        words = layer.output(layer.intermediate(words), words)
        return torch.cat([queries, words], dim=1)


class InstructQFormer(ReadingQFormer):
    """InstructBLIP's Q-Former, whose queries read the question. InstructBLIP-Video's reads one frame at a time.

    vision_tokens [B, N, D], attend int32 [B, N], question_ids and question_mask int32 [B, 32] -> visual_tokens [B, 32,
    H].
    """

    def __init__(self, model: InstructBlipForConditionalGeneration | InstructBlipVideoForConditionalGeneration) -> None:
        qformer = model.qformer
        super().__init__(model.query_tokens, qformer.embeddings, qformer.embeddings.layernorm, qformer.encoder.layer)
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


class ImageTextQFormer(ReadingQFormer):
    """The Q-Former of BLIP-2's first stage with its head for image-text matching (Blip2ForImageTextRetrieval).

    It reads the vision tokens of another BLIP-2. Both have one frozen encoder, but each has trained the layer norm
    behind it. `norm` is that of the other, whose weight and bias are undone before the own ones are applied.
    """

    def __init__(self, model: Blip2ForImageTextRetrieval, norm: nn.LayerNorm) -> None:
        """Raises ValueError if the other's layer norm cannot be undone, because a weight of it is 0."""
        super().__init__(model.query_tokens, model.embeddings, model.qformer.layernorm, model.qformer.encoder.layer)
        self.head = model.itm_head
        if not norm.weight.all():
            raise ValueError("the layer norm behind the vision encoder has a weight of 0: use `glimpse adapt`")
        own = model.vision_model.post_layernorm
        scale = own.weight.detach() / norm.weight.detach()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", own.bias.detach() - norm.bias.detach() * scale)

    def attention(self, vision_tokens: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """As `ReadingQFormer.attention`, but a query counts by how well it matches the text, by the head."""
        matches, shares = self.matches(vision_tokens, text)
        weights = torch.softmax(matches[..., 1] - matches[..., 0], dim=1)
        return (weights[..., None] * shares).sum(1)

    def matches(self, vision_tokens: Tensor, text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Each query's logits of no match and of a match [B, 32, 2], and its shares of attention [B, 32, N].

        The checkpoint's own logits of an image and a text are the mean over queries. The shares are means over layers
        and heads.
        """
        vision_tokens = vision_tokens * self.scale + self.shift
        hidden, text_bias, count = self._begin(text)
        shares = []
        for layer in self.layers:
            hidden = attend_block(layer.attention, hidden, hidden, text_bias)
            if layer.has_cross_attention:
                shares.append(_shares(layer.crossattention, hidden[:, :count], vision_tokens))
            hidden = self._look(layer, hidden, count, vision_tokens)
        return self.head(hidden[:, :count]), torch.stack(shares).mean(0)


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
    """Attention [B, queries, N] of a block over its context [B, N, D]: mean over heads."""
    attention = block.attention
    heads = (attention.num_attention_heads, attention.attention_head_size)
    query = attention.query(hidden).unflatten(2, heads).transpose(1, 2) * attention.scaling
    key = attention.key(context).unflatten(2, heads).transpose(1, 2)
    return torch.softmax(query @ key.transpose(2, 3), dim=-1).mean(1)
