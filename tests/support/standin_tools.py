"""Stand-ins for what a build calls: NVIDIA's images by `docker run`, and modelopt by its Python.

They read the command lines as the tools do and leave files as they do: so they prove what surrounds the tools, and
nothing of the tools. No plan is built and no engine runs. GLIMPSE_STANDIN_TENSORRT is the version that trtexec pretends
to be.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx

VERSION = "10.14.1.48"
BOUNDS = ("minShapes", "optShapes", "maxShapes")


def install(folder: Path) -> dict[str, str]:
    """Puts both into the folder; returns the variables by which a build finds them."""
    for program in ("docker", "modelopt"):
        (folder / program).write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {program} "$@"\n')
        (folder / program).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "GLIMPSE_MODELOPT_PYTHON": str(folder / "modelopt")}


def plan_bytes(version: str) -> bytes:
    """As a plan begins; what follows is nothing."""
    return b"ftrt" + bytes(20) + bytes(int(number) for number in version.split(".")) + bytes(100)


def docker(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", choices=["run"])
    parser.add_argument("--rm", action="store_true")
    parser.add_argument("--volume", action="append", default=[])
    parser.add_argument("--publish", action="append", default=[])
    parser.add_argument("--env", action="append", default=[])
    for name in ("--gpus", "--ipc", "--ulimit", "--user"):
        parser.add_argument(name)
    parser.add_argument("image")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(words)
    volumes = dict(reversed(volume.removesuffix(":ro").split(":")) for volume in asked.volume)
    command = [placed(word, volumes) for word in asked.command]
    tool = Path(command[1] if command[0] == "python3" else command[0]).name
    TOOLS[tool](command[2:] if command[0] == "python3" else command[1:])


def placed(word: str, volumes: dict[str, str]) -> str:
    """The container's path as this machine's."""
    for there, here in volumes.items():
        word = re.sub(rf"(^|=){there}(?=/|$)", rf"\g<1>{here}", word)
    return word


def trtexec(words: list[str]) -> None:
    version = os.environ.get("GLIMPSE_STANDIN_TENSORRT", VERSION)
    major, minor, patch, build = map(int, version.split("."))
    told = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    sys.stdout.write(
        f"&&&& RUNNING TensorRT.trtexec [TensorRT v{major}{minor:02}{patch:02}] [b{build}] # trtexec\n"
        "[11/20/2026-10:00:00] [I] Selected Device: NVIDIA Stand-in\n"
        "[11/20/2026-10:00:00] [I] Compute Capability: 9.0\n"
    )
    if "loadEngine" in told:
        assert Path(told["loadEngine"]).read_bytes().startswith(b"ftrt")
        return
    wanted = {value.name for value in onnx.load(told["onnx"]).graph.input}
    for bound in BOUNDS:
        assert {shape.split(":")[0] for shape in told[bound].split(",")} == wanted, bound
    assert "stronglyTyped" in told
    Path(told["saveEngine"]).write_bytes(plan_bytes(version))


def convert(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("model_type", "model_dir", "dtype", "output_dir", "qformat", "kv_cache_dtype"):
        parser.add_argument(f"--{name}")
    for name in ("tp_size", "calib_size"):
        parser.add_argument(f"--{name}", type=int)
    asked = parser.parse_args(words)
    found = json.loads((Path(asked.model_dir) / "config.json").read_text())
    text = found.get("text_config", found)
    told = {name: text[name] for name in ("vocab_size", "hidden_size")} | {"mapping": {"world_size": asked.tp_size}}
    (Path(asked.output_dir) / "config.json").write_text(json.dumps(told))


def trtllm_build(words: list[str]) -> None:
    told = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    pretrained = json.loads((Path(told["checkpoint_dir"]) / "config.json").read_text())
    build = {name: int(told[name]) for name in ("max_seq_len", "max_batch_size")}
    build["max_prompt_embedding_table_size"] = int(told["max_multimodal_len"])
    engine = {"version": "1.2.1", "pretrained_config": pretrained, "build_config": build}
    (Path(told["output_dir"]) / "config.json").write_text(json.dumps(engine))
    for rank in range(pretrained["mapping"]["world_size"]):
        (Path(told["output_dir"]) / f"rank{rank}.engine").write_bytes(b"engine")


def tritonserver(words: list[str]) -> None:
    sys.exit("no GPU")


TOOLS = {"trtexec": trtexec, "convert_checkpoint.py": convert, "quantize.py": convert, "trtllm-build": trtllm_build,
         "tritonserver": tritonserver}  # fmt: skip


def modelopt(words: list[str]) -> None:
    if words[0] == "-c":
        sys.stdout.write("0.0\n")
        return
    assert words[:2] == ["-m", "modelopt.onnx.quantization"]
    excluded = words[words.index("--nodes_to_exclude") + 1 : words.index("--opset")]
    told = {name: words[words.index(f"--{name}") + 1] for name in ("onnx_path", "calibration_data_path", "output_path")}
    assert set(excluded) <= {node.name for node in onnx.load(told["onnx_path"]).graph.node}
    assert len(np.load(told["calibration_data_path"])["image"]) >= 500
    shutil.copyfile(told["onnx_path"], told["output_path"])


if __name__ == "__main__":
    {"docker": docker, "modelopt": modelopt}[sys.argv[1]](sys.argv[2:])
