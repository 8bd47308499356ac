"""FlanT5 as two graphs: the encoder, run once for each request, and the decoder, run once for each token.

Encoder:

    input_ids int64 [B, T], right padded, and prompt_embedding_table [B, N, H], as in `decoder.py`. input_lengths int64
    [B] are the valid columns. Attention is in both directions.
    -> cross_key_0, cross_value_0, cross_key_1, ... float [B, heads, T, d], a pair for each layer of the decoder. Later
    columns than a sequence's last hold finite numbers without a meaning.

Decoder, one column a run, the first of which is the decoder's start token:

    input_ids int64 [B, 1]. past_key_0, past_value_0, ... float [B, heads, P, d], of which the first past_lengths int64
    [B] columns are valid. cross_key_0, cross_value_0, ... float [B, heads, T, d], of which the first cross_lengths
    int64 [B] columns are valid.
    -> logits [B, V], and new_key_0, new_value_0, ... [B, heads, 1, d].

Positions are relative, in buckets that grow with the distance. From a greatest distance on, all are one bucket, so a
table of biases by distance is exact for any length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from build_engines.model.attention import bias_where_hidden
from build_engines.model.decoder import attend, embed


class T5Encoder(nn.Module):
    """Read the whole prompt -> the keys and values of the decoder's cross-attention."""

    biases: Tensor

    def __init__(self, language_model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.tokens, self.encoder = language_model.shared, language_model.encoder
        self.cross = nn.ModuleList(block.layer[1].EncDecAttention for block in language_model.decoder.block)
        table = biases_by_distance(self.encoder.block[0].layer[0].SelfAttention, both_ways=True)
        self.register_buffer("biases", table, persistent=False)

    def forward(self, input_ids: Tensor, prompt_embedding_table: Tensor, input_lengths: Tensor) -> tuple[Tensor, ...]:
        hidden = embed(self.tokens, input_ids, prompt_embedding_table)
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        valid = (column < input_lengths.unsqueeze(1)).unsqueeze(1).unsqueeze(1)  # [B, 1, 1, T]
        greatest = (self.biases.shape[0] - 1) // 2
        distance = (column.unsqueeze(0) - column.unsqueeze(1)).clamp(-greatest, greatest) + greatest
        bias = self.biases[distance].permute(2, 0, 1) + bias_where_hidden(valid)  # [B, heads, T, T]
        for block in self.encoder.block:
            attention, normed = block.layer[0].SelfAttention, block.layer[0].layer_norm(hidden)
            query, key, value = (heads(part(normed), attention) for part in (attention.q, attention.k, attention.v))
            hidden = hidden + attention.o(mix(query, key, value, bias))
            hidden = block.layer[1](hidden)
        hidden = self.encoder.final_layer_norm(hidden)
        return tuple(heads(part(hidden), cross) for cross in self.cross for part in (cross.k, cross.v))


class T5Decoder(nn.Module):
    """Read one token of each sequence -> the logits of the next, and the token's own keys and values."""

    biases: Tensor

    def __init__(self, language_model: T5ForConditionalGeneration) -> None:
        super().__init__()
        self.tokens, self.decoder, self.lm_head = (
            language_model.shared, language_model.decoder, language_model.lm_head
        )  # fmt: skip
        config = language_model.config
        self.scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0  # T5 1.0; FlanT5 does not scale
        table = biases_by_distance(self.decoder.block[0].layer[0].SelfAttention, both_ways=False)
        self.register_buffer("biases", table, persistent=False)

    def forward(
        self, input_ids: Tensor, past_lengths: Tensor, cross_lengths: Tensor, *keys_and_values: Tensor
    ) -> tuple[Tensor, ...]:
        """`keys_and_values` are past_key_0, past_value_0, ... of every layer, then cross_key_0, cross_value_0, ..."""
        half = len(keys_and_values) // 2
        past, cross = keys_and_values[:half], keys_and_values[half:]
        hidden = self.tokens(input_ids)
        past_column = torch.arange(past[0].shape[2], device=input_ids.device)
        back = past_lengths.unsqueeze(1) - past_column  # [B, P], at least 1 in valid columns
        seen = bias_where_hidden((back > 0).unsqueeze(1).unsqueeze(1))
        by_distance = self.biases[back.clamp(0, self.biases.shape[0] - 1)].permute(0, 2, 1).unsqueeze(2)
        bias = (by_distance + seen, self.biases[0].view(1, -1, 1, 1))  # of the past, and of the token itself
        cross_column = torch.arange(cross[0].shape[2], device=input_ids.device)
        cross_bias = bias_where_hidden((cross_column < cross_lengths.unsqueeze(1)).unsqueeze(1).unsqueeze(1))

        new: list[Tensor] = []
        for index, block in enumerate(self.decoder.block):
            pair = slice(2 * index, 2 * index + 2)
            attention, normed = block.layer[0].SelfAttention, block.layer[0].layer_norm(hidden)
            query, key, value = (heads(part(normed), attention) for part in (attention.q, attention.k, attention.v))
            new += [key, value]
            hidden = hidden + attention.o(attend(query, past[pair], (key, value), bias))
            attention, normed = block.layer[1].EncDecAttention, block.layer[1].layer_norm(hidden)
            hidden = hidden + attention.o(mix(heads(attention.q(normed), attention), *cross[pair], cross_bias))
            hidden = block.layer[2](hidden)

        hidden = self.decoder.final_layer_norm(hidden).squeeze(1)
        return self.lm_head(hidden * self.scale), *new


def heads(hidden: Tensor, attention: T5Attention) -> Tensor:
    """[B, T, heads * d] -> [B, heads, T, d]"""
    return hidden.unflatten(2, (attention.n_heads, attention.key_value_proj_dim)).transpose(1, 2)


def mix(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention without T5's missing scale: query [B, heads, T, d] over [B, heads, S, d] -> [B, T, heads * d]."""
    weights = torch.softmax(query @ key.transpose(2, 3) + bias, dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def biases_by_distance(attention: T5Attention, *, both_ways: bool) -> Tensor:
    """Look up the relative position bias of every distance that has one of its own: float [distances, heads].

    Row i stands for a column i back, up to the greatest distance M. With `both_ways`, row M + i stands for a column i
    ahead, and row M - i for one i back.
    """
    greatest = attention.relative_attention_max_distance
    ahead = torch.arange(-greatest, greatest + 1) if both_ways else -torch.arange(greatest + 1)
    buckets = attention._relative_position_bucket(
        ahead,
        bidirectional=both_ways,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=greatest,
    )
    return attention.relative_attention_bias.weight.detach()[buckets].clone()
