"""What Triton tells a model at its start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from service.core.card import ModelCard


class Parameters:
    """The `args` of `initialize`: the model's folder and the `parameters` of its config.pbtxt."""

    def __init__(self, args: Mapping[str, str]) -> None:
        self.folder = Path(args["model_repository"])  # the model's own folder
        self.version = self.folder / args["model_version"]
        self.repository = self.folder.parent
        config = json.loads(args["model_config"])
        self._values = {key: each["string_value"] for key, each in config.get("parameters", {}).items()}
        self.device_id = int(args.get("model_instance_device_id", "0"))  # of the GPU, for an instance of KIND_GPU
        self.max_batch_size = int(config.get("max_batch_size", 0))
        self._instances = sum(group.get("count", 1) for group in config.get("instance_group", [])) or 1
        self.inputs = [each["name"] for each in config["input"]]
        self.outputs = [each["name"] for each in config["output"]]

    def text(self, key: str, default: str) -> str:
        return str(self._values.get(key, default))

    def integer(self, key: str, default: int, least: int = 1) -> int:
        """Raises ValueError, which fails the load, when the parameter is no number or less than `least`."""
        value = int(self.text(key, str(default)))
        if value < least:
            raise ValueError(f"parameter {key} of {self.folder.name} must be at least {least}, not {value}")
        return value

    def yes(self, key: str) -> bool:
        """`no` where it is not said. Raises ValueError, which fails the load, for any other word than those two."""
        value = self.text(key, "no")
        if value not in ("yes", "no"):
            raise ValueError(f"parameter {key} of {self.folder.name} must be yes or no, not {value}")
        return value == "yes"

    @property
    def intra_op_threads(self) -> int:
        """Of one run, 1 where the configuration says nothing; its 0 is every core, divided among the instances."""
        return self.integer("intra_op_threads", 1, least=0) or max(1, len(os.sched_getaffinity(0)) // self._instances)

    @property
    def nice(self) -> int:
        """By how much its threads leave the cores to others, 0 where the configuration says nothing."""
        return self.integer("nice", 0, least=0)

    @property
    def graph(self) -> Path:
        """The model's ONNX file, `model.onnx` unless the parameter `graph` names another."""
        return self.version / self.text("graph", "model.onnx")

    def card(self) -> ModelCard:
        """The repository's card. Raises OSError or ValueError, which fails the load."""
        return ModelCard.from_json((self.repository / "card.json").read_text())
