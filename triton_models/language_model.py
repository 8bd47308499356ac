"""Open the graphs of the LLM that the card describes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from service.core.card import LLM_CLIPS, LLM_ENCODER, ModelCard
from triton_models.cross_decoder import OnnxCrossDecoder
from triton_models.decoder import OnnxDecoder
from triton_models.encoder_decoder import OnnxEncoderDecoder
from triton_models.two_decoders import TwoDecoders

LanguageModel = OnnxDecoder | TwoDecoders | OnnxEncoderDecoder | OnnxCrossDecoder


def open_language_model(
    graph: Path,
    card: ModelCard,
    *,
    max_rows: int,
    intra_op_threads: int = 1,
    prefix_cache_bytes: int = 0,
    library: str = "onnxruntime",
    provider: str = "cpu",
    device_id: int = 0,
) -> LanguageModel:
    """Open an LLM of the card's architecture.

    Its prompt reader, if it has one, is LLM_ENCODER beside `graph`. So is LLM_CLIPS, if it has other weights for clips
    and several images. An encoder-decoder has no prefix cache. Raises ValueError for an LLM with a prompt reader in
    another library than onnxruntime, or with other weights for clips.
    """
    if card.clip_weights and card.architecture != "decoder-only":
        raise ValueError(f"{card.name} has clip_weights, which only a decoder-only LLM can have: build it again")
    if card.image_marks is not None:
        if library != "onnxruntime":
            raise ValueError(f"{card.name} is an IDEFICS, which computes in FP32 only: set GLIMPSE_PRECISION=fp32")
        return OnnxCrossDecoder(
            graph,
            graph.with_name(LLM_ENCODER),
            card.image_marks.end,
            max_rows=max_rows,
            intra_op_threads=intra_op_threads,
            prefix_cache_bytes=prefix_cache_bytes,
            provider=provider,
            device_id=device_id,
        )
    if card.decoder_start_id is None:
        opened = partial(
            OnnxDecoder, max_rows=max_rows, intra_op_threads=intra_op_threads, provider=provider, device_id=device_id
        )
        own = opened(graph, prefix_cache_bytes=prefix_cache_bytes, library=library)
        if not card.clip_weights:
            return own
        # In FP32, whatever the other computes in: no precision was measured for these answers.
        return TwoDecoders(own, opened(graph.with_name(LLM_CLIPS), prefixes=own.prefixes))
    if library != "onnxruntime":
        raise ValueError(f"{card.name} has a FlanT5, which computes in FP32 only: set GLIMPSE_PRECISION=fp32")
    return OnnxEncoderDecoder(
        graph,
        graph.with_name(LLM_ENCODER),
        card.decoder_start_id,
        max_rows=max_rows,
        intra_op_threads=intra_op_threads,
        provider=provider,
        device_id=device_id,
    )
