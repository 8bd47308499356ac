"""The OPT decoder as one graph with its KV cache outside: prefill and decode are the same graph at other lengths."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import OPTForCausalLM

from build_engines.model.attention import attend, bias_where_hidden


class Decoder(nn.Module):
    """One step over a batch of sequences of different lengths.

    input_ids int64 [B, T], right padded: ids below the vocabulary size are text, V + i is row i of the sequence's
    prompt_embedding_table [B, N, H]. past_kv [B, L, 2, heads, P, head_dim], of which the first past_lengths int64 [B]
    columns are valid. input_lengths int64 [B] are the valid columns of input_ids.
    Returns logits [B, V] at each sequence's last valid column and new_kv [B, L, 2, heads, T, head_dim].
    A column's position is its sequence's past length plus its place in input_ids.
    """

    def __init__(self, language_model: OPTForCausalLM) -> None:
        super().__init__()
        decoder = language_model.model.decoder
        if not decoder.config.do_layer_norm_before:
            raise ValueError("OPT with layer norm after attention (OPT-350m) is not supported")
        self.decoder = decoder
        self.vocab_size = decoder.config.vocab_size
        self.lm_head = language_model.lm_head

    def forward(
        self, input_ids: Tensor, prompt_embedding_table: Tensor, past_kv: Tensor, past_lengths: Tensor,
        input_lengths: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        length, past_length = input_ids.shape[1], past_kv.shape[4]
        column = torch.arange(length, device=input_ids.device)
        hidden = self._embed(input_ids, prompt_embedding_table)
        positions = past_lengths.unsqueeze(1) + column
        positions = positions.clamp(max=self.decoder.config.max_position_embeddings - 1)  # of padding columns only
        embed_positions = self.decoder.embed_positions
        hidden = hidden + nn.functional.embedding(positions + embed_positions.offset, embed_positions.weight)

        past = torch.arange(past_length, device=input_ids.device)
        sees_past = (past < past_lengths.unsqueeze(1)).unsqueeze(1).expand(-1, length, -1)  # [B, T, P]
        sees_new = (column.unsqueeze(0) <= column.unsqueeze(1)).unsqueeze(0).expand(input_ids.shape[0], -1, -1)
        bias = bias_where_hidden(torch.cat([sees_past, sees_new], dim=2)).unsqueeze(1)

        new_kv = []
        for index, layer in enumerate(self.decoder.layers):
            attention = layer.self_attn
            heads = (attention.num_heads, attention.head_dim)
            normed = layer.self_attn_layer_norm(hidden)
            query = attention.q_proj(normed).unflatten(2, heads).transpose(1, 2) * attention.scaling
            key = attention.k_proj(normed).unflatten(2, heads).transpose(1, 2)
            value = attention.v_proj(normed).unflatten(2, heads).transpose(1, 2)
            new_kv.append(torch.stack([key, value], dim=1))
            keys = torch.cat([past_kv[:, index, 0], key], dim=2)
            values = torch.cat([past_kv[:, index, 1], value], dim=2)
            hidden = hidden + attention.out_proj(attend(query, keys, values, bias))
            normed = layer.final_layer_norm(hidden)
            hidden = hidden + layer.fc2(layer.activation_fn(layer.fc1(normed)))

        last = (input_lengths - 1).view(-1, 1, 1).expand(-1, 1, hidden.shape[2])
        hidden = hidden.gather(1, last).squeeze(1)
        if self.decoder.final_layer_norm is not None:
            hidden = self.decoder.final_layer_norm(hidden)
        if self.decoder.project_out is not None:
            hidden = self.decoder.project_out(hidden)
        return self.lm_head(hidden), torch.stack(new_kv, dim=1)

    def _embed(self, input_ids: Tensor, prompt_embedding_table: Tensor) -> Tensor:
        """Text ids from the model's own table, visual ids from the sequence's prompt table: [B, T, H]."""
        text = self.decoder.embed_tokens(input_ids.clamp(max=self.vocab_size - 1))
        row = (input_ids - self.vocab_size).clamp(min=0).unsqueeze(2).expand(-1, -1, prompt_embedding_table.shape[2])
        visual = prompt_embedding_table.gather(1, row)
        embedded = torch.where((input_ids >= self.vocab_size).unsqueeze(2), visual, text)
        return embedded if self.decoder.project_in is None else self.decoder.project_in(embedded)
