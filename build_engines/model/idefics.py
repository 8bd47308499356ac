"""IDEFICS: its vision encoder, its resampler, and its LLM, which sees images by gated cross-attention.

The LLM is two graphs. The first runs once for each image of a prompt:

    prompt_embedding_table float [B, N, D]: the visual tokens of a prompt's images.
    -> cross_key_0, cross_value_0, cross_key_1, ... float [B, heads, N, d], a pair for each layer of cross-attention.

The second is a decoder as in `decoder.py`, whose columns are the prompt's text alone:

    input_ids int64 [B, T], right padded. image_starts and image_ends int64 [B, T]: a column sees the visual tokens from
    its start on and before its end; none if they are equal. cross_key_0, cross_value_0, ... float [B, heads, S, d].
    past_key_0, past_value_0, ... float [B, heads, P, d], past_lengths and input_lengths int64 [B].
    -> logits [B, V], and new_key_0, new_value_0, ... [B, heads, T, d].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import IdeficsForVisionText2Text
from transformers.models.idefics.modeling_idefics import IdeficsAttention, IdeficsGatedCrossAttentionLayer
from transformers.models.idefics.perceiver import IdeficsPerceiverAttention, IdeficsPerceiverResampler
from transformers.models.idefics.vision import IdeficsVisionAttention, IdeficsVisionTransformer

from build_engines.model import attention as plain
from build_engines.model.attention import bias_where_hidden
from build_engines.model.decoder import FIXED_ROPE, at_last, attend, causal_bias, positions_of, rotated
from build_engines.model.texture import Texture


class IdeficsVisionEncoder(nn.Module):
    """As `VisionEncoder`, for IDEFICS's CLIP: a layer norm before the layers, and none after the last one.

    The resampler reads the last hidden state as it is.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vision: IdeficsVisionTransformer, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.embeddings, self.pre_layernorm = vision.embeddings, vision.pre_layrnorm
        self.layers = vision.encoder.layers
        self.texture = Texture(vision.config.image_size)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rgb = image.float() / 255
        texture, entropy = self.texture(rgb)
        hidden = self.pre_layernorm(self.embeddings((rgb - self.mean) / self.std))
        saliency = hidden.new_zeros(())
        for layer in self.layers:
            query, key, value = _split_heads(layer.self_attn, layer.layer_norm1(hidden))
            # Only the last layer's saliency is used. The exported graph drops the others.
            saliency = torch.softmax(query[:, :, :1] @ key.transpose(2, 3), dim=-1).mean(1)[:, 0, 1:]
            hidden = hidden + layer.self_attn.out_proj(plain.attend(query, key, value))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        return hidden, saliency, entropy, texture


