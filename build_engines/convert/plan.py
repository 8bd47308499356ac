"""List the steps of a build, each with a key.

A key is a digest of everything that the step's output depends on. The steps follow from the options, the checkpoint's
digests and the versions alone; nothing here has side effects. A step with an unchanged key need not run again.

    export NAME      checkpoint -> ONNX, FP32
    samples          images and questions -> inputs of each graph, for calibration and parity
    fp8 NAME         ONNX -> ONNX with FP8 Q/DQ around most of its matrix products
    int8 NAME        ONNX -> ONNX with products of integers, for CPUs
    int4 llm         ONNX -> ONNX with weights of 4 bits, for CPUs
    bf16 NAME        ONNX -> ONNX that rounds to BF16 as a CPU does, to measure what that changes
    agreement        answers of a CPU precision compared with FP32's
    fp16 NAME        ONNX -> ONNX in FP16, with sensitive nodes kept in FP32
    parity           cosine and greatest difference of every graph against PyTorch or FP32; a floor for the cosine
    plan NAME        ONNX -> TensorRT plan, inside the image that will serve it
    llm ...          checkpoint -> TensorRT-LLM engine, inside the image that will serve it
    card             the gateway's card and the tokenizers
    repository       Triton's model repository with all of it, and its manifest
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from blake3 import blake3

from build_engines.convert import plans, profiles, trtllm
from build_engines.convert.options import GPU_PRECISIONS, Options, Refused
from build_engines.convert.source import Source
from build_engines.repository import CLIP_GRAPH, CLIP_LLM, graphs_of
from service.core.precision import REDUCED
from service.core.vision import CROPS

FORMAT = 1  # of the steps' output; another number makes every step run again
FP8_GRAPHS = ("vision_encoder",)  # 97 % of the work; an FP8 Q-Former would save too little for its loss


@dataclass(frozen=True)
class Step:
    """One step of a build. Its output is a folder."""

    name: str
    action: str  # what runs it: a key of steps.ACTIONS
    does: str
    needs: tuple[str, ...] = ()  # names of the steps whose outputs it reads
    settings: Mapping[str, Any] = field(default_factory=dict)  # all other values that its output depends on, as JSON
    command: tuple[str, ...] = ()  # of an external tool, with placeholders for folders (`commands.py`)
    key: str = ""

    @property
    def folder(self) -> str:
        return folder_of(self.name)


def folder_of(step: str) -> str:
    """Name of a step's folder, below the folder of all steps."""
    return step.replace(" ", "-")


def plan(options: Options, source: Source, root: Mapping[str, Any]) -> list[Step]:
    """List every step in order, with its key.

    `root` is what all steps depend on: the checkpoint's digests, code and versions. Raises Refused if a batch is too
    small for a closer view, or for a FlanT5 or an IDEFICS in another precision than FP32.
    """
    if source.has_prompt_reader and options.precision != "fp32":
        raise Refused(why_not_idefics(options) if source.is_idefics else why_not_t5(options))
    if source.closer_view and options.vision_batch < CROPS:
        raise Refused(
            f"--max-batch {options.vision_batch}: the closer view is a batch of {CROPS} crops. Use at least {CROPS}"
        )
    return keyed(list(_steps(options, source)), {"format": FORMAT, **root})


def why_not_t5(options: Options) -> str:
    """Why these options cannot build a FlanT5, and what can."""
    reason = {
        "tensorrt": "this version makes no encoder-decoder engines for TensorRT-LLM",
        "onnx-gpu": "FlanT5's feed-forward layers exceed FP16's range",
        "embedded": f"FlanT5 was not measured in {options.precision}",
    }[options.profile]
    return (
        f"a FlanT5 cannot be built with --profile {options.profile} --precision {options.precision}: {reason}. Use "
        "--profile embedded or onnx-gpu with --precision fp32"
    )


def why_not_idefics(options: Options) -> str:
    """Why these options cannot build an IDEFICS, and what can."""
    reason = {
        "tensorrt": "TensorRT-LLM 1.2.1 has no documented engine with IDEFICS's gated cross-attention",
        "onnx-gpu": f"IDEFICS was not measured in {options.precision}",
        "embedded": f"IDEFICS was not measured in {options.precision}",
    }[options.profile]
    return (
        f"an IDEFICS cannot be built with --profile {options.profile} --precision {options.precision}: {reason}. Use "
        "--profile embedded or onnx-gpu with --precision fp32"
    )


