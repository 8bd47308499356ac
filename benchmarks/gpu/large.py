"""Answer questions in FP16 in PyTorch with this project's modules, one stage after another."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.encoder import half
from build_engines.convert.samples import samples
from build_engines.model.checkpoint import Checkpoint

ROWS = (1, 8)  # sequences decoded together
QUESTION_TOKENS = 16  # text tokens of the prompt, besides 32 visual tokens
BUDGET = (64, 256, 32, 32)


class Chain:
    """Run encoder, allocator, Q-Former and language model.

    All but the allocator run in FP16 by autocast, with norms and softmax in FP32. The allocator runs in FP32, because
    its decisions compare numbers.
    """

    def __init__(self, checkpoint: Checkpoint, device: Device) -> None:
        self.device = device
        self.reads_question = checkpoint.reads_question
        checkpoint.model.half().to(device.kind)
        self.encoder = half(checkpoint.vision_encoder()).to(device.kind)
        self.allocator = checkpoint.allocator().float().to(device.kind)
        self.qformer = checkpoint.qformer()
        self.decoder = checkpoint.decoder()
        text = checkpoint.model.config.text_config
        self.vocab_size = text.vocab_size
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.parts = 2 * text.num_hidden_layers  # keys and values of each layer
        self.cached = (heads, getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)

    def tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values)).to(self.device.kind)

    def see(self, images: Tensor, question_ids: Tensor, question_mask: Tensor) -> Tensor:
        """Turn images uint8 [B, 3, 224, 224] and question ids and mask int32 [B, 32] into visual tokens [B, 32, H].

        The visual tokens are FP16.
        """
        budget = self.tensor(np.array([BUDGET] * len(images), np.int32))
        vision = self.encoder(images)
        with torch.autocast(self.device.kind, enabled=False):
            floats = [each.float() for each in vision]
            vision_tokens, vision_mask, *_ = self.allocator(*floats, question_ids, question_mask, budget)
        question = (question_ids, question_mask) if self.reads_question else ()
        return self.qformer(vision_tokens.half(), (vision_mask > 0).int(), *question)

    def answer(self, visual: Tensor, text_ids: Tensor, tokens: int) -> Answer:
        """Answer greedily: visual tokens [B, 32, H] and text ids int64 [B, T] -> int64 [B, tokens] on the host."""
        rows, shown = visual.shape[:2]
        numbers = torch.arange(self.vocab_size, self.vocab_size + shown, device=self.device.kind).expand(rows, -1)
        ids = torch.cat([numbers, text_ids], dim=1)
        length, heads, head_dim = ids.shape[1], *self.cached
        room = torch.zeros(self.parts, rows, heads, length + tokens, head_dim, dtype=visual.dtype, device=visual.device)
        past, said, seconds = room[:, :, :, :1], [], []  # one column, which past_lengths of 0 masks
        for known in (0, *range(length, length + tokens - 1)):
            step = _Step(ids, visual, known, past)
            seconds.append(self.device.seconds(lambda step=step: said.append(self._next(step, room))))
            ids, past = self.tensor(said[-1]).unsqueeze(1), room
        return Answer(np.stack(said, axis=1), seconds)

    def _next(self, step: _Step, room: Tensor) -> np.ndarray:
        """Return the likeliest token of each row, on the host, and store the step's keys and values in `room`."""
        rows, new = step.ids.shape
        lengths = torch.full((rows,), step.known, device=self.device.kind)
        logits, *parts = self.decoder(step.ids, step.visual, lengths, torch.full_like(lengths, new), *step.past)
        for place, part in zip(room, parts, strict=True):
            place[:, :, step.known : step.known + new] = part
        return logits.argmax(1).cpu().numpy()


@dataclass(frozen=True)
class _Step:
    """One run of the decoder: `known` columns of the past [parts, B, heads, P, head_dim] are valid."""

    ids: Tensor
    visual: Tensor
    known: int
    past: Tensor


@dataclass(frozen=True)
class Answer:
    """Tokens int [B, n] and the seconds of each column; the first one includes the prefill."""

    tokens: np.ndarray
    seconds: Sequence[float]


@torch.inference_mode()
def times(device: Device, checkpoint: Checkpoint, tokens: int, repeats: int) -> dict[str, Any]:
    """Return first token ms, ms between tokens and tokens/s by rows, and the peak memory."""
    device.forget_peak()
    chain = Chain(checkpoint, device)
    generator = np.random.default_rng(0)
    found: dict[str, Any] = {"tokens": tokens, "prompt_tokens": 32 + QUESTION_TOKENS, "rows": {}}
    with torch.autocast(device.kind, torch.float16):
        for rows in ROWS:
            images = chain.tensor(np.stack([pixels for pixels, _ in samples(None, rows)]))
            words, mask = chain.tensor(np.full((rows, 32), 5, np.int32)), chain.tensor(np.ones((rows, 32), np.int32))
            text = chain.tensor(generator.integers(0, chain.vocab_size, (rows, QUESTION_TOKENS)))
            chain.answer(chain.see(images, words, mask), text, 2)  # chooses kernels
            first, between = [], []
            for _ in range(repeats):
                visual: list[Tensor] = []
                looked = device.seconds(lambda: visual.append(chain.see(images, words, mask)))  # noqa: B023
                answer = chain.answer(visual[0], text, tokens)
                first.append(looked + answer.seconds[0])
                between += answer.seconds[1:]
            found["rows"][str(rows)] = {
                "first_token_ms": float(f"{1000 * statistics.median(first):.4g}"),
                "between_tokens_ms": float(f"{1000 * statistics.median(between):.4g}"),
                "tokens_per_s": float(f"{rows / statistics.median(between):.4g}"),
            }
    return found | {"peak_memory_bytes": device.peak_bytes()}
