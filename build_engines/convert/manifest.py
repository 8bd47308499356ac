"""Write `manifest.json` of a repository: its sources, its tools, and a digest of every file.

It holds no time and no path, so that the same build twice gives the same manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from build_engines.convert.options import Options, Refused
from build_engines.convert.plan import Step
from build_engines.convert.profiles import served
from build_engines.convert.run import DONE, TOOL, digests
from build_engines.convert.source import Source
from build_engines.repository import Model

NAME = "manifest.json"
KEPT, NOT_FP8 = "kept.json", "not_fp8.json"  # of a step: nodes that keep their precision, by name, with the reason
FORMAT = 1


def manifest(
    options: Options, source: Source, root: Mapping[str, Any], steps: Sequence[Step], work: Path, repository: Path
) -> dict[str, Any]:
    """Describe the files in `repository`, which are all of its files except the manifest."""
    made = {step.name: work / step.folder for step in steps if (work / step.folder / DONE).exists()}
    card = json.loads((repository / "card.json").read_text())
    return {
        "format": FORMAT,
        "checkpoint": {
            "name": source.name,
            "family": source.family,
            "parameters": dict(source.parameters),
            "files": root["checkpoint"],
        },
        "profile": options.profile,
        "precision": options.precision,
        "batch": {"min": 1, "opt": options.opt_batch, "max": options.vision_batch},
        "shapes": {model.name: _shapes(model) for model in served(options, source)},
        "llm": vars(options.llm) if options.profile == "tensorrt" else None,
        "images": {"vision": options.vision_image, "llm": options.llm_image, "mount": options.mount}
        if options.profile == "tensorrt"
        else None,
        "versions": {**root["versions"], **_built_with(made)},
        "steps": [
            {"name": step.name, "key": step.key, "outputs": _outputs(made[step.name])}
            for step in steps
            if step.name in made
        ],
        "kept_in_fp32": _of_every(made, KEPT),
        "not_fp8": _of_every(made, NOT_FP8),
        "parity": _read(made["parity"] / "parity.json"),
        "accuracy": {key: value for key, value in card["metadata"].items() if key.startswith("accuracy")},
        "files": digests(repository),
    }


def _shapes(model: Model) -> dict[str, dict[str, list[Any]]]:
    """Inputs and outputs by name: data type, then the dimensions after the batch; -1 varies."""
    sides = {"inputs": model.inputs, "outputs": model.outputs}
    return {side: {each.name: [each.datatype, *each.dims] for each in tensors} for side, tensors in sides.items()}


def _built_with(made: Mapping[str, Path]) -> dict[str, Any]:
    """Versions that the tools report: TensorRT's version, the GPU and its architecture.

    Raises Refused if two steps used different ones, because one server could not load both.
    """
    found: dict[str, tuple[str, str]] = {}  # by property: the first step that reports it, and its value
    for step, folder in made.items():
        for what, told in (_read(folder / TOOL) if (folder / TOOL).exists() else {}).items():
            first, before = found.setdefault(what, (step, told))
            if before != told:
                raise Refused(
                    f"{first} was made with {what} {before}, {step} with {told}: remove both folders from the build "
                    "folder and build again"
                )
    return {what: told for what, (_, told) in found.items()}


def _of_every(made: Mapping[str, Path], name: str) -> dict[str, Any]:
    """Contents of the steps' files with this name, by step."""
    return {step: _read(folder / name) for step, folder in made.items() if (folder / name).exists()}


def _outputs(folder: Path) -> Any:
    return _read(folder / DONE)["outputs"]


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def write(path: Path, what: object) -> None:
    path.write_text(as_text(what))


def as_text(what: object) -> str:
    return json.dumps(what, indent=2, sort_keys=True) + "\n"
