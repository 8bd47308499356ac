"""Read from the models' configurations how much they process at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from service.core.card import Engines


def read_engines(repository: Path) -> Engines:
    """Read the repository's configurations. Raises OSError for a missing one, ValueError for an invalid one."""
    encoder, llm = (_configuration(repository / model / "config.pbtxt") for model in ("vision_encoder", "llm"))
    batch = encoder.max_batch_size if encoder.HasField("dynamic_batching") else 1
    instances = sum(group.count or 1 for group in encoder.instance_group)
    rows = llm.parameters["max_rows"].string_value if "max_rows" in llm.parameters else llm.max_batch_size
    return Engines(encoder_images=max(batch, 1) * max(instances, 1), llm_rows=max(int(rows), 1))


def _configuration(path: Path) -> Any:
    try:
        return text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    except text_format.ParseError as exc:
        raise ValueError(f"{path}: {exc}") from exc
