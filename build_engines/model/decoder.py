"""The language model as one graph, with its KV cache passed in and out.

Prefill and decode are the same graph at other lengths. One step runs over a batch of sequences of different lengths.
The interface is the same for every family:

    input_ids int64 [B, T], right padded: ids below the vocabulary size are text, V + i is row i of the sequence's
    prompt_embedding_table [B, N, H]. past_key_0, past_value_0, past_key_1, ... float [B, heads, P, head_dim], a pair a
    layer, of which the first past_lengths int64 [B] columns are valid. input_lengths int64 [B] are the valid columns
    of input_ids.
    -> logits [B, V] at each sequence's last valid column, and new_key_0, new_value_0, ... [B, heads, T, head_dim].

A column's position is its sequence's past length plus its index in input_ids. `heads` are those of keys and values. The
past is read in place: concatenating it with the new columns would copy it at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, OPTForCausalLM

from build_engines.model.attention import bias_where_hidden

FIXED_ROPE = ("default", "linear", "llama3")  # kinds of rotary positions with angles that do not depend on the length


class OptDecoder(nn.Module):
    """OPT with layer norm before attention: learned positions, ReLU."""

    def __init__(self, language_model: OPTForCausalLM) -> None:
        super().__init__()
        decoder = language_model.model.decoder
        if not decoder.config.do_layer_norm_before:
            raise ValueError("OPT with layer norm after attention (OPT-350m) is not supported: use another OPT")
        self.decoder = decoder
        self.vocab_size = decoder.config.vocab_size
        self.lm_head = language_model.lm_head

    def forward(
        self, input_ids: Tensor, prompt_embedding_table: Tensor, past_lengths: Tensor, input_lengths: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        hidden = embed(self.decoder.embed_tokens, input_ids, prompt_embedding_table)
        if self.decoder.project_in is not None:
            hidden = self.decoder.project_in(hidden)
        positions = positions_of(input_ids, past_lengths)
        positions = positions.clamp(max=self.decoder.config.max_position_embeddings - 1)  # changes padding columns only
        embed_positions = self.decoder.embed_positions
        hidden = hidden + nn.functional.embedding(positions + embed_positions.offset, embed_positions.weight)
        bias = causal_bias(input_ids, past[0], past_lengths)

        new: list[Tensor] = []
        for index, layer in enumerate(self.decoder.layers):
            attention = layer.self_attn
            heads = (attention.num_heads, attention.head_dim)
            normed = layer.self_attn_layer_norm(hidden)
            query = (attention.q_proj(normed) * attention.scaling).unflatten(2, heads).transpose(1, 2)
            key = attention.k_proj(normed).unflatten(2, heads).transpose(1, 2)
            value = attention.v_proj(normed).unflatten(2, heads).transpose(1, 2)
            new += [key, value]
            hidden = hidden + attention.out_proj(attend(query, past[2 * index : 2 * index + 2], (key, value), bias))
            normed = layer.final_layer_norm(hidden)
            hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(normed)))

        hidden = at_last(hidden, input_lengths)
        if self.decoder.final_layer_norm is not None:
            hidden = self.decoder.final_layer_norm(hidden)
        if self.decoder.project_out is not None:
            hidden = self.decoder.project_out(hidden)
        return self.lm_head(hidden), *new


class LlamaDecoder(nn.Module):
    """Llama and Vicuna: rotary positions, RMS norm, SwiGLU, grouped-query attention. Keys are cached after rotation."""

    inverse_frequencies: Tensor

    def __init__(self, language_model: LlamaForCausalLM) -> None:
        super().__init__()
        decoder, config = language_model.model, language_model.config
        if decoder.rotary_emb.rope_type not in FIXED_ROPE:
            raise ValueError(
                f"rotary positions of type {decoder.rotary_emb.rope_type} change with the length: "
                f"use a model with one of {', '.join(FIXED_ROPE)}"
            )
        self.decoder = decoder
        self.vocab_size = config.vocab_size
        self.lm_head = language_model.lm_head
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.register_buffer("inverse_frequencies", decoder.rotary_emb.inv_freq.float(), persistent=False)
        self.rotary_scaling = decoder.rotary_emb.attention_scaling

    def forward(
        self, input_ids: Tensor, prompt_embedding_table: Tensor, past_lengths: Tensor, input_lengths: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        hidden = embed(self.decoder.embed_tokens, input_ids, prompt_embedding_table)
        angles = positions_of(input_ids, past_lengths).unsqueeze(2).float() * self.inverse_frequencies
        turn = torch.cat([angles, angles], dim=2).unsqueeze(1)  # [B, 1, T, head_dim]
        cosine, sine = turn.cos() * self.rotary_scaling, turn.sin() * self.rotary_scaling
        bias = causal_bias(input_ids, past[0], past_lengths)

        new: list[Tensor] = []
        for index, layer in enumerate(self.decoder.layers):
            attention = layer.self_attn
            normed = layer.input_layernorm(hidden)
            query, key, value = (
                projection(normed).unflatten(2, (heads, attention.head_dim)).transpose(1, 2)
                for projection, heads in (
                    (attention.q_proj, self.heads),
                    (attention.k_proj, self.kv_heads),
                    (attention.v_proj, self.kv_heads),
                )
            )
            query = rotated(query * attention.scaling, cosine, sine)
            key = rotated(key, cosine, sine)
            new += [key, value]
            hidden = hidden + attention.o_proj(attend(query, past[2 * index : 2 * index + 2], (key, value), bias))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))

        hidden = self.decoder.norm(at_last(hidden, input_lengths))
        return self.lm_head(hidden), *new


def decoder_of(language_model: nn.Module) -> OptDecoder | LlamaDecoder:
    """Build the graph of an OPT or Llama model. Raises ValueError for another family."""
    if isinstance(language_model, OPTForCausalLM):
        return OptDecoder(language_model)
    if isinstance(language_model, LlamaForCausalLM):
        return LlamaDecoder(language_model)
    raise ValueError(
        f"the language model {type(language_model).__name__} cannot be exported: use OPT or Llama (Vicuna)"
    )


def embed(tokens: nn.Embedding, input_ids: Tensor, prompt_embedding_table: Tensor) -> Tensor:
    """Embed text ids by the model's table and visual ids by the sequence's prompt table: [B, T, H]."""
    vocab_size = tokens.num_embeddings
    text = tokens(input_ids.clamp(max=vocab_size - 1))
    row = (input_ids - vocab_size).clamp(min=0).unsqueeze(2).expand(-1, -1, prompt_embedding_table.shape[2])
    visual = prompt_embedding_table.gather(1, row)
    return torch.where((input_ids >= vocab_size).unsqueeze(2), visual, text)


def positions_of(input_ids: Tensor, past_lengths: Tensor) -> Tensor:
    """int64 [B, T]"""
    return past_lengths.unsqueeze(1) + torch.arange(input_ids.shape[1], device=input_ids.device)


def causal_bias(input_ids: Tensor, past_key: Tensor, past_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Let a column see its sequence's past, float [B, 1, 1, P], and new columns up to itself, float [T, T]."""
    column = torch.arange(input_ids.shape[1], device=input_ids.device)
    past = torch.arange(past_key.shape[2], device=input_ids.device)
    sees_past = (past < past_lengths.unsqueeze(1)).unsqueeze(1).unsqueeze(1)
    return bias_where_hidden(sees_past), bias_where_hidden(column.unsqueeze(0) <= column.unsqueeze(1))