def _split_heads(attention: IdeficsVisionAttention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, T, D] -> query (already scaled), key, value, each [B, heads, T, head_dim]."""
    heads = (attention.num_heads, attention.head_dim)
    parts = (attention.q_proj(hidden) * attention.scale, attention.k_proj(hidden), attention.v_proj(hidden))
    query, key, value = (part.unflatten(2, heads).transpose(1, 2) for part in parts)
    return query, key, value


class PerceiverResampler(nn.Module):
    """IDEFICS's resampler, in the Q-Former's place: vision_tokens [B, N, D] and attend int32 [B, N] -> [B, 64, D].

    attend (the argument `visible`) is 1 for a token that the latents may read.
    """

    def __init__(self, resampler: IdeficsPerceiverResampler) -> None:
        super().__init__()
        self.latents, self.blocks, self.layer_norm = resampler.latents, resampler.blocks, resampler.layer_norm

    def forward(self, vision_tokens: Tensor, visible: Tensor) -> Tensor:
        latents = self.latents.expand(vision_tokens.shape[0], -1, -1)
        bias = bias_where_hidden(visible[:, None, None, :] > 0)
        for attention, feed_forward in self.blocks:
            latents = latents + _resampled(attention, vision_tokens, latents, bias)
            latents = latents + feed_forward(latents)
        return self.layer_norm(latents)


def _resampled(block: IdeficsPerceiverAttention, context: Tensor, latents: Tensor, bias: Tensor) -> Tensor:
    """Attend from the latents to the vision tokens and the latents, in one softmax over both.

    The two are not joined: TensorRT's rules know no sum of a dimension that varies.
    """
    latents, context = block.latents_layer_norm(latents), block.context_layer_norm(context)
    heads = (block.n_heads, block.head_dim)
    query = block.q_proj(latents).unflatten(2, heads).transpose(1, 2)
    query = (block.q_layer_norm(query) if block.qk_layer_norms else query) * block.qk_scale
    scores, values = [], []
    for read, hidden in ((context, bias), (latents, None)):
        key, value = (part(read).unflatten(2, heads).transpose(1, 2) for part in (block.k_proj, block.v_proj))
        score = query @ (block.k_layer_norm(key) if block.qk_layer_norms else key).transpose(2, 3)
        scores.append(score if hidden is None else score + hidden)
        values.append(value)
    greatest = torch.maximum(*(score.amax(3, keepdim=True) for score in scores))
    shares = [torch.exp(score - greatest) for score in scores]
    mixed = (shares[0] @ values[0] + shares[1] @ values[1]) / sum(share.sum(3, keepdim=True) for share in shares)
    return block.output_proj(mixed.transpose(1, 2).flatten(2))


class ImageReader(nn.Module):
    """Turn visual tokens into keys and values of every layer of cross-attention."""

    def __init__(self, model: IdeficsForVisionText2Text) -> None:
        super().__init__()
        self.cross = nn.ModuleList(layer.cross_attn for layer in model.model.gated_cross_attn_layers)

    def forward(self, prompt_embedding_table: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for cross in self.cross:
            key, value = (_heads(part(prompt_embedding_table), cross) for part in (cross.k_proj, cross.v_proj))
            found += [cross.k_layer_norm(key) if cross.qk_layer_norms else key, value]
        return tuple(found)


class IdeficsDecoder(nn.Module):
    """A Llama with a gated layer of cross-attention before every few layers. Keys are cached after rotation."""

    inverse_frequencies: Tensor

    def __init__(self, model: IdeficsForVisionText2Text) -> None:
        """Raises ValueError for rotary positions that change with the length."""
        super().__init__()
        self.decoder, self.lm_head = model.model, model.lm_head
        rotary = self.decoder.layers[0].self_attn.rotary_emb
        if rotary.rope_type not in FIXED_ROPE:
            raise ValueError(
                f"rotary positions of type {rotary.rope_type} change with the length: "
                f"use a model with one of {', '.join(FIXED_ROPE)}"
            )
        self.register_buffer("inverse_frequencies", rotary.inv_freq.float(), persistent=False)
        self.rotary_scaling = rotary.attention_scaling
        self.interval = self.decoder.cross_layer_interval

    def forward(
        self, input_ids: Tensor, past_lengths: Tensor, input_lengths: Tensor, image_starts: Tensor, image_ends: Tensor,
        *keys_and_values: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """`keys_and_values` are past_key_0, past_value_0, ... of every layer, then cross_key_0, cross_value_0, ..."""
        half = 2 * len(self.decoder.layers)
        past, cross = keys_and_values[:half], keys_and_values[half:]
        hidden = self._embed(input_ids)
        angles = positions_of(input_ids, past_lengths).unsqueeze(2).float() * self.inverse_frequencies
        turn = torch.cat([angles, angles], dim=2).unsqueeze(1)  # [B, 1, T, head_dim]
        cosine, sine = turn.cos() * self.rotary_scaling, turn.sin() * self.rotary_scaling
        bias = causal_bias(input_ids, past[0], past_lengths)
        visual = torch.arange(cross[0].shape[2], device=input_ids.device)
        sees = (visual >= image_starts.unsqueeze(2)) & (visual < image_ends.unsqueeze(2))  # [B, T, S]
        sees_any = (image_ends > image_starts).unsqueeze(2).to(hidden.dtype)  # [B, T, 1]
        image_bias = bias_where_hidden(sees.unsqueeze(1))

        new: list[Tensor] = []
        for index, layer in enumerate(self.decoder.layers):
            if index % self.interval == 0:
                place = index // self.interval
                gated, pair = self.decoder.gated_cross_attn_layers[place], cross[2 * place : 2 * place + 2]
                hidden = _look(gated, hidden, pair, image_bias, sees_any)
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            query, key, value = (_heads(projection(normed), attention) for projection in projections)
            query, key = rotated(query * attention.scaling, cosine, sine), rotated(key, cosine, sine)
            new += [key, value]
            hidden = hidden + attention.o_proj(attend(query, past[2 * index : 2 * index + 2], (key, value), bias))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))

        hidden = self.decoder.norm(at_last(hidden, input_lengths))
        return self.lm_head(hidden), *new

    def _embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H]: the additional words have a table of their own."""
        tokens = self.decoder.embed_tokens
        own = nn.functional.embedding(input_ids.clamp(max=tokens.num_embeddings - 1), tokens.weight)
        if tokens.num_additional_embeddings == 0:
            return own
        added = tokens.additional_embedding((input_ids - tokens.num_embeddings).clamp(min=0))
        return torch.where((input_ids >= tokens.num_embeddings).unsqueeze(2), added, own)


def _heads(hidden: Tensor, attention: IdeficsAttention) -> Tensor:
    """[B, T, heads * d] -> [B, heads, T, d]"""
    return hidden.unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def _look(
    layer: IdeficsGatedCrossAttentionLayer, hidden: Tensor, cross: tuple[Tensor, ...], bias: Tensor, sees_any: Tensor
) -> Tensor:
    """Add what a layer of cross-attention sees, and its feed-forward part, each times its gate.

    A column that sees no image has only the feed-forward part.
    """
    attention, (key, value) = layer.cross_attn, cross
    query = _heads(attention.q_proj(layer.input_layernorm(hidden)), attention)
    if attention.qk_layer_norms:
        query = attention.q_layer_norm(query)
    seen = attention.o_proj(plain.attend(query * attention.scaling, key, value, bias)) * sees_any
    hidden = hidden + torch.tanh(layer.alpha_cross_attn) * seen
    return hidden + torch.tanh(layer.alpha_dense) * layer.mlp(layer.post_attention_layernorm(hidden))
