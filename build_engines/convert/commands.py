"""Resolve the placeholders of external command lines, here or in a container. Pure.

A command in a plan names folders by the placeholders below. The command and its step's key are therefore the same on
every machine.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from build_engines.convert.options import Options

WORK = "{work}"  # the folder of all steps
OUT = "{out}"  # the folder that the step writes
CHECKPOINT = "{checkpoint}"
CACHE = "{cache}"  # TensorRT's timing cache
CACHE_FOLDER = "timing"  # below WORK, one file an image, or a version that is installed here


def resolved(
    command: Sequence[str], options: Options, checkpoint: Path, out: Path, image: str, gpus: str = "all"
) -> list[str]:
    """The command line to run: in a container of `image`, or here."""
    is_here = options.run_in != "docker"
    version = "_".join(["here", *options.installed.values()]) if is_here else image.rsplit("/", 1)[-1].replace(":", "_")
    cache = f"{CACHE_FOLDER}/{version}.cache"
    if is_here:
        work = options.work.absolute()
        places = {
            WORK: str(work),
            OUT: str(out.absolute()),
            CHECKPOINT: str(checkpoint.absolute()),
            CACHE: f"{work}/{cache}",
        }
        return [_placed(word, places) for word in command]
    whole, below = _with_what_it_links_to(checkpoint)
    places = {WORK: "/work", OUT: f"/work/{out.name}", CHECKPOINT: f"/checkpoint{below}", CACHE: f"/work/{cache}"}
    return [*in_container(image, {options.work: "/work", whole: "/checkpoint:ro"}, gpus),
            *(_placed(word, places) for word in command)]  # fmt: skip


def _with_what_it_links_to(checkpoint: Path) -> tuple[Path, str]:
    """The folder to mount for a checkpoint, and the checkpoint's path in it.

    A checkpoint in the hub's cache is a folder `snapshots/<commit>` of links into the folder `blobs` beside
    `snapshots`.
    """
    if checkpoint.parent.name != "snapshots":
        return checkpoint, ""
    return checkpoint.parents[1], f"/snapshots/{checkpoint.name}"


def in_container(image: str, mounts: dict[Path, str], gpus: str = "all") -> list[str]:
    """`docker run` as the calling user, who then owns the files. PyTorch needs a name for this user."""
    volumes = [word for path, place in mounts.items() for word in ("--volume", f"{path.absolute()}:{place}")]
    return ["docker", "run", "--rm", "--gpus", gpus, "--ipc", "host", "--ulimit", "memlock=-1",
            "--user", f"{os.getuid()}:{os.getgid()}", "--env", "HOME=/tmp", "--env", "USER=glimpse",
            *volumes, image]  # fmt: skip


def _placed(word: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        word = word.replace(name, place)
    return word


def fp8(python: str, onnx: Path, calibration: Path, out: Path, excluded: Sequence[str]) -> list[str]:
    """Quantise an FP32 graph by modelopt: E4M3 Q/DQ around matrix products, all else FP32.

    `max` is the only calibration method that modelopt supports for FP8. Afterwards `precision.to_fp16` converts the
    other nodes to FP16 by name. modelopt's own conversion cannot: it chooses by type of operation.
    """
    return [
        python, "-m", "modelopt.onnx.quantization",
        "--onnx_path", str(onnx),
        "--quantize_mode", "fp8",
        "--calibration_method", "max",
        "--calibration_data_path", str(calibration),
        "--calibration_eps", "cpu",
        "--high_precision_dtype", "fp32",
        "--op_types_to_quantize", "MatMul", "Gemm",
        *(("--nodes_to_exclude", *excluded) if excluded else ()),
        "--opset", "19",
        "--output_path", str(out),
        "--log_level", "WARNING",
    ]  # fmt: skip