def attend(query: Tensor, past: Sequence[Tensor], new: Sequence[Tensor], bias: tuple[Tensor, Tensor]) -> Tensor:
    """query (scaled) [B, heads, T, d]; past (key, value) [B, kv_heads, P, d], new [B, kv_heads, T, d]; bias for each.

    -> [B, T, heads * d]. Neighbouring query heads that share a key head become more rows of it. No key is copied.
    """
    (past_key, past_value), (key, value), (past_bias, new_bias) = past, new, bias
    kv_heads, columns = key.shape[1], past_key.shape[2]
    share = query.shape[1] // kv_heads
    if share > 1:
        query = query.unflatten(1, (kv_heads, share)).flatten(2, 3)  # [B, kv_heads, share * T, d]
        new_bias = new_bias.repeat(share, 1)
    scores = [query @ past_key.transpose(2, 3) + past_bias, query @ key.transpose(2, 3) + new_bias]
    weights = torch.softmax(torch.cat(scores, dim=3), dim=-1)
    mixed = weights[..., :columns] @ past_value + weights[..., columns:] @ value
    if share > 1:
        mixed = mixed.unflatten(2, (share, -1)).flatten(1, 2)
    return mixed.transpose(1, 2).flatten(2)


def at_last(hidden: Tensor, input_lengths: Tensor) -> Tensor:
    """[B, T, H] -> [B, H] at each sequence's last valid column."""
    last = (input_lengths - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, last).squeeze(1)


def rotated(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """[B, heads, T, head_dim], each half-pair rotated by its position's angle (RoFormer, in Llama's layout)."""
    half = heads.shape[3] // 2
    return heads * cosine + torch.cat([-heads[..., half:], heads[..., :half]], dim=3) * sine
