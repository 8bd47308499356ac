"""The clip resampler: one call turns the features of all frames into 64 visual tokens.

The Q-Former's 32 queries report what is where. The resampler has them twice. At the start of its training, the first 32
read the first frame. The last 32 read the newest token of every cell: the clip's last state, and when it was reached.
The language model then compares two states that it can read, and training adds what happened between them.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from build_engines.model.allocation import CELL_COUNT, MOST_TOKENS, cells_of
from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.attention import bias_where_hidden
from build_engines.model.clip_allocation import FRAMES, POSITIONS, ClipAllocation, Kept
from build_engines.model.qformer import QFormer, attend_block

HALVES = 2  # of the queries
AVOIDED = -5.0  # at the start, the logit of a token that is not of a half's own state
START_LENGTH = 0.3  # of the last position in time at the start, over the square root of the width
START_DIFFERENCE = 0.02  # standard deviation between both halves' queries at the start
CARD = {"visual_tokens": 64, "frames": FRAMES, "vision_tokens": [CELL_COUNT, MOST_TOKENS]}


class TemporalPositions(nn.Module):
    """Learned positions in time: times [T] in [0, 1] -> [T, D], interpolated linearly between the 8 learned ones."""

    index: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        # At the start, time moves a token along one direction, and does not change those of the first frame.
        self.weight = nn.Parameter(torch.linspace(0, START_LENGTH, POSITIONS).unsqueeze(1) * torch.randn(width))
        self.register_buffer("index", torch.arange(POSITIONS, dtype=torch.float32), persistent=False)

    def forward(self, times: Tensor) -> Tensor:
        place = times.unsqueeze(1) * (POSITIONS - 1)
        return torch.relu(1 - (place - self.index).abs()) @ self.weight


class Tokens(NamedTuple):
    """Vision tokens of B clips: each frame's CLS, then 256 slots. N is T + 256."""

    rows: Tensor  # [B, N, D], with their positions in time
    seen: Tensor  # bool [B, N]
    old: Tensor  # bool [B, N]: a later frame has a token of the same place
    new: Tensor  # bool [B, N]: not of the first frame


class ClipResampler(nn.Module):
    """Vision tokens of a clip -> 64 visual tokens [B, 64, H], by cross-attention from 64 learned queries."""

    def __init__(self, qformer: QFormer) -> None:
        """Start from the Q-Former's weights, which are copied."""
        super().__init__()
        attention = qformer.layers[0].crossattention.attention
        self.positions = TemporalPositions(attention.key.in_features)
        twice = qformer.query_tokens.detach().repeat(1, HALVES, 1)
        self.query_tokens = nn.Parameter(twice + START_DIFFERENCE * torch.randn_like(twice))
        self.layernorm = copy.deepcopy(qformer.layernorm)
        self.layers = copy.deepcopy(qformer.layers)
        self.language_projection = copy.deepcopy(qformer.language_projection)
        # What the tokens that are old, and those that are new, add to a logit: by layer, half of the queries, and head.
        marks = torch.zeros(2, len(self.layers), HALVES, attention.num_attention_heads)
        marks[0, :, 1] = marks[1, :, 0] = AVOIDED
        self.marks = nn.Parameter(marks)
        self.requires_grad_(True)

    def tokens(self, cls: Tensor, pooled: Tensor, times: Tensor, kept: Kept) -> Tokens:
        """Gather the kept cells' tokens. cls [B, T, D]; pooled [B, T, 64, D]; times [T]."""
        frame = torch.arange(times.shape[0], device=times.device)
        positions = self.positions(times)  # [T, D]
        cells = (pooled + positions.unsqueeze(1)).flatten(1, 2)
        packed = cells.gather(1, kept.place.unsqueeze(2).expand(-1, -1, cells.shape[2]))
        rows = torch.cat([cls + positions, packed], dim=1)
        of_frame = torch.ones_like(cls[:, :, 0], dtype=torch.bool)
        return Tokens(
            rows,
            torch.cat([of_frame, kept.seen], dim=1),
            torch.cat([of_frame & (frame < times.shape[0] - 1), kept.old], dim=1),
            torch.cat([of_frame & (frame > 0), kept.place >= CELL_COUNT], dim=1),
        )

    def forward(self, tokens: Tokens) -> Tensor:
        hidden_away = bias_where_hidden(tokens.seen)[:, None, None, :]
        old, new = (flag[:, None, None, :].to(hidden_away.dtype) for flag in (tokens.old, tokens.new))
        each = self.query_tokens.shape[1] // HALVES
        hidden = self.layernorm(self.query_tokens).expand(tokens.rows.shape[0], -1, -1)
        for index, layer in enumerate(self.layers):
            # [halves, heads] -> [1, heads, 64, 1]
            of_old, of_new = (
                mark.T.repeat_interleave(each, dim=1).unsqueeze(0).unsqueeze(3) for mark in self.marks[:, index]
            )
            bias = hidden_away + of_old * old + of_new * new
            hidden = attend_block(layer.attention, hidden, hidden, None)
            if layer.has_cross_attention:
                hidden = attend_block(layer.crossattention, hidden, tokens.rows, bias)
            hidden = layer.output_query(layer.intermediate_query(hidden), hidden)
        visual_tokens: Tensor = self.language_projection(hidden)
        return visual_tokens


class ClipAttention(nn.Module):
    """The graph `attend_clip`: the encoder's outputs for every frame of one clip, and a question.

    Inputs: features [T, 257, D], saliency [T, 256], entropy [T, 256], texture [T, 13, 16, 16], times [T] in [0, 1],
    question_ids and question_mask int32 [32], clip_budget int32 [2] (least and most vision tokens, 64 to 256). T is 1
    to 32.

    Outputs: visual_tokens [64, H], relevance [T, 256] and scores [T, 3, 256] in [0, 1] (`RelevanceAllocator`), levels
    int32 [T, 64] (0: a pooled token, -1: left out), tensions [3], the mean over the frames.
    """

    def __init__(self, allocator: RelevanceAllocator, resampler: ClipResampler) -> None:
        super().__init__()
        self.allocator = allocator
        self.allocation = ClipAllocation()
        self.resampler = resampler

    def forward(
        self, features: Tensor, saliency: Tensor, entropy: Tensor, texture: Tensor, times: Tensor,
        question_ids: Tensor, question_mask: Tensor, clip_budget: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        frames = times.shape[0]
        ids, mask = (asked.unsqueeze(0).expand(frames, -1) for asked in (question_ids, question_mask))
        weighed = self.allocator.weigh(features, saliency, entropy, texture, ids, mask)
        pooled = cells_of(features[:, 1:]).mean(2).unsqueeze(0)
        kept = self.allocation(weighed.cells.unsqueeze(0), pooled, times, clip_budget.unsqueeze(0))
        tokens = self.resampler.tokens(features[:, 0].unsqueeze(0), pooled, times, kept)
        visual_tokens = self.resampler(tokens)[0]
        levels, tensions = kept.levels[0].int(), weighed.tensions.mean(0)
        return visual_tokens, weighed.relevance, weighed.scores, levels, tensions

    @classmethod
    def started(cls, allocator: RelevanceAllocator, qformer: QFormer) -> Self:
        """Before training."""
        return cls(allocator, ClipResampler(qformer))
