"""Open the graphs of the LLM that the card describes."""

from __future__ import annotations

from pathlib import Path

from service.core.card import LLM_ENCODER, ModelCard
from triton_models.decoder import OnnxDecoder
from triton_models.encoder_decoder import OnnxEncoderDecoder


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
) -> OnnxDecoder | OnnxEncoderDecoder:
    """Open a decoder-only LLM, or an encoder-decoder, whose encoder's graph is LLM_ENCODER beside `graph`.

    An encoder-decoder has no prefix cache. Raises ValueError for one in another library than onnxruntime.
    """
    if card.decoder_start_id is None:
        return OnnxDecoder(
            graph,
            max_rows=max_rows,
            intra_op_threads=intra_op_threads,
            prefix_cache_bytes=prefix_cache_bytes,
            library=library,
            provider=provider,
            device_id=device_id,
        )
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
