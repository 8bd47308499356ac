"""Run each step of a plan with PyTorch, ONNX and external tools."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tqdm import tqdm
from transformers import AutoTokenizer

from build_engines import left_out
from build_engines.convert import (
    agreement,
    commands,
    devices,
    integers,
    parity,
    plans,
    precision,
    profiles,
    samples,
    trtllm,
)
from build_engines.convert.manifest import KEPT, NAME, NOT_FP8, manifest, write
from build_engines.convert.options import GPU_PRECISIONS, Options, Refused
from build_engines.convert.plan import Step, folder_of
from build_engines.convert.run import DONE, TOOL
from build_engines.convert.source import Source
from build_engines.convert.static import static_graphs
from build_engines.export import Graph, card, export_graph, graphs, offered_visual_tokens
from build_engines.model.checkpoint import Checkpoint, without_clips
from build_engines.repository import (
    BESIDE_LLM,
    CLIP_LLM,
    MOST_INLINE_BYTES,
    TEXT_ENCODER,
    Model,
    file_beside_llm,
    runner,
    weights_file,
)
from service.core.card import ModelCard
from service.core.tensors import MODELS
from service.text.prompt import PromptBuilder

MODEL, PLAN = "model.onnx", "model.plan"
VERSIONED = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers")
PROJECT = Path(__file__).parents[2]


class ToolMissing(Exception):
    """A tool is missing on this machine. The message says what to do."""


def versions() -> dict[str, str]:
    """Versions of the packages that the steps use here."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {name: metadata.version(name) for name in VERSIONED}