def keyed(steps: Sequence[Step], root: Mapping[str, Any]) -> list[Step]:
    """Compute each step's key from its own settings and the keys of the steps that it reads."""
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
        "card",
        "card",
        "card and tokenizers",
        settings={
            "name": source.name,
            "max_positions": longest,
            "profile": options.profile,  # decides whether the card tells of clips and of the likeliest tokens
            "precision": options.precision,
            "dtype": options.dtype,
            "text_type": profiles.text_type(options),
            "most_visual_tokens": options.llm.max_visual_tokens if plans_wanted else None,
        },
    )
    for name in graphs:
        yield Step(
            f"export {name}",
            "export",
            "PyTorch to ONNX, FP32",
            settings={"graph": name, "static": static and name != "llm"},
        )
    made = {name: f"export {name}" for name in graphs}
    beside = {name: f"export {name}" for name in profiles.dimensions(options, source).beside_llm}
    for name, step in beside.items():
        yield Step(step, "export", "PyTorch to ONNX, FP32", settings={"graph": name, "static": False})
    images = options.images_digest if options.images else "rendered scenes"  # by content: files can be replaced
    count = options.calibration_images if options.precision == "fp8" else 16
    yield Step(
        "samples",
        "samples",
        f"inputs of the graphs for {count} images ({options.images or images})",
        needs=("card", *made.values()),
        settings={"images": images, "count": count, "graphs": dict(made)},
    )
    if options.precision == "fp8":
        for name in FP8_GRAPHS:
            yield Step(f"fp8 {name}", "fp8", "FP8 Q/DQ by modelopt, max calibration", needs=(made[name], "samples"),
                       settings={"graph": name})  # fmt: skip
            made[name] = f"fp8 {name}"
    on_cpu = cpu_steps(options)
    for name, step in on_cpu.items():
        yield Step(step, step.split()[0], "integers or BF16, with everything but products kept in FP32",
                   needs=(made[name],), settings={"graph": name})  # fmt: skip
        made[name] = step
    if options.precision in GPU_PRECISIONS:
        for name in graphs:
            yield Step(f"fp16 {name}", "fp16", "FP16, with norms, softmax, texture and allocator kept in FP32",
                       needs=(made[name],), settings={"graph": name})  # fmt: skip
            made[name] = f"fp16 {name}"
    exported = tuple(f"export {name}" for name in graphs)
    against = "pytorch" if options.precision == "fp32" else "fp32"
    in_fp32 = {CLIP_LLM} if against == "pytorch" else set()  # the reader of a prompt is compared with its decoder
    compared = made | {name: step for name, step in beside.items() if name in in_fp32}
    yield Step(
        "parity",
        "parity",
        "cosine and greatest difference of every graph against " + ("PyTorch" if against == "pytorch" else "FP32"),
        needs=("samples", *exported, *beside.values(), *(name for name in made.values() if name not in exported)),
        settings={"graphs": compared, "against": against, "static": static},
    )
    agreement: tuple[str, ...] = ()
    if on_cpu:
        agreement = ("agreement",)
        chain = [name for name in graphs if name not in ("relevance_allocator_448", CLIP_GRAPH)]
        yield Step("agreement", "agreement", f"answers to {options.agreement_questions} questions against FP32's",
                   needs=("card", *exported, *on_cpu.values()),
                   settings={"images": images, "count": options.agreement_questions,
                             "fp32": {name: f"export {name}" for name in chain},
                             "graphs": {name: made[name] for name in chain}})  # fmt: skip
    served = ({name: f"export {name}" for name in graphs} if on_cpu else dict(made)) | beside
    if plans_wanted:
        for name in graphs:
            inputs = profiles.inputs_of(options, source, name)
            command = plans.command(options, inputs, folder_of(made[name]))
            yield Step(f"plan {name}", "plan", f"TensorRT plan, in {options.vision_image}", needs=(made[name],),
                       command=command, settings=tools(options, options.vision_image))  # fmt: skip
            served[name] = f"plan {name}"
        if source.language == "llama":
            yield Step(trtllm.PLAIN, "plain", "the language model and its tokenizer as a plain Llama directory")
        for step in trtllm.commands(options, source):
            yield Step(step.name, "llm", f"{step.does}, in {options.llm_image}", needs=step.needs, command=step.command,
                       settings=tools(options, options.llm_image))  # fmt: skip
        served["llm"] = trtllm.LAST
    yield Step(
        "repository",
        "repository",
        "Triton's model repository and its manifest",
        needs=("card", "parity", *agreement, *served.values(), *beside_fp32(options).values()),
        settings={
            "profile": options.profile,
            "precision": options.precision,
            "served": served,
            "beside_fp32": beside_fp32(options),
            "opt_batch": options.opt_batch,
            "configurations": {
                m.name: profiles.configuration(options, source, m) for m in profiles.served(options, source)
            },
        },
    )


def tools(options: Options, image: str) -> dict[str, Any]:
    """What a step's external tool depends on. A plan runs only on the exact TensorRT version that built it."""
    return {"image": image, "run_in": options.run_in, "installed": dict(options.installed)}


def cpu_steps(options: Options) -> dict[str, str]:
    """The steps that make a CPU's graphs of another precision than FP32, by graph; none for the other profiles."""
    if options.precision in ("fp32", *GPU_PRECISIONS):
        return {}
    vision = "int8" if options.precision == "int4" else options.precision
    return {name: f"{options.precision if name == 'llm' else vision} {name}" for name in REDUCED}


def beside_fp32(options: Options) -> dict[str, str]:
    """The steps whose graphs are served beside FP32's, by graph. BF16 is computed from FP32's own graphs."""
    return {} if options.precision == "bf16" else cpu_steps(options)


def told(steps: Sequence[Step], done: set[str], line: Callable[[Step], Sequence[str]]) -> str:
    """The plan as text: one line a step, followed by its command, formatted by `line`."""
    lines = []
    for step in steps:
        state = "done" if step.name in done else "to do"
        lines.append(f"{state:6} {step.name:28} {step.does}")
        if step.command:
            lines.append("       $ " + shlex.join(line(step)))
    return "\n".join(lines)
