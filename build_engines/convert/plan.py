"""A build as a list of steps, each with a key: a digest of everything that its output depends on.

Pure: what there is to do follows from the options, the checkpoint's digests and the versions alone. A step whose key
has not changed need not be made again.

    export NAME      checkpoint -> ONNX, FP32
    samples          images and questions -> what each graph is given, for calibration and parity
    fp8 NAME         ONNX -> ONNX with FP8 Q/DQ around most of its matrix products
    fp16 NAME        ONNX -> ONNX that computes in FP16, with what FP16 would spoil kept in FP32
    parity           cosine and greatest difference of every graph against FP32
    plan NAME        ONNX -> TensorRT plan, inside the image that will serve it
    llm ...          checkpoint -> TensorRT-LLM engine, inside the image that will serve it
    card             what the gateway needs to know, and the tokenizers
    repository       all of it as Triton's model repository, with its manifest
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from build_engines.convert import plans, profiles, trtllm
from build_engines.convert.options import Options, Refused
from build_engines.convert.source import Source
from build_engines.repository import graphs_of
from service.core.vision import CROPS

FORMAT = 1  # of what steps leave behind; another number makes every step anew
FP8_GRAPHS = ("vision_encoder",)  # 97 % of the work; what the Q-Former would save is not worth what it loses


@dataclass(frozen=True)
class Step:
    """One thing to make. Its output is a folder."""

    name: str
    action: str  # what makes it: a key of steps.ACTIONS
    does: str
    needs: tuple[str, ...] = ()  # names of the steps whose outputs it reads
    settings: Mapping[str, Any] = field(default_factory=dict)  # all else that its output depends on, as JSON holds it
    command: tuple[str, ...] = ()  # of an external tool, with {step name} for a step's folder and {out} for its own
    key: str = ""

    @property
    def folder(self) -> str:
        return folder_of(self.name)


def folder_of(step: str) -> str:
    """Of a step by its name, below the folder of all steps."""
    return step.replace(" ", "-")


def plan(options: Options, source: Source, root: Mapping[str, Any]) -> list[Step]:
    """Every step in order, with its key. `root` is what all depend on: the checkpoint's digests, code and versions.

    Raises Refused for batches that a closer view does not fit in."""
    if source.closer_view and options.vision_batch < CROPS:
        raise Refused(f"--max-batch {options.vision_batch}: the closer view is a batch of {CROPS} crops")
    return keyed(list(_steps(options, source)), {"format": FORMAT, **root})


def keyed(steps: Sequence[Step], root: Mapping[str, Any]) -> list[Step]:
    """A step's key covers its own settings and, by their keys, all that it reads."""
    keys: dict[str, str] = {}
    done = []
    for step in steps:
        depends = {
            "root": root,
            "action": step.action,
            "settings": step.settings,
            "command": step.command,
            "needs": [keys[name] for name in step.needs],
        }
        keys[step.name] = blake3(json.dumps(depends, sort_keys=True).encode()).hexdigest()
        done.append(replace(step, key=keys[step.name]))
    return done


def _steps(options: Options, source: Source) -> Iterator[Step]:
    plans_wanted, static = options.profile == "tensorrt", options.profile != "embedded"
    graphs = [name for name in graphs_of(profiles.dimensions(options, source)) if not (plans_wanted and name == "llm")]
    longest = trtllm.longest(options, source) if plans_wanted else source.max_positions
    yield Step(
        "card", "card", "card and tokenizers", settings={"max_positions": longest, "precision": options.precision}
    )
    for name in graphs:
        yield Step(
            f"export {name}",
            "export",
            "PyTorch to ONNX, FP32",
            settings={"graph": name, "static": static and name != "llm"},
        )
    made = {name: f"export {name}" for name in graphs}
    images = str(options.images) if options.images else "rendered scenes"
    count = options.calibration_images if options.precision == "fp8" else 16
    yield Step(
        "samples",
        "samples",
        f"what the graphs are given for {count} images ({images})",
        needs=("card", *made.values()),
        settings={"images": images, "count": count, "graphs": dict(made)},
    )
    if options.precision == "fp8":
        for name in FP8_GRAPHS:
            yield Step(f"fp8 {name}", "fp8", "FP8 Q/DQ by modelopt, max calibration", needs=(made[name], "samples"),
                       settings={"graph": name})  # fmt: skip
            made[name] = f"fp8 {name}"
    if options.precision != "fp32":
        for name in graphs:
            yield Step(f"fp16 {name}", "fp16", "FP16, with norms, softmax, texture and choices kept in FP32",
                       needs=(made[name],), settings={"graph": name})  # fmt: skip
            made[name] = f"fp16 {name}"
    exported = tuple(f"export {name}" for name in graphs)
    yield Step(
        "parity",
        "parity",
        "cosine and greatest difference of every graph against "
        + ("PyTorch" if options.precision == "fp32" else "FP32"),
        needs=("samples", *exported, *(name for name in made.values() if name not in exported)),
        settings={"graphs": made, "against": "pytorch" if options.precision == "fp32" else "fp32", "static": static},
    )
    served = dict(made)
    if plans_wanted:
        for name in graphs:
            inputs = profiles.inputs_of(options, source, name)
            command = plans.command(options, inputs, folder_of(made[name]))
            yield Step(f"plan {name}", "plan", f"TensorRT plan, in {options.vision_image}", needs=(made[name],),
                       command=command, settings={"image": options.vision_image, "run_in": options.run_in})  # fmt: skip
            served[name] = f"plan {name}"
        if source.language == "llama":
            yield Step(trtllm.PLAIN, "plain", "the language model and its tokenizer as a plain Llama directory")
        for step in trtllm.commands(options, source):
            yield Step(step.name, "llm", f"{step.does}, in {options.llm_image}", needs=step.needs, command=step.command,
                       settings={"image": options.llm_image, "run_in": options.run_in})  # fmt: skip
        served["llm"] = trtllm.LAST
    yield Step(
        "repository",
        "repository",
        "Triton's model repository and its manifest",
        needs=("card", "parity", *served.values()),
        settings={
            "profile": options.profile,
            "precision": options.precision,
            "served": served,
            "opt_batch": options.opt_batch,
            "configurations": {
                m.name: profiles.configuration(options, source, m) for m in profiles.served(options, source)
            },
        },
    )


def told(steps: Sequence[Step], done: set[str], line: Callable[[Step], Sequence[str]]) -> str:
    """The plan for people: one line a step, and below it the command that is run, by `line`."""
    lines = []
    for step in steps:
        state = "made" if step.name in done else "to do"
        lines.append(f"{state:6} {step.name:28} {step.does}")
        if step.command:
            lines.append("       $ " + shlex.join(line(step)))
    return "\n".join(lines)
