"""Count the floating-point operations of every step from a checkpoint's configuration.

No weights are needed. Each multiplication in a matrix product or a convolution counts as two operations, because its
result is also added. Elementwise operations count as none. `torch.utils.flop_counter` counts alike. The counts are
therefore lower bounds within a few percent. All are for one image and one question. T: tokens. D: width. I: width of
the feed-forward layer. N: vision tokens with CLS.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import Blip2Config, InstructBlipConfig, InstructBlipVideoConfig, PretrainedConfig

from build_engines.model.allocation import CELL_COUNT, GROUP, MAX_VISION_TOKENS, PATCH_COUNT
from build_engines.model.balancing import SUMMARIES, WAYS
from build_engines.model.texture import ORIENTATIONS

QUESTION = 32  # words read by the allocator and by InstructBLIP's Q-Former
KERNEL = 3  # size of the convolutions over words and of the Sobel filters


def product(rows: int, inner: int, columns: int) -> int:
    """[rows, inner] @ [inner, columns]: 2 rows inner columns."""
    return 2 * rows * inner * columns


def attention(queries: int, keys: int, width: int) -> int:
    """Scores and mixture over all heads (`width` is their total): 4 queries keys width."""
    return 2 * product(queries, width, keys)


def encoder(vision: PretrainedConfig) -> int:
    """Count one 224-pixel view; a closer view costs four.

    Patches: 2 * 256 * 3 * 14**2 * D. A layer, T = 257: query, key, value and projection 8 T D**2, attention 4 T**2 D,
    feed-forward 4 T D I. Saliency 2 T D. Texture: eight 3x3 filters on every second pixel, colour in every patch.
    """
    side, width = vision.image_size // vision.patch_size, vision.hidden_size
    patches = side * side
    tokens = patches + 1
    embedding = product(patches, 3 * vision.patch_size**2, width)
    layer = 4 * product(tokens, width, width) + attention(tokens, tokens, width)
    layer += 2 * product(tokens, width, vision.intermediate_size)
    texture = product((vision.image_size // 2) ** 2, KERNEL**2, ORIENTATIONS) + product(patches, 3, 2)
    return embedding + vision.num_hidden_layers * layer + product(1, width, tokens) + texture


def allocator(
    width: int,
    *,
    participatory: bool = True,
    balancing: bool = True,
    closer: bool = False,
    token_width: int = 64,
    coupling_width: int = 96,
    hidden_width: int = 64,
) -> int:
    """Count one image of vision width D, with the given parts and with or without the closer view.

    Participatory knowing, coupling width C, token width E: words 2 * 32 * 3 * (2 E C + 2 C**2), patches 2 * 256 * (2 D
    C + 2 C**2), coupling 2 * 256 * 32 C. Balancing: 2 (36 + C) 64 + 2 * 64 * 6. Choice: turns and places of the cells,
    2 * 2 * 64**2. Closer: two sums over all pairs of the 128 steps, 4 * 128**2; two products with 2 D for each of the
    400 packed tokens, 8 * 400 * D**2.
    """
    total = 2 * product(1, CELL_COUNT, CELL_COUNT)
    if participatory:
        doubled = 2 * coupling_width
        total += product(QUESTION, KERNEL * token_width, doubled) + product(QUESTION, KERNEL * doubled, coupling_width)
        total += product(PATCH_COUNT, width, doubled) + product(PATCH_COUNT, doubled, coupling_width)
        total += product(PATCH_COUNT, coupling_width, QUESTION)
    if balancing:
        total += product(1, SUMMARIES + coupling_width, hidden_width) + product(1, hidden_width, 2 * WAYS)
    if closer:
        steps = 2 * CELL_COUNT
        total += product(steps, steps, 2) + 2 * product(MAX_VISION_TOKENS, width, 2 * width)
    return total


def qformer(config: Blip2Config | InstructBlipConfig | InstructBlipVideoConfig, vision_tokens: Sequence[int]) -> int:
    """Count one run with 32 queries a group.

    vision_tokens: how many tokens each group reads, including CLS, the base group first.

    A layer, T = 32 queries (64 with InstructBLIP's 32 words), D its own width: self-attention 8 T D**2 + 4 T**2 D,
    feed-forward 4 T D I. A layer that reads the image, of width V, adds 4 * 32 * D**2 + 4 N V D + 4 * 32 N D. The final
    projection to the LLM's width H: 2 * 32 * D H.
    """
    own = config.qformer_config
    width, read = (
        own.hidden_size,
        GROUP + (QUESTION if isinstance(config, InstructBlipConfig | InstructBlipVideoConfig) else 0),
    )
    layer = 4 * product(read, width, width) + attention(read, read, width)
    layer += 2 * product(read, width, own.intermediate_size)
    reading = len(range(0, own.num_hidden_layers, own.cross_attention_frequency))
    total = 0
    for tokens in vision_tokens:
        cross = 2 * product(GROUP, width, width) + 2 * product(tokens, own.encoder_hidden_size, width)
        cross += attention(GROUP, tokens, width)
        total += own.num_hidden_layers * layer + reading * cross
        total += product(GROUP, width, config.text_config.hidden_size)
    return total


def llm(text: PretrainedConfig, tokens: int, past: int = 0) -> int:
    """Count one step over T new tokens after a past of P, with the logits of the last token.

    A layer, with H the total width of the heads and KV that of keys and values: projections 4 T D (H + KV), attention 4
    T (P + T) H (the upper triangle is computed and masked), feed-forward 4 T D I, or 6 T D I for Llama's SwiGLU.
    Logits: 2 D times the vocabulary. OPT with narrower embeddings (width W): 2 T W D + 2 D W.
    """
    width, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or width // heads
    together, shared = heads * head, (getattr(text, "num_key_value_heads", None) or heads) * head
    layer = 2 * product(tokens, width, together) + 2 * product(tokens, width, shared)
    layer += attention(tokens, past + tokens, together)
    if text.model_type == "opt":
        layer += 2 * product(tokens, width, text.ffn_dim)
    else:
        layer += 3 * product(tokens, width, text.intermediate_size)
    words = getattr(text, "word_embed_proj_dim", width)
    narrow = 0 if words == width else product(tokens, words, width) + product(1, width, words)
    return text.num_hidden_layers * layer + narrow + product(1, words, text.vocab_size)


def prefill(text: PretrainedConfig, prompt_tokens: int) -> int:
    """Count the prompt, including visual tokens. This step also gives the answer's first token."""
    return llm(text, prompt_tokens)


def decode(text: PretrainedConfig, prompt_tokens: int, answer_tokens: int) -> int:
    """Count the answer's tokens after the first, one step each. The prefill gives the first."""
    return sum(llm(text, 1, prompt_tokens + made) for made in range(answer_tokens - 1))
