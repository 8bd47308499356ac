"""Measure what each part of the relevance allocator contributes, as JSON and plots.

    glimpse ablate                       # the shipped checkpoint; resumes a killed run
    glimpse ablate --quick               # a few scenes, to check that everything runs
    python -m benchmarks.ablate --checkpoint runs/reference/checkpoint --repository build/repository

Arms differ in what ranks the cells (relevance, one way of knowing, random, evenly spread, centre first), in the
budgets of vision and visual tokens, in a tension switched off, and in the closer view. All arms answer the same
questions about the same held-out scenes, in PyTorch, with unchanged weights. Shares have Wilson's 95 % interval. Means
and differences have a bootstrap interval over scenes, paired if arms are compared. Times are those of the exported
graphs in ONNX Runtime. Finished arms are stored under the weights' fingerprint: delete the folder after a code change.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.ablation.plan import Plan
from benchmarks.figures import commit


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    plan = Plan()
    parser = argparse.ArgumentParser(
        prog="glimpse ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=plan.checkpoint, help="default: reference/")
    parser.add_argument(
        "--repository", type=Path, default=plan.repository, help="the checkpoint's exported graphs, to time"
    )
    parser.add_argument(
        "--scenes", type=int, default=plan.scenes, help="scenes of the training world (default: %(default)s)"
    )
    parser.add_argument(
        "--small-print", type=int, default=plan.small_print, help="scenes with small print (default: %(default)s)"
    )
    parser.add_argument("--timed", type=int, default=plan.timed, help="timed runs of each graph (default: %(default)s)")
    parser.add_argument(
        "--rivals", action="store_true", help="compare with the field's methods of pruning tokens instead: rivals.json"
    )
    parser.add_argument("--quick", action="store_true", help="use 6 scenes of each split and 5 timed runs")
    parser.add_argument(
        "--kept", type=Path, default=plan.kept, help="folder of finished arms, which are reused (default: %(default)s)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=plan.out,
        help="folder of ablation.json and ablation.png, and of benchmarks.stages' stages.json (default: build/bench)",
    )
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    asked = parsed(given)
    plan = Plan(asked.checkpoint, asked.repository, asked.kept, asked.scenes, asked.small_print, asked.timed, asked.out)
    if asked.quick:
        plan = replace(plan, scenes=6, small_print=6, timed=5)

    from benchmarks.ablation import measuring, plots, rivals  # noqa: PLC0415  (PyTorch: --help should not wait for it)

    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.rivals:
        beside = {"commit": commit()} | rivals.measure(plan)
        (asked.out / "rivals.json").write_text(json.dumps(beside, indent=1) + "\n")
        print(rivals.table(beside))
        return
    told = {"commit": commit()} | measuring.measure(plan)
    (asked.out / "ablation.json").write_text(json.dumps(told, indent=1) + "\n")
    plots.page(told, asked.out / "ablation.png")
    print(json.dumps(told["verdict"], indent=2))


if __name__ == "__main__":
    main()
