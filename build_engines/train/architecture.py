"""The reference model's architecture and its initial weights.

transformers initialises a BLIP-2 vision model with a range of 1e-10 and the query tokens with zero. Such a model does
not learn. Here linears start Xavier-uniform (q, k and v separately) and positions start as two-dimensional sines. Each
query starts at the position of one cell of a 4x8 grid over the image.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    GenerationConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from build_engines.model.allocator import RelevanceAllocator
from build_engines.model.checkpoint import save_allocator
from build_engines.scenes.world import GRID, IMAGE_SIZE, PATCH_SIZE
from build_engines.train.tokens import BOS, EOS, IMAGE, PAD, PROMPT

QUERIES = 32
QUERY_ROWS, QUERY_COLUMNS = 4, 8  # query i covers the cell (i // 8, i % 8), 56 x 28 pixels
LANGUAGE_WIDTH = 128
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def new_config(vocabulary: int, vision: dict[str, int] | None = None, layers: int = 4) -> Blip2Config:
    """`vision` overrides the encoder's sizes and `layers` the depth of the others, for tiny models in tests."""
    sizes = {"hidden_size": 160, "intermediate_size": 640, "num_hidden_layers": 5, "num_attention_heads": 4}
    return Blip2Config(
        vision_config=Blip2VisionConfig(
            **(sizes | (vision or {})),
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_act="relu",
            initializer_range=0.02,
        ),
        qformer_config=Blip2QFormerConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=512,
            hidden_act="relu",
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            cross_attention_frequency=1,
            layer_norm_eps=1e-6,
            pad_token_id=PAD,
        ),
        text_config=OPTConfig(
            vocab_size=vocabulary,
            hidden_size=LANGUAGE_WIDTH,
            word_embed_proj_dim=LANGUAGE_WIDTH,
            ffn_dim=4 * LANGUAGE_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=320,
            dropout=0.0,
            attention_dropout=0.0,
            layerdrop=0.0,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            pad_token_id=PAD,
            eos_token_id=EOS,
        ),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
        tie_word_embeddings=True,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, config: Blip2Config | None = None) -> Blip2ForConditionalGeneration:
    """Make a model that can learn. Seed torch first: the weights follow from the seed."""
    model = Blip2ForConditionalGeneration(config or new_config(len(tokenizer)))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.language_model.lm_head:
            blocks = 3 if module.out_features == 3 * module.in_features else 1  # the fused q, k, v
            for block in module.weight.data.chunk(blocks):
                nn.init.xavier_uniform_(block)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
    embeddings = model.vision_model.embeddings
    nn.init.xavier_uniform_(embeddings.patch_embedding.weight.data.view(embeddings.embed_dim, -1))
    nn.init.zeros_(embeddings.patch_embedding.bias)
    nn.init.normal_(embeddings.class_embedding, std=0.02)
    places = sine_positions(embeddings.embed_dim, GRID, GRID)
    embeddings.position_embedding.data = torch.cat([torch.zeros(1, embeddings.embed_dim), places])[None] * 0.5
    queries = sine_positions(model.query_tokens.shape[-1], QUERY_ROWS, QUERY_COLUMNS)
    model.query_tokens.data = (queries + 0.02 * torch.randn_like(queries))[None]
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, max_new_tokens=64, do_sample=False
    )
    return model


def sine_positions(width: int, rows: int, columns: int) -> torch.Tensor:
    """[rows * columns, width]: sines and cosines of y in the first half, of x in the second."""
    rates = torch.exp(-math.log(40.0) * torch.arange(width // 4) / (width // 4)) * math.pi * 4
    y = (torch.arange(rows) + 0.5) / rows
    x = (torch.arange(columns) + 0.5) / columns
    y, x = (v.flatten()[:, None] * rates for v in torch.meshgrid(y, x, indexing="ij"))
    return torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1)


def trained_parts(allocator: RelevanceAllocator) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in allocator.named_children() if any(True for _ in part.parameters())]


def save_checkpoint(
    directory: Path,
    model: Blip2ForConditionalGeneration,
    allocator: RelevanceAllocator,
    tokenizer: PreTrainedTokenizerFast,
    card: dict[str, Any],
) -> None:
    """Write the checkpoint for `from_pretrained`, rounded to FP16, with the allocator and the card."""
    directory.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(directory)
    model.float()
    tokenizer.save_pretrained(directory)
    save_allocator(allocator, directory / "allocator.safetensors")
    preprocessor = {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_convert_rgb": True,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    facts = {
        "name": "glimpse-reference",
        "architecture": "Blip2ForConditionalGeneration",
        "prompt": PROMPT,
        "end_id": EOS,
        "image_size": IMAGE_SIZE,
        "image_mean": MEAN,
        "image_std": STD,
        "fit": "auto",
        "parameters": {
            "model": sum(p.numel() for p in model.parameters()),
            **{name: sum(p.numel() for p in part.parameters()) for name, part in trained_parts(allocator)},
        },
    }
    (directory / "model_card.json").write_text(json.dumps(facts | card, indent=2) + "\n")
