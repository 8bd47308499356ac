"""External command lines: where their words point to, here or in the container that has the tool. Pure.

A command of a plan names folders by the words below: so it, and its step's key, are the same on every machine.
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
CACHE_FOLDER = "timing"  # below WORK, one file an image


def resolved(
    command: Sequence[str], options: Options, checkpoint: Path, out: Path, image: str, gpus: str = "all"
) -> list[str]:
    """The command as it is run: in a container of `image`, or here."""
    cache = f"{CACHE_FOLDER}/{image.rsplit('/', 1)[-1].replace(':', '_')}.cache"
    if options.run_in != "docker":
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
    """What a container needs of a checkpoint, and where below that it lies: in the hub's cache a checkpoint is a folder
    of links, `snapshots/<commit>`, into the folder `blobs` beside `snapshots`."""
    if checkpoint.parent.name != "snapshots":
        return checkpoint, ""
    return checkpoint.parents[1], f"/snapshots/{checkpoint.name}"


def in_container(image: str, mounts: dict[Path, str], gpus: str = "all") -> list[str]:
    """`docker run`, as the user who asks, so that the files are theirs; PyTorch wants a name for who runs it."""
    volumes = [word for path, place in mounts.items() for word in ("--volume", f"{path.absolute()}:{place}")]
    return ["docker", "run", "--rm", "--gpus", gpus, "--ipc", "host", "--ulimit", "memlock=-1",
            "--user", f"{os.getuid()}:{os.getgid()}", "--env", "HOME=/tmp", "--env", "USER=glimpse",
            *volumes, image]  # fmt: skip


def _placed(word: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        word = word.replace(name, place)
    return word


def fp8(python: str, onnx: Path, calibration: Path, out: Path, excluded: Sequence[str]) -> list[str]:
    """modelopt's quantiser on an FP32 graph: E4M3 Q/DQ around matrix products, everything else stays FP32.

    `max` is the one method that modelopt supports for FP8. The batch norm-like rest is made FP16 afterwards, by name
    (`precision.to_fp16`), which modelopt's own conversion, by type of operation, cannot."""
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