class Maker:
    """Runs steps. The checkpoint is read when the first step needs it."""

    def __init__(self, options: Options, source: Source, root: Mapping[str, Any], steps: Sequence[Step]) -> None:
        self.options, self.source, self.root, self.steps = options, source, root, steps
        for noisy in ("torch.onnx", "onnxscript"):
            logging.getLogger(noisy).setLevel(logging.ERROR)

    def __call__(self, step: Step, out: Path) -> None:
        ACTIONS[step.action](self, step, out)

    def folder(self, step: str) -> Path:
        return self.options.work / folder_of(step)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        try:
            found = Checkpoint.load(self.source.directory, self.source.allocator)
            return found.knowing_already(self.source.image_text) if self.source.zero_shot else found
        except ValueError as exc:
            raise Refused(str(exc)) from exc

    def graphs(self, static: bool) -> dict[str, Graph]:
        found = static_graphs(self.checkpoint, self.groups) if static else graphs(self.checkpoint)
        return {graph.name: graph for graph in found}

    @property
    def groups(self) -> int:
        """Groups of queries that a request may ask for."""
        return offered_visual_tokens(self.checkpoint)[1] // self.checkpoint.queries

    def make_card(self, step: Step, out: Path) -> None:
        try:
            told = card(self.checkpoint)
        except ValueError as exc:
            raise Refused(str(exc)) from exc
        unnamed = told.name == self.source.directory.name  # a hub snapshot's folder is named by a digest
        told = dataclasses.replace(
            told,
            name=self.source.name if unnamed else told.name,
            max_positions=min(told.max_positions, step.settings["max_positions"]),
            float_type=self.options.dtype,
            text_type=profiles.text_type(self.options),
            top_log_probs=self.options.profile != "tensorrt",
            most_visual_tokens=step.settings["most_visual_tokens"],
            guides=profiles.guides(self.options),
            clip=told.clip if self.options.profile == "embedded" else None,  # elsewhere it was never measured
            clip_weights=told.clip_weights and self.options.profile == "embedded",
        )
        trtllm.check_visual_tokens(told)
        if told.clip_weights != self.source.clip_weights:  # what was learnt of clips is not in this build
            told = dataclasses.replace(told, metadata=without_clips(told.metadata))
        if self.options.precision in GPU_PRECISIONS:  # a CPU's precision is chosen at start, and FP32 is always there
            told = told.computed_in(self.options.precision)
        (out / "card.json").write_text(told.to_json())
        for name, path in self.checkpoint.tokenizers(out).items():
            if path != out / name:
                shutil.copyfile(path, out / name)

    def make_export(self, step: Step, out: Path) -> None:
        graph = self.graphs(step.settings["static"])[step.settings["graph"]]
        path = out / f"{graph.name}.onnx"
        export_graph(graph, path)
        path.rename(out / MODEL)

    def make_samples(self, step: Step, out: Path) -> None:
        given = self._samples(step, out)
        told = ModelCard.from_json((self.folder("card") / "card.json").read_text())
        prompts = PromptBuilder.load(told, self.folder("card"))
        exported = {name: self.folder(made) / MODEL for name, made in step.settings["graphs"].items()}
        for name, arrays in samples.feeds(given, exported, prompts).items():
            np.savez(out / f"{name}.npz", **arrays)

    def _samples(self, step: Step, out: Path, *, again: bool = False) -> list[samples.Sample]:
        """Make the step's samples. Files that cannot be used are told, and listed in the step's output."""
        skipped: dict[str, str] = {}
        given = samples.samples(self.options.images, step.settings["count"], again=again, skipped=skipped)
        if skipped:
            left_out.write(skipped, out)
            tqdm.write(f"  {step.name}: {left_out.told(skipped)}", file=sys.stderr)
        return given

    def make_fp8(self, step: Step, out: Path) -> None:
        name = step.settings["graph"]
        source = self.folder(step.needs[0]) / MODEL
        excluded = precision.not_fp8(onnx.load(source, load_external_data=False))
        python = modelopt_python()
        if not Path(python).exists():
            raise ToolMissing(
                "FP8 needs modelopt in its own environment: run python3 scripts/set_up_modelopt.py, "
                f"which makes {python}"
            )
        self._run(
            commands.fp8(python, source, self.folder("samples") / f"{name}.npz", out / MODEL, list(excluded)), out
        )
        write(out / NOT_FP8, excluded)
        (out / TOOL).write_text(json.dumps({"modelopt": _version_there(python, "nvidia-modelopt")}))

    def make_fp16(self, step: Step, out: Path) -> None:
        name = step.settings["graph"]
        converted = precision.to_fp16(name, onnx.load(self.folder(step.needs[0]) / MODEL))
        save(converted.model, out / MODEL, name)
        write(out / KEPT, dict(converted.kept))

    def make_int8(self, step: Step, out: Path) -> None:
        name, source = step.settings["graph"], self.folder(step.needs[0])
        model = named(onnx.load(source / MODEL, load_external_data=False))
        write(out / KEPT, integers.to_int8(name, model, source))
        save(model, out / MODEL, f"{name}.int8")

    def make_int4(self, step: Step, out: Path) -> None:
        name, source = step.settings["graph"], self.folder(step.needs[0])
        model = named(onnx.load(source / MODEL, load_external_data=False))
        write(out / KEPT, integers.to_int4(model, source))
        save(model, out / MODEL, f"{name}.int4")

    def make_bf16(self, step: Step, out: Path) -> None:
        model = named(onnx.load(self.folder(step.needs[0]) / MODEL))
        integers.round_to_bf16(model)
        save(model, out / MODEL, f"{step.settings['graph']}.bf16")

    def make_agreement(self, step: Step, out: Path) -> None:
        given = self._samples(step, out, again=True)
        told = ModelCard.from_json((self.folder("card") / "card.json").read_text())
        prompts = PromptBuilder.load(told, self.folder("card"))
        fp32, ours = (
            {name: self.folder(made) / MODEL for name, made in step.settings[which].items()}
            for which in ("fp32", "graphs")
        )
        write(out / "agreement.json", agreement.agreement(fp32, ours, told, prompts, given))

    def make_parity(self, step: Step, out: Path) -> None:
        report = {}
        for name, made in tqdm(step.settings["graphs"].items(), desc="parity", unit="graph"):
            of = "llm" if name == CLIP_LLM else name
            feeds = dict(np.load(self.folder("samples") / f"{of}.npz"))
            if MODELS[of].batched:
                feeds = {key: array[: samples.PARITY] for key, array in feeds.items()}
            nearness = self._nearness_of_llm if of == "llm" else self._nearness
            try:
                report[name] = nearness(name, self.folder(made) / MODEL, feeds, step.settings)
            except ValueError as exc:
                raise Refused(f"{name}: {exc}") from exc
        told = {name: {output: each.as_json() for output, each in near.items()} for name, near in report.items()}
        write(out / "parity.json", {"against": step.settings["against"], "samples": samples.PARITY, "graphs": told})
        parity.check(report, self.options.precision)

    def _nearness(
        self, name: str, graph: Path, feeds: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> dict[str, parity.Nearness]:
        batched = MODELS[name].batched
        ours = parity.outputs(graph, feeds, batched)
        if settings["against"] == "pytorch":
            theirs = parity.outputs_of_module(self.graphs(settings["static"])[name], feeds, batched)
        else:
            theirs = parity.outputs(self.folder(f"export {name}") / MODEL, feeds, batched)
        return {output: parity.nearness(ours[output], theirs[output]) for output in theirs}

    def _nearness_of_llm(
        self, name: str, graph: Path, feeds: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> dict[str, parity.Nearness]:
        """Compare logits after prompts and a few tokens, which what reads the prompt before the decoder decides too."""
        exported = {each: self.folder(f"export {each}") / MODEL for each in (name, TEXT_ENCODER)}
        compared: Mapping[str, Path | parity.Run] = exported
        if settings["against"] == "pytorch":
            modules = self.graphs(static=False)
            compared = {
                each: parity.Module(modules[each], self.checkpoint.vocab_size) for each in exported if each in modules
            }
        theirs = parity.logits(compared[name], feeds, encoder=self._reader(compared.get(TEXT_ENCODER)))
        ours = parity.logits(graph, feeds, theirs.argmax(2), self._reader(exported[TEXT_ENCODER]))
        return {"logits": parity.nearness(ours, theirs)}

    def _reader(self, graph: Path | parity.Run | None) -> parity.Encoder | parity.Images | None:
        """What reads a prompt before the decoder, if anything does."""
        told = ModelCard.from_json((self.folder("card") / "card.json").read_text())
        return None if graph is None else parity.reader_of(told, graph)

    def make_plain(self, _: Step, out: Path) -> None:
        self.checkpoint.model.language_model.half().save_pretrained(out)
        self.checkpoint.model.language_model.float()
        AutoTokenizer.from_pretrained(self.source.directory).save_pretrained(out)

    def make_plan(self, step: Step, out: Path) -> None:
        said = self._tool(step, out)
        with (out / PLAN).open("rb") as plan:
            version = plans.version_of_plan(plan.read(plans.HEADER_BYTES))
        (out / TOOL).write_text(json.dumps({"tensorrt": version} | gpu_of(said) | made_on()))

    def make_llm(self, step: Step, out: Path) -> None:
        self._tool(step, out)
        if step.name == trtllm.LAST:
            engine = json.loads((out / "config.json").read_text())
            trtllm.check_engine(engine, self.options, self.source)
            (out / TOOL).write_text(json.dumps({"tensorrt_llm": engine["version"]}))

    def _tool(self, step: Step, out: Path) -> str:
        image, here = step.settings["image"], self.options.run_in != "docker"
        (self.options.work / commands.CACHE_FOLDER).mkdir(exist_ok=True)
        line = commands.resolved(step.command, self.options, self.source.directory, out, image)
        if shutil.which(line[0]) is None:
            where = "on a machine with an NVIDIA GPU and its container toolkit" if not here else f"inside {image}"
            raise ToolMissing(
                f"{step.name} needs {line[0]}: run the same command again {where}; finished steps are kept"
            )
        return self._run(line, out)

    def _run(self, line: Sequence[str], out: Path) -> str:
        """Run a tool and return its output. Raises ToolFailed with the last lines if it fails."""
        log = self.options.work / f"{out.name.removesuffix('.partial')}.log"
        with log.open("w") as said:
            done = subprocess.run(line, stdout=said, stderr=subprocess.STDOUT, check=False)
        text = log.read_text(errors="replace")
        if done.returncode:
            raise ToolFailed(
                f"{line[0]} failed with exit code {done.returncode}. See the whole log in {log}\n"
                + "\n".join(text.splitlines()[-8:])
            )
        return text

    def make_repository(self, step: Step, out: Path) -> None:
        for model in profiles.served(self.options, self.source):
            self._make_model(model, step.settings["served"].get(model.name), out / model.name)
            if made := step.settings["beside_fp32"].get(model.name):
                self._put_beside(made, model.name, out / model.name / "1")
            if model.name == "llm":
                for graph in BESIDE_LLM.keys() & step.settings["served"].keys():
                    self._put_beside_llm(step.settings["served"][graph], graph, out)
            (out / model.name / "config.pbtxt").write_text(step.settings["configurations"][model.name])
        for path in self.folder("card").iterdir():
            if path.name != DONE:
                shutil.copyfile(path, out / path.name)
        if "agreement" in step.needs:
            measured = json.loads((self.folder("agreement") / "agreement.json").read_text())
            told = ModelCard.from_json((out / "card.json").read_text())
            told = dataclasses.replace(told, precisions={self.options.precision: measured})
            (out / "card.json").write_text(told.to_json())
        write(out / NAME, manifest(self.options, self.source, self.root, self.steps, self.options.work, out))

    def _put_beside(self, made: str, name: str, version: Path) -> None:
        """Serve a step's graph as model.PRECISION.onnx, with its weights under the name that the graph gives them."""
        for path in self.folder(made).iterdir():
            if path.name == MODEL:
                link(path, version / f"model.{made.split(maxsplit=1)[0]}.onnx")
            elif path.name.startswith(name):
                link(path, version / path.name)

    def _put_beside_llm(self, made: str, graph: str, out: Path) -> None:
        """Serve a graph beside the LLM's own, with its weights if they have a file."""
        file = file_beside_llm(out, graph)
        for path in self.folder(made).iterdir():
            if path.name == MODEL:
                link(path, file)
            elif path.name == weights_file(graph):
                link(path, file.with_name(path.name))

    def _make_model(self, model: Model, made: str | None, folder: Path) -> None:
        version = folder / "1"
        version.mkdir(parents=True)
        if model.steps:
            (version / ".gitkeep").touch()
            return
        if self.options.profile != "tensorrt":
            (version / "model.py").write_text(runner(model))
        if made is None:
            return
        for path in self.folder(made).iterdir():
            if path.name not in (DONE, KEPT, TOOL):
                link(path, version / path.name)


def modelopt_python() -> str:
    """The interpreter from `scripts/set_up_modelopt.py`, or from GLIMPSE_MODELOPT_PYTHON."""
    return os.environ.get("GLIMPSE_MODELOPT_PYTHON", str(PROJECT / ".venv-modelopt" / "bin" / "python"))


class ToolFailed(Exception):
    """An external tool failed. The message has its last lines."""


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give every node a name."""
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def save(model: onnx.ModelProto, path: Path, name: str) -> None:
    """Save one file, with the weights in a second file if they are too large for one."""
    if sum(len(constant.raw_data) for constant in model.graph.initializer) <= MOST_INLINE_BYTES:
        path.write_bytes(model.SerializeToString(deterministic=True))
    else:
        onnx.save_model(model, path, save_as_external_data=True, location=weights_file(name))


def link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


GPU_NAME = re.compile(r"Selected Device: (.+)")
COMPUTE_CAPABILITY = re.compile(r"Compute Capability: ([\d.]+)")


def gpu_of(said: str) -> dict[str, str]:
    """What `trtexec` reports about the GPU."""
    found = {"gpu": GPU_NAME, "compute_capability": COMPUTE_CAPABILITY}
    return {name: match.group(1).strip() for name, pattern in found.items() if (match := pattern.search(said))}


def made_on() -> dict[str, str]:
    """The GPU of this machine, for `tool.json`."""
    return {"device": found} if (found := devices.gpu()) else {}


def _version_there(python: str, package: str) -> str:
    code = f"from importlib import metadata; print(metadata.version('{package}'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


ACTIONS: dict[str, Callable[[Maker, Step, Path], None]] = {
    "card": Maker.make_card,
    "export": Maker.make_export,
    "samples": Maker.make_samples,
    "fp8": Maker.make_fp8,
    "fp16": Maker.make_fp16,
    "int8": Maker.make_int8,
    "int4": Maker.make_int4,
    "bf16": Maker.make_bf16,
    "agreement": Maker.make_agreement,
    "parity": Maker.make_parity,
    "plain": Maker.make_plain,
    "plan": Maker.make_plan,
    "llm": Maker.make_llm,
    "repository": Maker.make_repository,
}
