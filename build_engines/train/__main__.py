"""`python -m build_engines.train --out runs/reference`: train the reference model from scratch.

Runs on a CPU or a GPU, in five resumable stages. `language` (the decoder, on symbols) and `vision` (the encoder, on
dense losses) run at the same time, then `qformer`, `joint` and `allocator`. At the end the checkpoint is written,
rounded to FP16, read back and evaluated. A sixth stage runs only if it is named: `--stages clips --start reference`
teaches clips and several images to a published checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

BY_DEFAULT = ("language", "vision", "qformer", "joint", "allocator")
STAGES = (*BY_DEFAULT, "clips")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="glimpse train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/reference"), help="checkpoints, log, curve (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of the number of steps (default: 1, the shipped model)"
    )
    parser.add_argument("--stages", default=",".join(BY_DEFAULT), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the checkpoints in --out, with the options\nthat they were begun with",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count() or 1,
        help="total CPU threads (default: %(default)s). From qformer on, 2 processes add their parts to\n"
        "a batch. With 1 thread, or on a GPU, there is one process and half of the batch",
    )
    parser.add_argument("--eager", action="store_true", help="do not compile: needs no C++ compiler, but is slower")
    parser.add_argument(
        "--large-budgets", action="store_true", help="stage allocator: large budgets more often, 2:3:5 by thirds"
    )
    parser.add_argument(
        "--adapter-rank",
        type=int,
        default=0,
        help="stage allocator: rank of LoRA on the language model (default: frozen)",
    )
    parser.add_argument(
        "--start", type=Path, help="go on from this published checkpoint, such as reference, at lower rates"
    )
    parser.add_argument("--tiny", action="store_true", help="a smoke test with a tiny model and a few steps")
    options = parser.parse_args(arguments)

    stages = options.stages.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"--stages has unknown {', '.join(unknown)}: choose from {', '.join(STAGES)}")
    begun = [stage for stage in stages if (options.out / f"{stage}.pt").exists()]
    if begun and not options.resume:
        parser.error(f"{options.out} already holds {', '.join(begun)}: add --resume or choose another --out")

    from build_engines.train.course import OtherSettingsError  # noqa: PLC0415  (as below)
    from build_engines.train.run import train  # noqa: PLC0415  (PyTorch: --help should not wait seconds for it)
    from build_engines.train.stages import Plan  # noqa: PLC0415

    plan = Plan(
        options.out,
        options.scale,
        compiled=not options.eager,
        tiny=options.tiny,
        start=options.start,
        large_budgets=options.large_budgets,
        adapter_rank=options.adapter_rank,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    try:
        train(plan, stages, options.threads)
    except OtherSettingsError as error:
        parser.error(str(error))
    tqdm.write(f"finished in {(time.monotonic() - started) / 60:.1f} minutes; output is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
