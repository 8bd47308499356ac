"""Read the arguments that Triton passes to a model at its start."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from service.core.card import ModelCard
from service.core.precision import PRECISIONS, REDUCED, VARIABLE, graph_name


class Parameters:
    """The `args` of `initialize`: the model's folder and the `parameters` of its config.pbtxt."""

    def __init__(self, args: Mapping[str, str]) -> None:
        self.folder = Path(args["model_repository"])  # the model's own folder
        self.version = self.folder / args["model_version"]
        self.repository = self.folder.parent
        config = json.loads(args["model_config"])
        self._values = {key: each["string_value"] for key, each in config.get("parameters", {}).items()}
        self.device_id = int(args.get("model_instance_device_id", "0"))  # GPU number of a KIND_GPU instance
        self.max_batch_size = int(config.get("max_batch_size", 0))
        self._instances = sum(group.get("count", 1) for group in config.get("instance_group", [])) or 1
        self.inputs = [each["name"] for each in config["input"]]
        self.outputs = [each["name"] for each in config["output"]]

    def text(self, key: str, default: str) -> str:
        return str(self._values.get(key, default))

    def integer(self, key: str, default: int, least: int = 1) -> int:
        """Return an integer parameter.

        Raises ValueError, which fails the load, if it is not a number or is less than `least`.
        """
        value = int(self.text(key, str(default)))
        if value < least:
            raise ValueError(f"parameter {key} of {self.folder.name} must be at least {least}, not {value}")
        return value

    def yes(self, key: str) -> bool:
        """Return whether a yes/no parameter is yes; it is no if absent.

        Raises ValueError, which fails the load, for any other word.
        """
        value = self.text(key, "no")
        if value not in ("yes", "no"):
            raise ValueError(f"parameter {key} of {self.folder.name} must be yes or no, not {value}")
        return value == "yes"

    @property
    def intra_op_threads(self) -> int:
        """Threads of one run, 1 by default.

        A configured 0 means all cores divided by the number of instances.
        """
        return self.integer("intra_op_threads", 1, least=0) or max(1, len(os.sched_getaffinity(0)) // self._instances)

    @property
    def nice(self) -> int:
        """Niceness of the model's threads, 0 by default: a higher value yields the cores to other processes."""
        return self.integer("nice", 0, least=0)

    @property
    def graph(self) -> Path:
        """The model's ONNX file: that of the parameter `graph`, or that of the precision, or `model.onnx`."""
        files = [path.name for path in self.version.glob("model*.onnx")]
        return self.version / self.text("graph", graph_name(self.folder.name, self.precision, files))

    @property
    def precision(self) -> str:
        """The precision that the gateway or `glimpse triton` chose; FP32 without a choice, and on a GPU as built."""
        chosen = os.environ.get(VARIABLE, "fp32")
        return chosen if chosen in PRECISIONS and self.text("provider", "cpu") == "cpu" else "fp32"

    @property
    def library(self) -> str:
        """The library that computes the graph: openvino in BF16, else onnxruntime."""
        return "openvino" if self.precision == "bf16" and self.folder.name in REDUCED else "onnxruntime"

    def card(self) -> ModelCard:
        """Read the repository's card. Raises OSError or ValueError, which fails the load."""
        return ModelCard.from_json((self.repository / "card.json").read_text())
