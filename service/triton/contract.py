"""List the models that the gateway calls, and the outputs that it requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from service.core.tensors import LIKELIEST, MODELS, Model


def _read(model: Model, *outputs: str) -> Model:
    return replace(model, outputs=tuple(tensor for tensor in model.outputs if tensor.name in outputs))


CALLED: Mapping[str, Model] = {
    "see": MODELS["see"],
    "attend": MODELS["attend"],
    "vision_encoder": MODELS["vision_encoder"],  # the four crops of a closer view in one request, as a batch
    "attend_448": MODELS["attend_448"],  # only if the model card has a closer view
    "attend_clip": MODELS["attend_clip"],  # only if the model card has a clip resampler
    # `sequence_length` of TensorRT-LLM only; those after it if a request asks for them.
    "llm": _read(MODELS["llm"], "output_ids", "sequence_length", "output_log_probs", *LIKELIEST),
    "vqa": MODELS["vqa"],
}

_ENSEMBLES = ("see", "attend", "attend_448")
# The models that run at the vision address (GLIMPSE_VISION_URL).
VISION_MODELS = frozenset({*_ENSEMBLES, "attend_clip", *(step for name in _ENSEMBLES for step in CALLED[name].through)})
