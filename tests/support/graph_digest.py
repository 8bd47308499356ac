"""Digest a graph to export: equal digests mean that the exporter is given the same module, inputs and settings."""

from __future__ import annotations

import io
import pickle
from hashlib import blake2b
from typing import Any

import torch
from transformers import PreTrainedConfig

from build_engines.export import Graph

WHERE_IT_LAY = (
    "_name_or_path",
    "name_or_path",
)  # of transformers: the folder that a configuration or model was read from


class _Canonical(pickle.Pickler):
    """Pickles a module's classes, attributes and weights in one order, and leaves out where the checkpoint lay."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, torch.Tensor):
            weights = obj.detach().contiguous()
            values = b"" if weights.is_meta else weights.flatten().view(torch.uint8).numpy().tobytes()
            facts = (str(obj.dtype), tuple(obj.shape), obj.requires_grad, blake2b(values).hexdigest())
            return tuple, (facts,)
        if isinstance(obj, PreTrainedConfig):
            told = {key: value for key, value in vars(obj).items() if key not in WHERE_IT_LAY}
            return type(obj), (), sorted(told.items())
        if isinstance(obj, torch.nn.Module):
            told = {name: value for name, value in vars(obj).items() if name not in WHERE_IT_LAY}
            return type(obj), (), [(name, _ordered(value)) for name, value in told.items()]
        return NotImplemented


def _ordered(value: object) -> object:
    """A set's order differs between processes."""
    return sorted(value, key=repr) if isinstance(value, set) else value


def digest_of(graph: Graph) -> str:
    """Return 32 hex digits, the same in every process of one run of the tests."""
    pickled = io.BytesIO()
    _Canonical(pickled).dump((graph.name, graph.module, graph.inputs, graph.dynamic, list(graph.outputs)))
    return blake2b(pickled.getvalue(), digest_size=16).hexdigest()
